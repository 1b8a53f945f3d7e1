"""The Triton kernels against the float64 reference: in Triton's interpreter where there is no GPU, else on the GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import devices
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import resnet_fused.functional as rf
from resnet_fused import backends
from resnet_fused.ops.add_relu import triton as add_relu
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.conv_bn_act import reference, triton
from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.ops.conv_bn_act import triton_kernels as kernels
from resnet_fused.ops.conv_bn_act.triton_config import ConvConfig
from resnet_fused.ops.convbn import ConvBNActCall, short_dtype
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import CONV_CASES, ConvCase, double

DEVICE = devices.DEVICE
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SENTINEL = 777.0

# The interpreter computes with NumPy, which warns of what the tests do on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    *devices.PREFERRED,
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(call: ConvBNActCall, config: ConvConfig | None = None) -> None:
    """The call's result is within the budget, and channels_last."""
    out = triton.run(call, config)
    assert out.permute(0, 2, 3, 1).is_contiguous()
    assert_within_budget(out, reference.run(call), reference.run(double(call)))


def kinds(call: ConvBNActCall) -> list[ConvConfig]:
    """One config of each kind of kernel that takes the call: the one with the smallest tile."""
    found: dict[tuple[str, bool], ConvConfig] = {}
    for config in sorted(triton.configs(call), key=lambda c: (c.block_m * c.block_n, c.split_k)):
        found.setdefault((config.kernel, config.split_k > 1), config)
    return list(found.values())


@pytest.mark.minimum
@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("case", CONV_CASES, ids=ConvCase.id)
def test_every_case_by_every_kind_of_kernel(case: ConvCase, dtype: torch.dtype) -> None:
    call = case.make(dtype, DEVICE)
    for config in kinds(call):
        check(call, config)


# Several tiles in each direction with tails, every kind of epilogue, reductions long enough to be split.
CONFIG_CASES = (
    ConvCase(1, 72, 8, 10, 136, residual=True),
    ConvCase(1, 40, 8, 9, 72, kernel=3, padding=1, residual=True, bias=True),
    ConvCase(2, 24, 11, 7, 80, kernel=3, stride=2, padding=1, act="none", affine=False),
    ConvCase(1, 24, 7, 7, 40, kernel=3, padding=1, groups=2),
    ConvCase(1, 72, 3, 4, 40, kernel=3, padding=1, residual=True),
    ConvCase(1, 3, 12, 14, 40, kernel=7, stride=2, padding=3),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("case", CONFIG_CASES, ids=ConvCase.id)
def test_every_shipped_config(case: ConvCase, dtype: torch.dtype) -> None:
    call = case.make(dtype, DEVICE)
    eager, exact = reference.run(call), reference.run(double(call))
    for config in triton.configs(call):
        assert_within_budget(triton.run(call, config), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
def test_the_cases_take_every_shipped_config(dtype: torch.dtype) -> None:
    taken = {config for case in CONFIG_CASES for config in triton.configs(case.make(dtype, DEVICE))}
    shipped = set(cfg.shipped(dtype, triton._precision(dtype)))
    if DEVICE == "cuda":
        shipped = {c for c in shipped if cfg.fits(c, dtype, cfg.architecture(torch.cuda.current_device()))}
    assert taken == shipped


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter multiplies exactly whatever the precision")
@pytest.mark.parametrize("case", CONFIG_CASES[1:4], ids=ConvCase.id)
def test_the_configs_without_tf32(case: ConvCase) -> None:
    saved = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        call = case.make(torch.float32)
        assert set(triton.configs(call)) <= set(cfg.POINTER_IEEE)
        eager, exact = reference.run(call), reference.run(double(call))
        for config in triton.configs(call):
            assert_within_budget(triton.run(call, config), eager, exact)
    finally:
        torch.backends.cudnn.conv.fp32_precision = saved


# The convolutions of the ResNets, at a fraction of their channels and pixels.
RESNET_CASES = {
    "stem": ConvCase(1, 3, 32, 32, 16, kernel=7, stride=2, padding=3),
    "basic-3x3": ConvCase(1, 32, 14, 14, 32, kernel=3, padding=1, residual=True),
    "basic-3x3s2": ConvCase(1, 32, 14, 14, 64, kernel=3, stride=2, padding=1),
    "bottleneck-reduce": ConvCase(1, 64, 14, 14, 16),
    "bottleneck-expand": ConvCase(1, 16, 14, 14, 64, residual=True),
    "v1-reduce-s2": ConvCase(1, 64, 14, 14, 32, stride=2),
    "projection": ConvCase(1, 32, 14, 14, 64, stride=2, act="none"),
    "resnext-3x3-4-per-group": ConvCase(1, 32, 14, 14, 32, kernel=3, padding=1, groups=8),
    "resnext-3x3s2-8-per-group": ConvCase(1, 64, 14, 14, 64, kernel=3, stride=2, padding=1, groups=8),
    "wide-3x3": ConvCase(1, 128, 7, 7, 64, kernel=3, padding=1),
    "stage5-3x3": ConvCase(1, 256, 7, 7, 64, kernel=3, padding=1, residual=True),
    "stage5-dilated": ConvCase(1, 64, 7, 7, 64, kernel=3, padding=2, dilation=2),
    "cifar-3x3": ConvCase(2, 16, 16, 16, 16, kernel=3, padding=1, residual=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("name", RESNET_CASES)
def test_resnet_layers_through_the_public_op(name: str, dtype: torch.dtype) -> None:
    call = RESNET_CASES[name].make(dtype, DEVICE)
    conv = call.conv
    out = rf.conv_bn_act(
        call.x, conv.weight, conv.bn_weight, conv.bn_bias, conv.running_mean, conv.running_var, conv.eps,
        call.residual, bias=conv.bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, act=call.act, backend="triton",
    )  # fmt: skip
    eager = reference.run(call)
    assert out.stride() == eager.stride()
    assert_within_budget(out, eager, reference.run(double(call)))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("case", CONFIG_CASES, ids=ConvCase.id)
def test_nan_and_infinity(case: ConvCase, dtype: torch.dtype) -> None:
    call = case.make(dtype, DEVICE)
    call.x[0, 1, 1, 3] = math.nan
    call.x[0, -1, -1, 0] = math.inf
    call.x[-1, 0, -1, -1] = -math.inf
    if call.residual is not None:
        for i, value in enumerate((math.nan, math.inf, -math.inf)):
            call.residual[0, i, 1, 1] = value
    exact = reference.run(double(call))
    # oneDNN's half-precision convolutions spread NaN over whole rows: the reference says where it belongs.
    eager = reference.run(call) if dtype == torch.float32 else exact.to(dtype)
    assert eager.isnan().any()
    assert eager.isinf().any()
    for config in kinds(call):
        assert_within_budget(triton.run(call, config), eager, exact)


def test_an_infinite_weight_reaches_its_own_tap_alone() -> None:
    """Channels past the last are zeros on both sides of the product: next to an infinite weight they would be NaN."""
    call = ConvCase(1, 24, 6, 6, 16, kernel=3).make(torch.float32, DEVICE)
    call.conv.weight[3, 0, 1, 1] = math.inf
    for config in kinds(call):
        assert_within_budget(triton.run(call, config), reference.run(call), reference.run(double(call)))


def _views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors equal to x that lie in memory in other ways."""
    n, c, h, w = x.shape
    shifted = x.new_full((x.numel() + 9,), SENTINEL)
    misaligned = shifted[1 : 1 + x.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
    wider = x.new_full((n, h, w + 2, c + 8), SENTINEL)
    slice_of_channels = wider[:, :, 1 : w + 1, 8:].permute(0, 3, 1, 2)
    odd = x.new_full((n, 2 * h, 3 * w, c + 3), SENTINEL)[:, 1::2, ::3, 2 : c + 2].permute(0, 3, 1, 2)
    for view in (misaligned, slice_of_channels, odd):
        view.copy_(x)
    return {
        "contiguous": x.contiguous(memory_format=torch.contiguous_format),
        "misaligned": misaligned,
        "slice": slice_of_channels,
        "odd": odd,
        "batch-last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize("view", ["contiguous", "misaligned", "slice", "odd", "batch-last"])
@pytest.mark.parametrize("case", CONFIG_CASES, ids=ConvCase.id)
def test_views(case: ConvCase, view: str) -> None:
    call = case.make(torch.bfloat16, DEVICE)
    other = call._replace(
        x=_views(call.x)[view],
        conv=call.conv._replace(weight=_views(call.conv.weight)[view]),
        residual=None if call.residual is None else _views(call.residual)[view],
    )
    for config in kinds(other):
        check(other, config)
    if view == "misaligned":
        assert all(config.kernel != "descriptor" for config in triton.configs(other))
    if view == "slice" and case.groups == 1 and call.x.shape[1] >= 16:  # fewer channels have no descriptors at all
        only_x = call._replace(x=other.x)  # its strides still suit descriptors
        assert "descriptor" in {config.kernel for config in kinds(only_x)} or DEVICE == "cuda"
        for config in kinds(only_x):
            check(only_x, config)


def test_expanded_batch_and_odd_vectors() -> None:
    call = ConvCase(1, 16, 6, 7, 24, kernel=3, padding=1).make(torch.bfloat16, DEVICE)
    call = call._replace(x=call.x.expand(3, -1, -1, -1))
    conv = call.conv._replace(
        running_mean=torch.randn(24, 2, device=DEVICE)[:, 1],
        running_var=torch.rand(1, device=DEVICE).expand(24) + 0.5,
        bn_weight=torch.rand(24, device=DEVICE) + 0.5,
        bn_bias=torch.randn(24, device=DEVICE),
    )
    call = call._replace(conv=conv)
    for config in kinds(call):
        check(call, config)


@pytest.mark.parametrize("case", [*CONFIG_CASES, CONV_CASES[2]], ids=ConvCase.id)
def test_nothing_is_written_beside_the_output(case: ConvCase, monkeypatch: pytest.MonkeyPatch) -> None:
    call = case.make(torch.float32, DEVICE)
    buffers: list[torch.Tensor] = []

    def fenced(count: int, shape: tuple[int, ...], **options: object) -> torch.Tensor:
        buffer = torch.full((count + 512,), SENTINEL, dtype=torch.float32, device=DEVICE)
        buffers.append(buffer)
        inside = buffer[256 : 256 + count].view(shape)
        return inside.fill_(math.nan)

    expected = {config: triton.run(call, config) for config in kinds(call)}
    empty = torch.empty
    for config, want in expected.items():
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", lambda self, shape, **o: (
                empty(shape, dtype=self.dtype, device="cpu") if o else fenced(math.prod(shape), shape)
            ))  # fmt: skip
            patch.setattr(torch, "empty", lambda shape, **o: fenced(math.prod(shape), shape))
            got = triton.run(call, config)
        assert torch.equal(got, want)
    assert len(buffers) >= len(expected)
    for buffer in buffers:
        assert (buffer[:256] == SENTINEL).all()
        assert (buffer[-256:] == SENTINEL).all()


def test_results_repeat_bit_for_bit() -> None:
    call = ConvCase(1, 256, 5, 5, 32, kernel=3, padding=1).make(torch.float16, DEVICE)
    for config in kinds(call):
        assert torch.equal(triton.run(call, config), triton.run(call, config))


@pytest.mark.parametrize("case", CONFIG_CASES, ids=ConvCase.id)
def test_wide_offsets_give_the_same_result(case: ConvCase, monkeypatch: pytest.MonkeyPatch) -> None:
    call = case.make(torch.bfloat16, DEVICE)
    narrow = {config: triton.run(call, config) for config in kinds(call)}
    monkeypatch.setattr(triton, "_NARROW_SPAN", 0)
    for config, want in narrow.items():
        assert torch.equal(triton.run(call, config), want)


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves 4 GiB of memory that only the CPU gives without backing it")
@pytest.mark.parametrize("kernel", [1, 3])
def test_offsets_pass_two_to_the_31(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images that lie 2³¹ elements apart; nothing between them is touched."""
    case = ConvCase(2, 16, 5, 5, 16, kernel=kernel, padding=kernel // 2)
    call = case.make(torch.float16)
    far = torch.from_numpy(np.zeros(2**31 + 1024, dtype=np.float16))
    x = far.as_strided((2, 16, 5, 5), (2**31, 1, 80, 16))
    x.copy_(call.x)
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, other: self)  # the interpreter's copy back
    for config in kinds(call):
        if config.kernel == "pointer":
            out = triton.run(call._replace(x=x), config)
            assert torch.equal(out, triton.run(call, config))


def test_large_outputs_take_wide_offsets() -> None:
    x = torch.empty(1, device="meta").expand(1, 1, 1, 8)
    operands = triton.Operands(x, x, None, x, x)
    out = torch.empty(1, device="meta").expand(2**27, 8)
    assert not triton._wide(operands, out, 1)
    assert triton._wide(operands, out, 2)
    assert triton._wide(operands._replace(x=x.expand(2, 1, 1, 8).as_strided((2, 1, 1, 8), (2**30, 8, 8, 1))), x, 1)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_small_problem(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    kernel = (draw(1, 4), draw(1, 4))
    dilation, padding = draw(1, 2), draw(0, 3)
    least = [max(1, dilation * (size - 1) + 1 - 2 * padding) for size in kernel]
    case = ConvCase(
        draw(1, 3), groups * draw(1, 20), least[0] + draw(0, 7), least[1] + draw(0, 7), groups * draw(1, 20), kernel,
        draw(1, 3), padding, dilation, groups, data.draw(st.booleans()), data.draw(st.sampled_from(["relu", "none"])),
        data.draw(st.booleans()), data.draw(st.booleans()),
    )  # fmt: skip
    dtype = data.draw(st.sampled_from(DTYPES))
    call = case.make(dtype, DEVICE, channels_last=data.draw(st.booleans()), seed=draw(0, 99))
    check(call, data.draw(st.sampled_from(triton.configs(call))))


def test_stride_2_by_descriptors_for_every_parity() -> None:
    for height, width, kernel, padding in [(2, 3, 3, 1), (5, 4, 3, 0), (6, 7, 1, 0), (5, 6, 2, 1), (4, 9, 5, 2)]:
        for dilation in (1, 2):
            if dilation * (kernel - 1) + 1 > min(height, width) + 2 * padding:
                continue
            case = ConvCase(1, 8, height, width, 8, kernel, 2, padding, dilation)
            call = case.make(torch.bfloat16, DEVICE)
            for config in triton.configs(call)[-1:]:
                check(call, config)


def test_pixel_tile_covers_without_waste_where_it_can() -> None:
    assert cfg.pixel_tile(8, 28, 28, 128) == (8, 4, 4)
    assert cfg.pixel_tile(2, 56, 56, 128) == (2, 8, 8)
    for n, p, q in [(1, 7, 7), (5, 14, 13), (256, 1, 1), (3, 224, 1)]:
        for block_m in (64, 128, 256):
            assert math.prod(cfg.pixel_tile(n, p, q, block_m)) == block_m


def _h200(capability: int = 90) -> cfg.Architecture:
    return cfg.Architecture(capability, 132, cfg.shared_limit(capability))


def _problem(n: int, c: int, k: int, size: int, taps: int, describable: bool = True) -> cfg.Problem:
    r = math.isqrt(taps)
    pad = (r // 2, r // 2)
    return cfg.Problem(torch.bfloat16, "tf32", n, c, k, size, size, (r, r), (1, 1), pad, (1, 1), 1, r == 1, describable)


def test_the_static_choice() -> None:
    """Large batches go to descriptors where there are any; a batch of one in stage 5 has its reduction split."""
    assert cfg.choose(_problem(128, 64, 64, 56, 9), _h200()).kernel == "descriptor"
    assert cfg.choose(_problem(128, 64, 64, 56, 9, describable=False), _h200()).kernel == "pointer"
    assert cfg.choose(_problem(128, 64, 64, 56, 9), _h200(80)).kernel == "pointer"
    assert cfg.choose(_problem(1, 512, 512, 7, 9), _h200()).split_k > 1
    for n in (1, 8, 256):
        for c, k, size, taps in [(64, 64, 56, 1), (256, 64, 56, 1), (128, 128, 28, 9), (512, 2048, 7, 1)]:
            for capability in (80, 86, 90, 100):
                problem = _problem(n, c, k, size, taps)
                assert cfg.choose(problem, _h200(capability)) in cfg.valid(problem, _h200(capability))


def test_a_config_that_does_not_fit_is_refused() -> None:
    call = ConvCase(1, 16, 4, 4, 16, kernel=3, padding=1, groups=2).make(torch.bfloat16, DEVICE)
    with pytest.raises(ValueError, match="config: got descriptor"):
        triton.run(call, cfg.DESCRIPTOR_HALF[0])


def test_float64_is_refused() -> None:
    call = CONV_CASES[0].make(torch.float64, DEVICE)
    assert "fp64" in str(triton.supports(call))
    with pytest.raises(backends.BackendError, match="fp64"):
        rf.add_relu(call.x, call.x, backend="triton")


def test_empty_batch() -> None:
    call = ConvCase(1, 8, 5, 5, 16).make(torch.bfloat16, DEVICE)
    conv = call.conv
    out = rf.conv_bn_act(
        call.x[:0], conv.weight, None, None, conv.running_mean, conv.running_var, backend="triton"
    )  # fmt: skip
    assert out.shape == (0, 16, 5, 5)
    assert rf.add_relu(call.x[:0], call.x[:0], backend="triton").shape == (0, 8, 5, 5)


def test_float32_follows_either_of_pytorchs_flags() -> None:
    conv = torch.backends.cudnn.conv
    saved = conv.fp32_precision
    try:
        for value, want in [("ieee", "ieee"), ("tf32", "tf32")]:
            conv.fp32_precision = value
            assert triton._precision(torch.float32) == want
            assert triton._precision(torch.float16) == "tf32"
    finally:
        conv.fp32_precision = saved
    allowed = torch.backends.cudnn.allow_tf32
    try:
        for flag in (False, True):
            torch.backends.cudnn.allow_tf32 = flag
            assert triton._precision(torch.float32) == ("tf32" if flag else "ieee")
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def test_the_kernels_are_interpreted_where_there_is_no_gpu() -> None:
    assert kernels.INTERPRETING.value is (DEVICE == "cpu")


ADD_LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "contiguous": lambda t: t.contiguous(),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_full((1,), SENTINEL), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("left", ADD_LAYOUTS)
@pytest.mark.parametrize("right", ADD_LAYOUTS)
def test_add_relu_layouts(left: str, right: str, dtype: torch.dtype) -> None:
    a, b = (torch.randn(3, 5, 7, 11, device=DEVICE).to(dtype) for _ in range(2))
    a, b = ADD_LAYOUTS[left](a), ADD_LAYOUTS[right](b)
    eager = torch.relu(a + b)
    out = rf.add_relu(a, b, backend="triton")
    assert out.stride() == eager.stride()
    assert_within_budget(out, eager, torch.relu(a.double() + b.double()))  # the interpreter cuts bfloat16 off


def test_add_relu_keeps_nan_and_infinity_and_takes_any_rank() -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, -1.0, -0.0, 2.0], device=DEVICE)
    a, b = special.repeat(6), special.repeat_interleave(6)
    for dtype in DTYPES:
        out, eager = (f(a.to(dtype), b.to(dtype)) for f in (_triton_add, lambda a, b: torch.relu(a + b)))
        torch.testing.assert_close(out, eager, rtol=0, atol=0, equal_nan=True)
    for shape in [(), (1,), (4097,), (2, 3, 5), (1, 2, 1, 3, 1)]:
        a = torch.randn(shape, device=DEVICE)
        assert torch.equal(_triton_add(a, a), torch.relu(a + a))


def test_add_relu_writes_nothing_beside_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.full((512,), SENTINEL, device=DEVICE)
    monkeypatch.setattr(torch, "empty_strided", lambda *_, **__: buffer[101:138])
    monkeypatch.setattr(add_relu, "_strides", lambda *_: (1,))
    a = torch.randn(37, device=DEVICE)
    assert torch.equal(add_relu.run(AddReLUCall(a, -2 * a)), torch.relu(-a))
    assert (buffer[:101] == SENTINEL).all()
    assert (buffer[138:] == SENTINEL).all()


def _triton_add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return rf.add_relu(a, b, backend="triton")
