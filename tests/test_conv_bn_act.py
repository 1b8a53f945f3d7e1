"""conv_bn_act: every backend against float64, gradients, registration, layouts, traps, bad input."""

from __future__ import annotations

import gc
import threading

import devices
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_fused import backends, functional
from resnet_fused.ops import onednn, packed, workspace
from resnet_fused.ops.conv_bn_act import api, reference
from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.ops.tensor_cache import CACHE
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import CONV_CASES, ConvCase, double, in_format

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {True: torch.channels_last, False: torch.contiguous_format}

# One of each kind of convolution in ResNet-18/34/50/101/152, ResNeXt and wide ResNets, with fewer pixels.
RESNET_CASES = (
    ConvCase(1, 3, 32, 32, 64, kernel=7, stride=2, padding=3),
    ConvCase(2, 64, 8, 8, 64, kernel=3, padding=1, residual=True),
    ConvCase(2, 64, 8, 8, 128, kernel=3, stride=2, padding=1),
    ConvCase(1, 512, 7, 7, 512, kernel=3, padding=1, residual=True),
    ConvCase(2, 64, 8, 8, 256, residual=True),
    ConvCase(1, 256, 8, 8, 512, stride=2, act="none"),
    ConvCase(1, 2048, 7, 7, 512),
    ConvCase(1, 128, 8, 8, 128, kernel=3, padding=1, groups=32),
    ConvCase(1, 512, 8, 8, 512, kernel=3, stride=2, padding=1, groups=64),
    ConvCase(1, 1024, 7, 7, 2048, residual=True),
)


def eager_by_onednn(call: ConvBNActCall) -> Tensor:
    """Eager's expression with the convolution by oneDNN, which eager itself picks above some size."""
    call = in_format(call, torch.channels_last)
    c = call.conv
    y = torch.ops.aten.mkldnn_convolution(call.x, c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups)
    y = F.batch_norm(y, c.running_mean, c.running_var, c.bn_weight, c.bn_bias, False, 0.0, c.eps)
    y = y if call.residual is None else y + call.residual
    return F.relu(y) if call.act == "relu" else y


def significant(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, without the dimensions of size one, whose stride means nothing and varies in eager itself."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def assert_right(call: ConvBNActCall, backend: str) -> None:
    """Values within the budget, and eager's shape, strides and dtype."""
    eager = reference.run(call)
    out = api.compute(call, backend)
    if backend == "onednn":
        other = eager_by_onednn(call)
    else:
        other_format = torch.contiguous_format if eager.stride(1) == 1 else torch.channels_last
        other = reference.run(in_format(call, other_format))
    assert_within_budget(out, eager, reference.run(double(call)), other)
    assert significant(out) == significant(eager)


@pytest.mark.minimum
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV_CASES + RESNET_CASES, ids=ConvCase.id)
def test_onednn_is_within_the_budget(case: ConvCase, dtype: torch.dtype, channels_last: bool) -> None:
    call = case.make(dtype, channels_last=channels_last)
    if (reason := onednn.refused(call.x, call.conv)) is not None:
        assert api.compute(call, "auto").dtype == dtype  # the reference serves
        assert "instructions" in reason or "as wide as the filter" in reason
        return
    assert_right(call, "onednn")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cudnn", "triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV_CASES + RESNET_CASES, ids=ConvCase.id)
def test_cuda_backends_are_within_the_budget(case: ConvCase, dtype: torch.dtype, backend: str) -> None:
    call = case.make(dtype, "cuda")
    if backend != "auto" and devices.refused("conv_bn_act", backend, call):
        with pytest.raises(backends.BackendError, match=backend):
            api.compute(call, backend)
        return
    assert_right(call, backend)


@given(data=st.data())
def test_any_small_problem(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.sampled_from([1, 2, 3, 5]))
    case = ConvCase(
        n=draw(st.integers(2, 4)),
        c=groups * draw(st.integers(1, 9)),
        h=draw(st.integers(9, 15)),  # with fewer outputs eager's own error is a matter of luck
        w=draw(st.integers(9, 15)),
        k=groups * draw(st.integers(6, 12)),
        kernel=kernel,
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 2)),
        dilation=1 if kernel == 5 else draw(st.integers(1, 2)),
        groups=groups,
        residual=draw(st.booleans()),
        act=draw(st.sampled_from(["relu", "none"])),
        bias=draw(st.booleans()),
        affine=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    call = case.make(dtype, channels_last=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    assert_right(call, "auto")


@pytest.mark.parametrize("case", CONV_CASES, ids=ConvCase.id)
def test_gradients_equal_eagers(case: ConvCase) -> None:
    call = double(case.make(torch.float64))
    leaves = [t for t in (call.x, *call.conv[:4], call.residual) if t is not None]

    def gradients(run: object) -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.requires_grad_()
        out: Tensor = run(call)  # type: ignore[operator]
        return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))

    ours = gradients(lambda c: api.call_op(c.x, c.conv, c.residual, c.act, "auto"))
    for got, want in zip(ours, gradients(reference.run), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_within_the_budget(dtype: torch.dtype, device: str) -> None:
    case = ConvCase(2, 16, 9, 7, 24, kernel=3, stride=2, padding=1, residual=True)

    def gradients(call: ConvBNActCall, run: object) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (call.x, call.conv.weight, *call.conv[2:4], call.residual)]
        conv = call.conv._replace(weight=leaves[1], bn_weight=leaves[2], bn_bias=leaves[3])
        out: Tensor = run(ConvBNActCall(leaves[0], conv, leaves[4], "relu"))  # type: ignore[operator]
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(out.shape, generator=generator).to(dtype).to(out)
        return list(torch.autograd.grad(out, leaves, cotangent))

    call = case.make(dtype, device)
    assert call.residual is not None
    before = reference.run(double(call)._replace(act="none"))
    call.residual.add_(torch.where(before < 0, -0.25, 0.25))  # no ReLU is decided by rounding
    ours = gradients(call, lambda c: api.call_op(c.x, c.conv, c.residual, c.act, "auto"))
    eager, exact = gradients(call, reference.run), gradients(double(call), reference.run)
    other = gradients(in_format(call, torch.contiguous_format), reference.run)
    for got, want, true, also in zip(ours, eager, exact, other, strict=True):
        assert_within_budget(got, want, true, also)


def test_gradcheck_and_double_backward() -> None:
    call = double(ConvCase(2, 4, 5, 4, 6, kernel=3, stride=2, padding=1, groups=2, residual=True, bias=True).make(
        torch.float64
    ))  # fmt: skip
    conv = call.conv
    inputs = [t.requires_grad_() for t in (call.x, *conv[:4], call.residual) if t is not None]

    def run(x: Tensor, w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        return api.call_op(x, conv._replace(weight=w, bias=b, bn_weight=gamma, bn_bias=beta), residual, "relu", "auto")

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_zero_gamma_has_its_gradient() -> None:
    """Zero-initialised residual branches: γ = 0 must not lose dγ, which cannot be had from the output."""
    call = double(ConvCase(2, 4, 5, 5, 6, kernel=3, padding=1, residual=True).make(torch.float64))
    grads = []
    for run in (reference.run, lambda c: api.call_op(c.x, c.conv, c.residual, c.act, "auto")):
        gamma = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        grads.append(torch.autograd.grad(run(call._replace(conv=call.conv._replace(bn_weight=gamma))).sum(), gamma)[0])
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().min() > 0


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", CONV_CASES[::3], ids=ConvCase.id)
def test_opcheck(case: ConvCase, grad: bool) -> None:
    call = case.make(torch.float32)
    if grad:
        call.x.requires_grad_()
        call.conv.weight.requires_grad_()
    torch.library.opcheck(api.OP, (call.x, *call.conv, call.residual, call.act, "auto"))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities_pass_as_in_eager(special: float, device: str) -> None:
    call = ConvCase(1, 16, 9, 9, 16, kernel=3, padding=1, residual=True).make(torch.float32, device)
    call.x[0, 3, 4, 4] = special
    assert call.residual is not None
    call.residual[0, 5, 0, 0] = special
    eager = reference.run(call)
    for name in devices.able("conv_bn_act", call):
        out = api.compute(call, name)
        assert torch.equal(out.isnan(), eager.isnan()), name
        assert torch.equal(out.isinf(), eager.isinf()), name
    assert not torch.isfinite(eager).all()


def test_nan_passes_in_sub_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "LARGEST_BUFFER", 4096)
    call = ConvCase(5, 16, 6, 6, 16, kernel=3, padding=1, residual=True).make(torch.float32)
    call.x[4, 0, 0, 0] = float("nan")
    out = api.compute(call, "onednn")
    assert out[4].isnan().any() and not out[:4].isnan().any()
    assert_within_budget(out[:4], reference.run(call)[:4], reference.run(double(call))[:4], eager_by_onednn(call)[:4])


@pytest.mark.parametrize("shape", [(0, 16, 8, 8), (0, 16, 1, 1)])
def test_empty_batch(shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(call: ConvBNActCall) -> Tensor:
        raise AssertionError("a kernel was given nothing to do")

    for name in backends.NAMES:
        module = backends.implementation("conv_bn_act", name)
        if module is not None and name != "reference":
            monkeypatch.setattr(module, "run", launched)
    call = ConvCase(1, 16, 8, 8, 24, kernel=3, stride=2, padding=1).make(torch.float32, device)
    x = torch.empty(shape, device=device, requires_grad=True)
    out = api.call_op(x, call.conv, None, "relu", "auto")
    assert out.shape == (0, 24, (shape[2] + 1) // 2, (shape[3] + 1) // 2)
    assert out.stride() == reference.run(call._replace(x=x, residual=None)).stride()
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


AMBIGUOUS = [(1, 16, 1, 1), (2, 16, 1, 1), (1, 1, 5, 5), (3, 1, 4, 4), (1, 16, 1, 7), (2, 8, 3, 3)]


@pytest.mark.parametrize("weight_format", [torch.channels_last, torch.contiguous_format], ids=["wnhwc", "wnchw"])
@pytest.mark.parametrize("x_format", [torch.channels_last, torch.contiguous_format], ids=["xnhwc", "xnchw"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", AMBIGUOUS, ids=str)
def test_strides_follow_eagers(
    shape: tuple[int, ...], kernel: int, x_format: torch.memory_format, weight_format: torch.memory_format
) -> None:
    n, c, h, w = shape
    call = ConvCase(n, c, h, w, 8, kernel=kernel, padding=kernel // 2).make(torch.float32)
    x = torch.randn(shape).contiguous(memory_format=x_format)
    conv = call.conv._replace(weight=call.conv.weight.contiguous(memory_format=weight_format))
    for residual in (None, torch.randn(n, 8, h, w), torch.randn(n, 8, h, w).to(memory_format=torch.channels_last)):
        call = ConvBNActCall(x, conv, residual, "relu")
        assert significant(api.compute(call, "onednn")) == significant(reference.run(call))
        torch.library.opcheck(api.OP, (x, *conv, residual, "relu", "auto"), test_utils="test_faketensor")


def test_views_slices_and_expanded_tensors() -> None:
    """Misaligned and overlapping inputs give the right values and are not written to."""
    case = ConvCase(2, 16, 9, 9, 16, kernel=3, padding=1, residual=True)
    call = case.make(torch.float32)
    buffer = torch.full((2, 9, 9, 19), 7.0)
    view = buffer[..., 1:17].permute(0, 3, 1, 2)  # rows of 19, first element misaligned
    view.copy_(call.x)
    before = buffer.clone()
    assert_right(call._replace(x=view), "auto")
    assert torch.equal(buffer, before)
    assert_right(call._replace(x=torch.randn(1, 16, 9, 9).expand(2, -1, -1, -1)), "auto")
    assert_right(call._replace(x=torch.randn(2, 16, 18, 18)[:, :, ::2, ::2]), "auto")


def test_unbatched_pairs_and_string_padding() -> None:
    call = ConvCase(1, 8, 9, 7, 6, kernel=(2, 3)).make(torch.float32)
    c = call.conv
    vectors = (c.bn_weight, c.bn_bias, c.running_mean, c.running_var)
    for padding in (0, (1, 2), "same", "valid"):
        y = F.conv2d(call.x[0], c.weight, None, 1, padding)
        want = F.relu(F.batch_norm(y[None], *vectors[2:], *vectors[:2]))[0]
        got = functional.conv_bn_act(call.x[0], c.weight, *vectors, padding=padding)
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="padding: 'same' needs stride 1"):
        functional.conv_bn_act(call.x, c.weight, *vectors, padding="same", stride=2)


def test_float64_goes_to_the_reference() -> None:
    call = double(CONV_CASES[4].make(torch.float64))
    assert torch.equal(api.compute(call, "auto"), reference.run(call))
    with pytest.raises(backends.BackendError, match=r"float64.*backend='auto'"):
        api.compute(call, "onednn")


def test_low_precision_folds_in_float32() -> None:
    """A scale that bfloat16 cannot hold: the weight is rounded once, after it."""
    call = ConvCase(1, 64, 6, 6, 32).make(torch.bfloat16)
    wide = [t.float() for t in call.conv[2:6] if t is not None]
    conv = call.conv._replace(
        bn_weight=wide[0] * 1.0037, bn_bias=wide[1], running_mean=wide[2] + 3.0, running_var=wide[3] * 1e-3
    )
    call = call._replace(conv=conv)
    assert_within_budget(api.compute(call, "auto"), reference.run(call), reference.run(double(call)))
    weight, bias = packed.fold(conv)
    scale, exact_bias = packed.affine(double(call).conv, torch.float64)
    exact = conv.weight.double() * scale.view(-1, 1, 1, 1)
    half = torch.finfo(torch.bfloat16).eps / 2
    assert weight.dtype == torch.bfloat16 and bias.dtype == torch.float32
    assert ((weight.double() - exact).abs() <= 1.001 * half * exact.abs()).all()
    torch.testing.assert_close(bias.double(), exact_bias, rtol=1e-5, atol=1e-5)


class TestPackedWeights:
    """oneDNN's packed weights must never be stale, and never outlive the tensors they were made from."""

    CASE = ConvCase(2, 16, 8, 8, 16, kernel=3, padding=1)

    def test_every_counted_write_is_seen(self) -> None:
        call = self.CASE.make(torch.float32)
        for i in (0, 2, 3, 4, 5):
            before = api.compute(call, "onednn")
            tensor = call.conv[i]
            assert isinstance(tensor, Tensor)
            tensor.mul_(1.5)
            after = api.compute(call, "onednn")
            assert not torch.equal(before, after)
            assert_right(call, "onednn")

    def test_swaps_of_data_and_writes_through_it_are_seen(self) -> None:
        call = self.CASE.make(torch.float32)
        api.compute(call, "onednn")
        call.conv.weight.data = call.conv.weight.data * 2
        assert_right(call, "onednn")
        call.conv.weight.data.mul_(2)
        assert_right(call, "onednn")

    def test_writes_to_inference_tensors_are_seen(self) -> None:
        with torch.inference_mode():
            call = self.CASE.make(torch.float32)
            api.compute(call, "onednn")
            call.conv.weight.mul_(2)
            assert_right(call, "onednn")

    def test_packing_in_inference_mode_serves_later_modes(self) -> None:
        call = self.CASE.make(torch.float32)
        with torch.inference_mode():
            api.compute(call, "onednn")
        call.x.requires_grad_()
        out = api.call_op(call.x, call.conv, None, "relu", "onednn")
        out.sum().backward()
        assert call.x.grad is not None

    def test_entries_die_with_their_tensors(self) -> None:
        packed.clear()
        call = self.CASE.make(torch.float32)
        api.compute(call, "onednn")
        assert len(CACHE) > 0
        del call
        gc.collect()
        assert len(CACHE) == 0

    def test_shapes_that_come_and_go(self) -> None:
        call = self.CASE.make(torch.float32)
        for n, size in [
            (1, 8),
            (2, 9),
            (2, 9),
            (3, 5),
            (1, 8),
            (4, 12),
            (4, 12),
            (5, 7),
            (5, 7),
            (2, 9),
            (6, 3),
            (6, 3),
        ]:
            assert_right(call._replace(x=torch.randn(n, 16, size, size)), "onednn")

    def test_threads_share_them(self) -> None:
        call = self.CASE.make(torch.float32)
        want = api.compute(call, "onednn")
        packed.clear()
        wrong: list[int] = []

        def work(i: int) -> None:
            for _ in range(20):
                if not torch.equal(api.compute(call, "onednn"), want):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong


def test_autocast_casts_as_eager_does(device: str) -> None:
    call = ConvCase(2, 16, 8, 8, 16, kernel=3, padding=1, residual=True).make(torch.float32, device)
    assert call.residual is not None
    low = call.residual.bfloat16()
    with torch.autocast(device, torch.bfloat16):
        for residual in (None, low, call.residual):
            out = api.call_op(call.x, call.conv, residual, "relu", "auto")
            eager = reference.run(call._replace(residual=residual))
            assert out.dtype == eager.dtype
            torch.testing.assert_close(out, eager, rtol=2e-2, atol=2e-2)
    assert api.call_op(call.x, call.conv, None, "relu", "auto").dtype == torch.float32


def _bad(name: str) -> tuple[dict[str, object], type[Exception], str]:
    vector = torch.ones(5)
    return {
        "rank": ({"x": torch.randn(3, 3)}, ValueError, r"x: got shape \(3, 3\)"),
        "channels": ({"x": torch.randn(1, 9, 8, 8)}, ValueError, r"x: the input has 9 channels.*needs 16"),
        "dtypes": ({"x": torch.randn(1, 16, 8, 8).double()}, TypeError, r"weight: got torch.float32 .*autocast"),
        "integers": ({"x": torch.ones(1, 16, 8, 8, dtype=torch.int32)}, TypeError, r"x: got torch.int32"),
        "residual": ({"residual": torch.randn(1, 16, 7, 8)}, ValueError, r"residual: got shape .*\(1, 16, 8, 8\)"),
        "residual_dtype": ({"residual": torch.randn(1, 16, 8, 8).double()}, TypeError, r"residual: got torch.float64"),
        "device": ({"residual": torch.empty(1, 16, 8, 8, device="meta")}, ValueError, r"residual.* meta .*one device"),
        "vector": ({"bn_weight": vector}, ValueError, r"bn_weight: got shape \(5,\), need \(16,\)"),
        "statistics": ({"running_mean": None}, (ValueError, TypeError, RuntimeError), r"running_mean"),
        "groups": ({"groups": 3}, ValueError, r"groups: got 3"),
        "stride": ({"stride": 0}, ValueError, r"stride: got \(0, 0\)"),
        "triple": ({"stride": (1, 1, 1)}, ValueError, r"stride: got \(1, 1, 1\)"),
        "padding": ({"padding": -1}, ValueError, r"padding: got \(-1, -1\)"),
        "padding_name": ({"padding": "full"}, ValueError, r"padding: got 'full'"),
        "too_small": ({"x": torch.randn(1, 16, 1, 1), "padding": 0}, ValueError, r"x: got an image of 1x1, too small"),
        "act": ({"act": "gelu"}, ValueError, r"act: got 'gelu'"),
        "backend": ({"backend": "magic"}, ValueError, r"backend: got 'magic', need 'auto' or one of"),
    }[name]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name",
    ["rank", "channels", "dtypes", "integers", "residual", "residual_dtype", "device", "vector", "statistics",
     "groups", "stride", "triple", "padding", "padding_name", "too_small", "act", "backend"],
)  # fmt: skip
def test_bad_input_is_named(name: str) -> None:
    changes, error, message = _bad(name)
    call = ConvCase(1, 16, 8, 8, 16, kernel=3, padding=1).make(torch.float32)
    arguments = {"x": call.x, **call.conv._asdict(), **changes}
    arguments = {"padding": 1, **arguments}
    with pytest.raises(error, match=message):
        functional.conv_bn_act(**arguments)  # type: ignore[arg-type]


def test_a_backend_that_cannot_says_why_and_what_would_do() -> None:
    call = ConvCase(1, 16, 8, 8, 16).make(torch.float32)
    with pytest.raises(backends.BackendError, match=r"backend='cudnn' cannot run .*CUDA.*Use backend='auto' or one of"):
        functional.conv_bn_act(call.x, call.conv.weight, *call.conv[2:6], backend="cudnn")
