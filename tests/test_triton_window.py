"""The Triton kernel for stems, against the float64 reference: in the interpreter where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from resnet_fused import backends
from resnet_fused.ops.conv_bn_act import api, reference, triton, triton_window
from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.ops.convbn import ConvBNActCall, short_dtype
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase, double

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.skipif(backends.unavailable("triton") is not None, reason=str(backends.unavailable("triton"))),
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def configs(call: ConvBNActCall) -> list[cfg.ConvConfig]:
    return [config for config in triton.configs(call) if config.kernel == "window"]


def unit(call: ConvBNActCall) -> int:
    return triton._problem(call, triton._operands(call)).unit


def check(call: ConvBNActCall) -> None:
    eager, exact = reference.run(call), reference.run(double(call))
    found = configs(call)
    assert found
    for config in found:
        assert_within_budget(triton.run(call, config), eager, exact)


# (case, elements at a time): odd and even sides, tails in pixels and channels, filters of other shapes, every unit.
STEMS = {
    "resnet": (ConvCase(1, 3, 32, 32, 64, kernel=7, stride=2, padding=3), 2),
    "odd": (ConvCase(2, 3, 13, 11, 72, kernel=7, stride=2, padding=3, residual=True), 1),
    "odd-rows": (ConvCase(1, 3, 9, 14, 24, kernel=7, stride=2, padding=3, act="none"), 2),
    "grey": (ConvCase(1, 1, 16, 16, 40, kernel=7, stride=2, padding=3, bias=True), 2),
    "four-channels": (ConvCase(1, 4, 12, 12, 16, kernel=7, stride=2, padding=3), 8),
    "stride-1": (ConvCase(1, 2, 9, 8, 16, kernel=5, padding=2, affine=False), 2),
    "alexnet": (ConvCase(1, 3, 35, 36, 16, kernel=11, stride=4, padding=2), 4),
    "patches": (ConvCase(1, 3, 16, 24, 16, kernel=4, stride=4), 4),
    "wide-filter": (ConvCase(1, 3, 8, 18, 16, kernel=(3, 9), stride=2, padding=1), 2),
    "one-row": (ConvCase(3, 3, 1, 10, 16, kernel=(1, 7), stride=2, padding=3), 2),
    "one-pixel": (ConvCase(2, 3, 1, 1, 16, kernel=7, stride=2, padding=3), 1),
    "dilated-down": (ConvCase(1, 3, 12, 12, 16, kernel=(3, 1), padding=2, dilation=2), 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("name", STEMS)
def test_stems(name: str, dtype: torch.dtype) -> None:
    case, expected = STEMS[name]
    call = case.make(dtype, DEVICE)
    assert unit(call) == expected
    if expected:
        check(call)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter multiplies exactly whatever the precision")
def test_stems_without_tf32() -> None:
    conv = torch.backends.cudnn.conv
    saved = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        call = STEMS["odd"][0].make(torch.float32)
        assert set(configs(call)) == set(cfg.WINDOW_IEEE)
        check(call)
    finally:
        conv.fp32_precision = saved


@pytest.mark.parametrize("width", (12, 13))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_a_special_value_reaches_its_own_windows_alone(value: float, width: int) -> None:
    """Two elements are read at a time, of which one may be the pixel beside the window."""
    call = ConvCase(1, 3, 12, width, 16, kernel=7, stride=2, padding=3, act="none").make(torch.float32, DEVICE)
    for w in range(width):
        call.x.zero_()
        call.x[0, w % 3, 5, w] = value
        exact = reference.run(double(call))
        for config in configs(call)[-1:]:
            out = triton.run(call, config)
            assert torch.equal(out.isfinite(), exact.isfinite()), w


def _views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors equal to x that lie in memory in other ways, in buffers of NaN."""
    n, c, h, w = x.shape
    misaligned = x.new_full((x.numel() + 3,), math.nan)[1 : 1 + x.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
    gaps = x.new_full((n, h, w + 5, c), math.nan)[:, :, 2 : w + 2].permute(0, 3, 1, 2)
    every_second_row = x.new_full((n, 2 * h, w, c), math.nan)[:, ::2].permute(0, 3, 1, 2)
    pixels_apart = x.new_full((n, h, w, c + 1), math.nan)[..., :c].permute(0, 3, 1, 2)
    for view in (misaligned, gaps, every_second_row, pixels_apart):
        view.copy_(x)
    return {
        "contiguous": x.contiguous(memory_format=torch.contiguous_format),
        "misaligned": misaligned,
        "gaps": gaps,
        "every-second-row": every_second_row,
        "pixels-apart": pixels_apart,
    }


@pytest.mark.parametrize("view", ["contiguous", "misaligned", "gaps", "every-second-row", "pixels-apart"])
def test_views(view: str) -> None:
    call = ConvCase(2, 3, 10, 12, 16, kernel=7, stride=2, padding=3).make(torch.bfloat16, DEVICE)
    call = call._replace(x=_views(call.x)[view])
    if view == "pixels-apart":  # a filter row is not in one piece: the pointer kernel takes it
        assert not configs(call)
        assert_within_budget(triton.run(call), reference.run(call), reference.run(double(call)))
    else:
        check(call)


def test_expanded_batch() -> None:
    call = ConvCase(1, 3, 9, 10, 16, kernel=7, stride=2, padding=3).make(torch.float16, DEVICE)
    check(call._replace(x=call.x.expand(3, -1, -1, -1)))


def test_wide_offsets_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ConvCase(2, 3, 9, 10, 16, kernel=7, stride=2, padding=3, residual=True).make(torch.float16, DEVICE)
    narrow = {config: triton.run(call, config) for config in configs(call)}
    monkeypatch.setattr(triton, "_NARROW_SPAN", 0)
    for config, want in narrow.items():
        assert torch.equal(triton.run(call, config), want)


def test_written_weights_are_padded_again() -> None:
    call = ConvCase(1, 3, 8, 8, 16, kernel=7, stride=2, padding=3).make(torch.float32, DEVICE)
    for _ in range(4):
        check(call)
    call.conv.weight.mul_(-2)
    check(call)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_small_stem(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kernel, padding = (draw(1, 7), draw(2, 7)), draw(0, 4)
    least = [max(1, size - 2 * padding) for size in kernel]
    case = ConvCase(
        draw(1, 2), draw(1, 6), least[0] + draw(0, 6), least[1] + draw(0, 6), draw(1, 40), kernel, draw(1, 4), padding,
        1, 1, data.draw(st.booleans()), data.draw(st.sampled_from(["relu", "none"])), data.draw(st.booleans()),
        data.draw(st.booleans()),
    )  # fmt: skip
    call = case.make(
        data.draw(st.sampled_from(DTYPES)), DEVICE, channels_last=data.draw(st.booleans()), seed=draw(0, 99)
    )
    config = data.draw(st.sampled_from(configs(call)))
    assert_within_budget(triton.run(call, config), reference.run(call), reference.run(double(call)))


def test_pieces_begin_where_two_elements_are_read_at_once() -> None:
    """7x7, stride 2, 3 channels: 21 terms behind one of lead, from element -10 on, in pieces of 24."""
    call = STEMS["resnet"][0].make(torch.bfloat16, DEVICE)
    assert triton_window.window(triton._problem(call, triton._operands(call))) == (2, 1, 21, 24)


def test_the_static_choice_takes_it_for_a_stem() -> None:
    arch = cfg.Architecture(90, 132, cfg.shared_limit(90))
    for n in (1, 32, 256):
        problem = cfg.Problem(
            torch.bfloat16, "tf32", n, 3, 64, 112, 112, (7, 7), (2, 2), (3, 3), (1, 1), 1, False, False, 2
        )
        assert cfg.choose(problem, arch).kernel == "window"
        assert cfg.choose(problem._replace(unit=0), arch).kernel == "pointer"


@pytest.mark.parametrize(
    ("case", "first"),
    [
        (ConvCase(1, 3, 16, 16, 64, kernel=7, stride=2, padding=3), "triton"),
        (ConvCase(1, 64, 8, 8, 16, kernel=5, padding=2), "reference"),
        (ConvCase(1, 4, 16, 16, 16, kernel=7, stride=2, padding=3, groups=2), "reference"),
        (ConvCase(1, 3, 16, 16, 16, kernel=7, padding=6, dilation=2), "reference"),
    ],
    ids=str,
)
def test_auto_gives_a_gpus_stems_to_triton(case: ConvCase, first: str) -> None:
    class OnGPU:
        device, dtype = torch.device("cuda"), torch.bfloat16

    assert api.candidates(OnGPU, case.make(torch.bfloat16).conv)[0] == first  # type: ignore[arg-type]
