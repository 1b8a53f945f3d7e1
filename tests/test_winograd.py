"""3x3 convolutions on the CPU by Winograd's method: values, edges, NaN, memory, threads, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.ops import winograd
from resnet_fused.ops.conv_bn_act import api, reference
from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase, double, in_format

# What this CPU can run.
ISAS = {"avx512": ("avx512", "avx2"), "avx2": ("avx2",), "": ()}[winograd.instructions()]

CASES = (
    ConvCase(1, 16, 9, 8, 32, kernel=3, padding=1),
    ConvCase(2, 48, 7, 11, 96, kernel=3, padding=1, residual=True),
    ConvCase(3, 64, 8, 8, 64, kernel=3, padding=1, residual=True, act="none", bias=True),
    ConvCase(1, 32, 10, 9, 32, kernel=3, affine=False, bias=True),
    ConvCase(1, 16, 5, 3, 32, kernel=3, padding=3, act="none"),
    ConvCase(1, 16, 1, 33, 32, kernel=3, padding=1, residual=True),
    ConvCase(2, 256, 14, 14, 256, kernel=3, padding=1),
    ConvCase(3, 512, 7, 7, 512, kernel=3, padding=1, residual=True),
)


def run(call: ConvBNActCall, isa: str = "", out: Tensor | None = None) -> Tensor:
    convolution = winograd.Convolution(call.conv, isa)
    return (convolution.relu if call.act == "relu" else convolution.linear)(call.x, call.residual, out)


def assert_right(call: ConvBNActCall, out: Tensor) -> None:
    other = reference.run(in_format(call, torch.contiguous_format))
    assert_within_budget(out, reference.run(call), reference.run(double(call)), other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=ConvCase.id)
def test_cases(case: ConvCase, isa: str) -> None:
    call = case.make(torch.float32)
    assert_right(call, run(call, isa))
    # One that it cannot get right by chance: a single one goes through every filter tap and reaches no other image.
    call.x.zero_()
    call.x[-1, 3, case.h // 2, case.w // 2] = 1
    assert_right(call, run(call, isa))


@given(data=st.data())
def test_any_size(data: st.DataObject) -> None:
    draw = data.draw
    case = ConvCase(
        n=draw(st.integers(1, 3)),
        c=16 * draw(st.integers(1, 3)),
        h=draw(st.integers(3, 18)),
        w=draw(st.integers(3, 18)),
        k=32 * draw(st.integers(1, 3)),
        kernel=3,
        padding=draw(st.integers(0, 2)),
        residual=draw(st.booleans()),
        act=draw(st.sampled_from(["relu", "none"])),
    )
    call = case.make(torch.float32, seed=draw(st.integers(0, 99)))
    assert_right(call, run(call, draw(st.sampled_from(ISAS))))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_nan_and_infinities_stand_where_eager_has_them(special: float, isa: str) -> None:
    for where in ("x", "residual"):
        call = ConvCase(2, 32, 9, 9, 32, kernel=3, padding=1, residual=True).make(torch.float32)
        tensor = call.x if where == "x" else call.residual
        assert tensor is not None
        tensor[1, 3, 4, 4] = special
        eager, out = reference.run(call), run(call, isa)
        assert torch.equal(out.isnan(), eager.isnan()) and torch.equal(out.isinf(), eager.isinf())
        torch.testing.assert_close(out, eager, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_reads_and_writes_nothing_beside_its_tensors(isa: str) -> None:
    call = ConvCase(2, 32, 7, 9, 32, kernel=3, padding=1, residual=True).make(torch.float32)
    assert call.residual is not None

    def walled(tensor: Tensor) -> Tensor:
        """A copy in the middle of a buffer of NaN."""
        n, c, h, w = tensor.shape
        buffer = torch.full((n + 2, h, w, c), float("nan"))
        buffer[1:-1] = tensor.permute(0, 2, 3, 1)
        return buffer.permute(0, 3, 1, 2)[1:-1]

    out = walled(torch.zeros_like(call.residual))
    got = run(call._replace(x=walled(call.x), residual=walled(call.residual)), isa, out)
    assert got.data_ptr() == out.data_ptr() and got.isfinite().all()
    assert torch.equal(got, run(call, isa))
    around = out.as_strided((4, 7, 9, 32), (7 * 9 * 32, 9 * 32, 32, 1), 0)
    assert around[0].isnan().all() and around[-1].isnan().all()


def test_any_number_of_threads_gives_the_same() -> None:
    call = ConvCase(3, 64, 10, 13, 128, kernel=3, padding=1, residual=True).make(torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 64):
            torch.set_num_threads(threads)
            results.append(run(call))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_weights_are_transformed_anew_after_a_write() -> None:
    call = CASES[0].make(torch.float32)
    before = run(call)
    with torch.no_grad():
        call.conv.weight.mul_(2)
    assert_right(call, run(call))
    assert not torch.equal(before, run(call))


def test_auto_takes_it_where_it_serves() -> None:
    call = CASES[1].make(torch.float32)
    assert torch.equal(api.compute(call, "auto"), run(call))
    block = rf.FusedBasicBlock(32, 32).eval()
    with torch.no_grad():
        assert torch.equal(block(call.x[:, :32]), block(call.x[:, :32].contiguous()))


REFUSED = {
    "3x3": ConvCase(1, 32, 9, 9, 32),
    "stride": ConvCase(1, 32, 9, 9, 32, kernel=3, stride=2, padding=1),
    "dilation": ConvCase(1, 32, 9, 9, 32, kernel=3, dilation=2, padding=1),
    "one group": ConvCase(1, 32, 9, 9, 32, kernel=3, groups=2, padding=1),
    "multiples of 16 and 32, got 24": ConvCase(1, 24, 9, 9, 32, kernel=3, padding=1),
    "16 tiles": ConvCase(1, 512, 7, 7, 512, kernel=3, padding=1),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    with pytest.raises(backends.BackendError, match=reason):
        api.compute(REFUSED[reason].make(torch.float32), "cpu")


def test_other_dtypes_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(backends.BackendError, match="float32"):
            api.compute(CASES[0].make(dtype), "cpu")


def test_unsound_calls_of_the_kernel_itself_are_refused() -> None:
    call = CASES[0].make(torch.float32)
    filters, bias = winograd._prepare(call.conv)
    out = torch.empty(1, 32, 9, 8).to(memory_format=torch.channels_last)
    op = torch.ops.resnet_fused_cpu.winograd
    assert op(call.x, filters, bias, None, [1, 1], True, out)
    nchw = call.x.contiguous()
    for name, arguments in {
        "x: its": (nchw, filters, bias, None, [1, 1], True, out),
        "filters": (call.x, filters[:, :15], bias, None, [1, 1], True, out),
        "bias": (call.x, filters, bias[:16], None, [1, 1], True, out),
        "residual": (call.x, filters, bias, out[:, :, 1:], [1, 1], True, out),
        "out": (call.x, filters, bias, None, [0, 0], True, out),
        "sse9": (call.x, filters, bias, None, [1, 1], True, out, "sse9"),
    }.items():
        with pytest.raises(RuntimeError, match=name):
            op(*arguments)
