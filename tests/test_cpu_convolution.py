"""The compiled library's convolutions on the CPU: values, edges, NaN, memory, threads, refusals."""

from __future__ import annotations

import copy
import dataclasses

import optional
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.ops import cpu_convolution, packed, workspace
from resnet_fused.ops.conv_bn_act import api, reference
from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.ops.cpu_convolution import Convolution, Method
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase, double, in_format

optional.needs_the_library()

FLOAT, HALF = torch.float32, torch.bfloat16
DIRECT, WINOGRAD, UNPACKED = Method

# What this CPU can run: method, dtype, instructions.
_ISAS = {"avx512": ("avx512", "avx2"), "avx2": ("avx2",), "": ()}[cpu_convolution.instructions()]
WAYS = [(method, FLOAT, isa) for method in Method for isa in _ISAS]
if cpu_convolution.instructions(bf16=True):
    WAYS += [(method, HALF, "avx512bf16") for method in Method]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0].name}-{way[2]}".lower())

Way = tuple[Method, torch.dtype, str]

BOTH = (
    ConvCase(1, 16, 9, 8, 32, kernel=3, padding=1),
    ConvCase(2, 48, 7, 11, 96, kernel=3, padding=1, residual=True),
    ConvCase(3, 64, 8, 8, 64, kernel=3, padding=1, residual=True, act="none", bias=True),
    ConvCase(1, 32, 10, 9, 32, kernel=3, affine=False, bias=True),
    ConvCase(1, 16, 5, 3, 32, kernel=3, padding=3, act="none"),
    ConvCase(1, 16, 1, 33, 32, kernel=3, padding=1, residual=True),
    ConvCase(2, 256, 14, 14, 256, kernel=3, padding=1),
    ConvCase(3, 512, 7, 7, 512, kernel=3, padding=1, residual=True),
)
DIRECT_ALONE = (
    ConvCase(2, 3, 33, 30, 64, kernel=7, stride=2, padding=3),
    ConvCase(2, 64, 9, 9, 32),
    ConvCase(1, 1, 9, 9, 32, kernel=3, padding=1),
    ConvCase(1, 7, 9, 9, 32, bias=True, residual=True),
    ConvCase(2, 64, 9, 10, 32, stride=2, act="none"),
    ConvCase(1, 48, 12, 11, 64, kernel=3, stride=2, padding=1, residual=True),
    ConvCase(2, 20, 9, 13, 32, kernel=3, padding=2, dilation=2),
    ConvCase(1, 20, 8, 9, 32, kernel=2, padding=1, stride=2),
    ConvCase(1, 2048, 7, 7, 512),
    ConvCase(1, 1024, 2, 2, 2048, residual=True),
)
CASES = [(way, case) for way in WAYS for case in (BOTH if way[0] is WINOGRAD else BOTH + DIRECT_ALONE)]


def run(call: ConvBNActCall, way: Way, out: Tensor | None = None) -> Tensor:
    method, _, isa = way
    return cpu_convolution.run(call, method, isa, out)


def assert_right(call: ConvBNActCall, out: Tensor) -> None:
    other = reference.run(in_format(call, torch.contiguous_format))
    assert_within_budget(out, reference.run(call), reference.run(double(call)), other)


@pytest.mark.minimum
@pytest.mark.parametrize(
    ("way", "case"), CASES, ids=lambda v: v.id() if isinstance(v, ConvCase) else f"{v[0].name}-{v[2]}"
)
def test_cases(way: Way, case: ConvCase) -> None:
    call = case.make(way[1])
    assert_right(call, run(call, way))
    # One that it cannot get right by chance: a single one goes through every filter tap and reaches no other image.
    call.x.zero_()
    call.x[-1, case.c // 2, case.h // 2, case.w // 2] = 1
    assert_right(call, run(call, way))


@given(data=st.data())
def test_any_size(data: st.DataObject) -> None:
    draw = data.draw
    way = draw(st.sampled_from(WAYS))
    direct, rounds = way[0] is not WINOGRAD, way[:2] == (WINOGRAD, HALF)
    size = st.integers(6, 18) if rounds else st.integers(3, 18)
    case = ConvCase(
        n=draw(st.integers(1, 3)),
        c=draw(st.integers(1, 40)) if direct else 16 * draw(st.integers(4, 6) if rounds else st.integers(1, 3)),
        h=draw(size),
        w=draw(size),
        k=512 if rounds else 32 * draw(st.integers(1, 3)),
        kernel=draw(st.sampled_from([1, 2, 3])) if direct else 3,
        stride=draw(st.integers(1, 3)) if direct else 1,
        dilation=draw(st.integers(1, 2)) if direct else 1,
        padding=draw(st.integers(1, 2)),
        residual=draw(st.booleans()),
        act=draw(st.sampled_from(["relu", "none"])),
    )
    call = case.make(way[1], seed=draw(st.integers(0, 99)))
    assert_right(call, run(call, way))


@every_way
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_nan_and_infinities_stand_where_eager_has_them(special: float, way: Way) -> None:
    for where in ("x", "residual"):
        call = ConvCase(2, 32, 9, 9, 32, kernel=3, padding=1, residual=True).make(way[1])
        tensor = call.x if where == "x" else call.residual
        assert tensor is not None
        tensor[1, 3, 4, 4] = special
        eager, out = reference.run(call), run(call, way)
        assert torch.equal(out.isnan(), eager.isnan()) and torch.equal(out.isinf(), eager.isinf())
        rounding = {FLOAT: 1e-5, HALF: 0.03}[way[1]]
        torch.testing.assert_close(out, eager, equal_nan=True, rtol=rounding, atol=rounding)


@every_way
def test_reads_and_writes_nothing_beside_its_tensors(way: Way) -> None:
    call = ConvCase(2, 32, 7, 9, 32, kernel=3, padding=1, residual=True).make(way[1])
    assert call.residual is not None

    def walled(tensor: Tensor) -> Tensor:
        """A copy in the middle of a buffer of NaN."""
        n, c, h, w = tensor.shape
        buffer = torch.full((n + 2, h, w, c), float("nan"), dtype=tensor.dtype)
        buffer[1:-1] = tensor.permute(0, 2, 3, 1)
        return buffer.permute(0, 3, 1, 2)[1:-1]

    out = walled(torch.zeros_like(call.residual))
    got = run(call._replace(x=walled(call.x), residual=walled(call.residual)), way, out)
    assert got.data_ptr() == out.data_ptr() and got.isfinite().all()
    assert torch.equal(got, run(call, way))
    around = out.as_strided((4, 7, 9, 32), (7 * 9 * 32, 9 * 32, 32, 1), 0)
    assert around[0].isnan().all() and around[-1].isnan().all()


FEW = ConvCase(2, 40, 2, 3, 64, kernel=3, stride=2, padding=1, residual=True)  # pixels: filters are read as they lie


@pytest.mark.parametrize("way", [way for way in WAYS if way[0] is UNPACKED], ids=lambda way: way[2])
@pytest.mark.parametrize("case", [*BOTH[1:4], *DIRECT_ALONE, FEW], ids=ConvCase.id)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_as_they_lie(memory_format: torch.memory_format, case: ConvCase, way: Way) -> None:
    call = case.make(way[1])
    call = call._replace(conv=call.conv._replace(weight=call.conv.weight.contiguous(memory_format=memory_format)))
    assert_right(call, run(call, way))


@pytest.mark.parametrize("way", [way for way in WAYS if way[0] is UNPACKED], ids=lambda way: way[2])
@pytest.mark.parametrize("case", [BOTH[0], DIRECT_ALONE[1], DIRECT_ALONE[3], FEW], ids=ConvCase.id)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_weights_as_they_lie_that_are_not_finite(special: float, case: ConvCase, way: Way) -> None:
    """The kernel says so where padding would meet them: eager does not multiply padding."""
    call = case.make(way[1])
    for at in (0, -1):
        call.conv.weight[at, at, at, at] = special
        step, out = Convolution(call.conv, UNPACKED), torch.empty_like(reference.run(call))
        out = out.contiguous(memory_format=torch.channels_last)
        op = torch.ops.resnet_fused_cpu.conv_bn_act
        answer = op(call.x, step.packed, step.geometry, call.residual, call.act == "relu", out, way[2])
        assert answer == (not any(call.conv.padding))
        call.conv.weight[at, at, at, at] = 1


@given(data=st.data())
def test_batch_norm_as_a_scale_and_an_offset(data: st.DataObject) -> None:
    draw = data.draw
    case = ConvCase(1, 1, 1, 1, draw(st.integers(0, 40)), affine=draw(st.booleans()), bias=draw(st.booleans()))
    conv = case.make(draw(st.sampled_from([FLOAT, HALF, torch.float64])), seed=draw(st.integers(0, 99))).conv
    conv = conv._replace(running_mean=conv.running_mean.repeat_interleave(2)[::2])
    found = torch.ops.resnet_fused_cpu.affine(*conv[1:6], conv.eps)
    for got, want in zip(found, packed.affine(conv, torch.float64), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-7)


def test_transformed_filters() -> None:
    weight = torch.randn(64, 48, 3, 3, generator=torch.Generator().manual_seed(0))
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    want = torch.einsum("ai,kcij,bj->kabc", g, weight.double(), g).reshape(2, 32, 16, 48).permute(0, 2, 3, 1).float()
    for one in (weight, weight.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(torch.ops.resnet_fused_cpu.winograd_filters(one), want)


@every_way
def test_any_number_of_threads_gives_the_same(way: Way) -> None:
    few = ConvCase(2, 128, 3, 3, 128, kernel=3, padding=1)  # filters larger than the images: channels are shared out
    for case in (ConvCase(3, 64, 10, 13, 128, kernel=3, padding=1, residual=True), few):
        call = case.make(way[1])
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 7, 64):
                torch.set_num_threads(threads)
                results.append(run(call, way))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


@every_way
def test_an_image_gives_the_same_alone_and_among_others(way: Way) -> None:
    call = ConvCase(3, 64, 10, 13, 128, kernel=3, padding=1).make(way[1])
    alone = run(call._replace(x=call.x[1:2]), way)
    assert torch.equal(run(call, way)[1:2], alone)


@every_way
def test_weights_are_packed_anew_after_a_write(way: Way) -> None:
    call = BOTH[0].make(way[1])
    before = run(call, way)
    with torch.no_grad():
        call.conv.weight.mul_(2)
    assert_right(call, run(call, way))
    assert not torch.equal(before, run(call, way))


def _values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Input whose values are far from being of one size, or of usual size."""
    n, c, h, w = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def chance(part: float, *size: int) -> Tensor:
        return torch.rand(*size, generator=generator) < part

    def student(freedom: int) -> Tensor:
        return normal(*shape) / (sum(normal(*shape) ** 2 for _ in range(freedom)) / freedom).sqrt()

    def only(where: tuple[object, ...]) -> Tensor:
        x = torch.zeros(shape)
        x[where] = normal(*x[where].shape)
        return x

    match kind:
        case "normal":
            return normal(*shape)
        case "post-ReLU":
            return normal(*shape).relu()
        case "Student's t, 2":
            return student(2)
        case "Cauchy":
            return student(1)
        case "one pixel":
            return only((-1, slice(None), h // 2, w // 2))
        case "corner pixel":
            return only((0, slice(None), 0, 0))
        case "one channel":
            return only((slice(None), c // 2))
        case "two channels of one size":
            x = torch.zeros(shape)
            x[:, :2] = 1 + torch.rand(n, 2, h, w, generator=generator)
            return x * torch.where(chance(0.5, *shape), 1, -1)
        case "alternating signs":
            return 1.37 * torch.where((torch.arange(h).view(h, 1) + torch.arange(w)) % 2 == 0, 1, -1).expand(shape)
        case "alternating channels":
            return 1.37 * torch.where(torch.arange(c).view(c, 1, 1) % 2 == 0, 1, -1).expand(shape)
        case "denormal":
            return normal(*shape) * 1e-39
        case "tiny":
            return normal(*shape) * 1e-30
        case "large":
            return normal(*shape) * 1e18
        case "large pixels":
            return normal(*shape) * torch.where(chance(0.1, n, 1, h, w), 1e4, 1)
        case "large channels":
            return normal(*shape) * torch.where(chance(0.02, 1, c, 1, 1), 1e3, 1)
        case "four fifths zero":
            return normal(*shape) * chance(0.2, *shape)
        case "mostly zero":
            return normal(*shape).relu() * chance(0.1, *shape)
        case "zero pixels":
            return normal(*shape).relu() * chance(0.1, n, 1, h, w)
        case "log-normal":
            return (1.5 * normal(*shape)).exp()
        case "far from zero":
            return 100 + normal(*shape)
    raise ValueError(kind)


BALANCED = ("normal", "post-ReLU", "alternating signs", "alternating channels", "four fifths zero", "far from zero")
UNBALANCED = ("Student's t, 2", "Cauchy", "one pixel", "corner pixel", "one channel", "two channels of one size",
              "denormal", "large pixels", "zero pixels", "log-normal")  # fmt: skip
VALUES = (*BALANCED, *UNBALANCED, "tiny", "large", "large channels", "mostly zero")
# Where Winograd may be chosen in every dtype.
WIDE = (
    ConvCase(1, 256, 14, 14, 256, kernel=3, padding=1),
    ConvCase(1, 128, 10, 10, 256, kernel=3, padding=1, residual=True),
    ConvCase(2, 64, 17, 16, 96, kernel=3, padding=1, affine=False),
    ConvCase(1, 512, 7, 7, 512, kernel=3, padding=1, act="none"),
)


def with_values(case: ConvCase, kind: str, dtype: torch.dtype, seed: int, scale: float = 1) -> ConvBNActCall:
    generator = torch.Generator().manual_seed(seed)
    x = scale * _values(kind, (case.n, case.c, case.h, case.w), generator)
    return case.make(dtype, seed=seed)._replace(x=x.to(dtype).contiguous(memory_format=torch.channels_last))


@every_way
@pytest.mark.parametrize("kind", VALUES)
def test_values_of_any_distribution_stay_within_the_budget(kind: str, way: Way) -> None:
    for seed, case in enumerate(WIDE):
        for scale in (1, 50):  # 50: batch norm's offset does not hide the sum's error
            call = with_values(case, kind, way[1], seed, scale)
            assert_right(call, run(call, way))


@pytest.mark.parametrize("way", [way for way in WAYS if way[0] is WINOGRAD], ids=lambda way: way[2])
def test_winograd_leaves_unbalanced_input_to_the_direct_sum(way: Way) -> None:
    case = ConvCase(2, 64, 15, 14, 96, kernel=3, padding=1)
    out = torch.empty(2, 96, 15, 14, dtype=way[1]).to(memory_format=torch.channels_last)
    op = torch.ops.resnet_fused_cpu.conv_bn_act
    for kind in (*BALANCED, *UNBALANCED):
        call = with_values(case, kind, way[1], 1)
        convolution = Convolution(call.conv, WINOGRAD)
        answer = op(call.x, convolution.packed, convolution.geometry, None, True, out, way[2])
        assert answer == (kind in BALANCED), kind
    # A pixel that outweighs its neighbours matters where they are among the largest.
    call = with_values(case, "normal", way[1], 1)
    call.x[1, :, 8:, 8:] *= 0.01
    call.x[1, :, 11, 11] *= 20
    assert op(call.x, convolution.packed, convolution.geometry, None, True, out, way[2])
    call.x[1, :, 11, 11] *= 100
    assert not op(call.x, convolution.packed, convolution.geometry, None, True, out, way[2])


def filters_of_one(method: Method, c: int, k: int, dtype: torch.dtype) -> Tensor:
    """What the library takes for a 3x3 filter of ones."""
    if method is UNPACKED:
        return torch.ones(k, c, 3, 3, dtype=dtype)
    return torch.ones((16 if method is WINOGRAD else 9) * c * k, dtype=dtype)


@every_way
def test_sizes_of_zero(way: Way) -> None:
    """No output channels, no input channels (the sums are zero), no images, no pixels: each as eager has it."""
    method, dtype, isa = way
    for n, c, h, k in ((2, 32, 5, 0), (2, 0, 5, 32), (0, 32, 5, 32), (2, 32, 0, 32), (1, 0, 5, 0)):
        out = torch.full((n, k, h + 2, h + 2), float("nan"), dtype=dtype).to(memory_format=torch.channels_last)
        x = torch.ones(n, c, h, h, dtype=dtype).to(memory_format=torch.channels_last)
        scale, bias = torch.ones(k), torch.arange(k, dtype=torch.float32) - 3
        packed = [filters_of_one(method, c, k, dtype), scale, bias]
        geometry = [int(method), 3, 3, 1, 1, 2, 2, 1, 1]
        op = torch.ops.resnet_fused_cpu.conv_bn_act
        if not op(x, packed, geometry, None, False, out, isa):
            geometry[0] = int(DIRECT)
            assert op(x, [filters_of_one(DIRECT, c, k, dtype), scale, bias], geometry, None, False, out, isa)
        if c == 0 or h == 0:
            assert torch.equal(out, bias.to(dtype).view(1, k, 1, 1).expand_as(out))


@every_way
def test_tensors_at_any_address(way: Way) -> None:
    """What begins at an odd place in memory gives what it gives elsewhere."""
    call = ConvCase(2, 64, 9, 8, 32, kernel=3, padding=1, residual=True).make(way[1])
    assert call.residual is not None
    want = run(call, way)

    def shifted(tensor: Tensor, bytes_: int) -> Tensor:
        memory = torch.zeros(tensor.numel() * tensor.element_size() + bytes_, dtype=torch.uint8)
        moved = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=bytes_).as_strided(
            tensor.shape, tensor.stride()
        )
        return moved.copy_(tensor)

    for bytes_ in (1, 2, 4, 6):
        moved = call._replace(x=shifted(call.x, bytes_), residual=shifted(call.residual, bytes_))
        assert torch.equal(run(moved, way, shifted(want, bytes_)), want)


def method_for(case: ConvCase, dtype: torch.dtype = FLOAT) -> Method:
    call = case.make(dtype)
    return cpu_convolution.method_for(call.conv, dtype, call.x.shape)


def test_winograd_is_chosen_where_it_is_right_and_pays() -> None:
    for dtype in (FLOAT, HALF):
        assert method_for(ConvCase(1, 512, 7, 7, 512, kernel=3, padding=1), dtype) is WINOGRAD
        assert method_for(ConvCase(1, 512, 6, 6, 512, kernel=3, padding=1), dtype) is DIRECT  # 9 tiles, filters of 8 MB
    assert method_for(BOTH[1]) is WINOGRAD
    assert method_for(BOTH[1], HALF) is DIRECT  # rounding errors that do not average out
    assert method_for(ConvCase(8, 64, 8, 8, 64, kernel=3, padding=1), HALF) is DIRECT
    assert method_for(ConvCase(1, 24, 9, 9, 32, kernel=3, padding=1)) is DIRECT
    assert (
        method_for(ConvCase(9, 32, 1, 9, 32, kernel=3, padding=1)) is DIRECT
    )  # in a tile one pixel outweighs the rest
    assert {method_for(case) for case in DIRECT_ALONE} == {DIRECT}


BLOCKS = {
    "basic": lambda: rf.FusedBasicBlock(32, 32),
    "basic, projection": lambda: rf.FusedBasicBlock(32, 64, 2, projection(32, 64, 2)),
    "bottleneck": lambda: rf.FusedBottleneck(128, 32),
    "bottleneck, projection": lambda: rf.FusedBottleneck(64, 32, 2, projection(64, 128, 2)),
    "shortcut of another kind": lambda: rf.FusedBasicBlock(32, 32, 1, nn.MaxPool2d(1)),
}


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


@pytest.mark.minimum
@pytest.mark.parametrize("dtype", list(dict.fromkeys(way[1] for way in WAYS)), ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_one_call_of_the_library(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    block = BLOCKS[kind]().eval()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)
    for parameter in block.parameters():  # no gradients, so that the block runs as one
        parameter.requires_grad_(False)
    block.to(dtype)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(5, channels, 9, 7).to(dtype)
    eager = rf.unfuse(block)
    monkeypatch.setattr(workspace, "LARGEST_BUFFER", 2 * 9 * 7 * 128 * x.element_size())  # two images, two, and one
    block._rf_state = dataclasses.replace(block._rf_state, backend="cpu")
    with torch.no_grad():
        out = block(x)
        exact = copy.deepcopy(eager).double()(x.double())
        assert_within_budget(out, eager(x), exact, eager(x.contiguous(memory_format=torch.channels_last)))
        x[1, 3, 4, 4] = float("inf")
        torch.testing.assert_close(block(x), eager(x), equal_nan=True, rtol=0.05, atol=0.05)
        assert torch.equal(block(x).isnan(), eager(x).isnan())


REFUSED = {
    "one group, not 2": (ConvCase(1, 32, 9, 9, 32, kernel=3, groups=2, padding=1), FLOAT),
    "multiples of 32, got 48": (ConvCase(1, 32, 9, 9, 48, kernel=3, padding=1), FLOAT),
    "float32 and bfloat16, not torch.float16": (BOTH[0], torch.float16),
    "float32 and bfloat16, not torch.float64": (BOTH[0], torch.float64),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    case, dtype = REFUSED[reason]
    with pytest.raises(backends.BackendError, match=reason):
        api.compute(case.make(dtype), "cpu")


def test_unsound_calls_of_the_kernel_itself_are_refused() -> None:
    call = BOTH[0].make(FLOAT)
    out = torch.empty(1, 32, 9, 8).to(memory_format=torch.channels_last)
    op = torch.ops.resnet_fused_cpu.conv_bn_act
    for method in Method:
        convolution = Convolution(call.conv, method)
        packed, geometry = convolution.packed, convolution.geometry
        assert op(call.x, packed, geometry, None, True, out)
        filters, scale, bias = packed
        for name, arguments in {
            "x: its": (call.x.contiguous(), packed, geometry, None, True, out),
            "x: ": (call.x.double(), packed, geometry, None, True, out),
            "filters": (call.x, [filters.flatten()[:15], scale, bias], geometry, None, True, out),
            "out": (call.x, [filters, scale[:16], bias], geometry, None, True, out),
            "bias": (call.x, [filters, scale, bias[:16]], geometry, None, True, out),
            "packed": (call.x, [filters, scale], geometry, None, True, out),
            "geometry": (call.x, packed, [*geometry[:3], 0, *geometry[4:]], None, True, out),
            "no such method": (call.x, packed, [7, *geometry[1:]], None, True, out),
            "smaller than the filter": (call.x[:, :, :1, :1], packed, [*geometry[:5], 0, 0, 1, 1], None, True, out),
            "residual": (call.x, packed, geometry, out[:, :, 1:], True, out),
            "out: got": (call.x, packed, geometry, None, True, out[:, :, 1:]),
            "scale": (call.x, [filters, scale.double(), bias], geometry, None, True, out),
            "sse9": (call.x, packed, geometry, None, True, out, "sse9"),
        }.items():
            with pytest.raises(RuntimeError, match=name):
                op(*arguments)
