"""The CUDA kernels of conv_bn_act on the host runtime, against the float64 reference."""

from __future__ import annotations

import functools

import conv_calls
import pytest
import simt_harness
import torch
from conv_calls import Options

from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import CONV_CASES, ConvCase, double

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}

# The convolutions of ResNets, at reduced size.
RESNET_CASES = (
    ConvCase(1, 3, 32, 32, 64, kernel=7, stride=2, padding=3),
    ConvCase(2, 64, 7, 7, 64),
    ConvCase(1, 64, 14, 14, 64, kernel=3, padding=1),
    ConvCase(1, 64, 7, 7, 256, residual=True),
    ConvCase(1, 128, 14, 14, 128, kernel=3, stride=2, padding=1),
    ConvCase(1, 256, 14, 14, 128, stride=2, act="none"),
    ConvCase(1, 128, 7, 7, 128, kernel=3, padding=1, groups=32),
    ConvCase(1, 32, 9, 9, 32, kernel=3, padding=1, groups=32),
    ConvCase(1, 512, 4, 4, 64, kernel=3, padding=1, residual=True),
)


def check(call: ConvBNActCall, kind: str, options: Options, expect: str = "") -> None:
    """Run the call on the host and hold it against float64; eager in the kernel's arithmetic sets the budget."""
    options.tf32 = kind == "tf32"
    text, out = conv_calls.run(call, options)
    assert expect in text, text
    assert "bank conflicts 0\n" in text, text
    eager_call = call
    if kind == "tf32":
        weight = conv_calls.round_tf32(call.conv.weight)
        eager_call = call._replace(x=conv_calls.round_tf32(call.x), conv=call.conv._replace(weight=weight))
    assert_within_budget(out, reference.run(eager_call), reference.run(double(call)))


@functools.cache
def kernels() -> dict[str, tuple[int, ...]]:
    """name: (BM, BN, step, copy, threads) of every kernel in the list."""
    if simt_harness.missing_compiler():
        return {}
    lines = [line.split() for line in simt_harness.call("resnet_fused_host::list_kernels").text.splitlines()]
    return {line[0]: tuple(map(int, line[1:])) for line in lines}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", (*CONV_CASES, *RESNET_CASES), ids=lambda case: case.id())
def test_case(case: ConvCase, kind: str) -> None:
    check(case.make(KINDS[kind]), kind, Options())


KERNEL_NAMES = [
    *(f"{half}_{tile}" for half in ("bf16", "fp16")
      for tile in ("128x128", "128x64", "64x128", "64x64", "64x32", "64x32_c4", "128x64_c1", "64x32_c1")),
    *(f"tf32_{tile}" for tile in ("128x128", "128x64", "64x64", "64x32", "128x64_c1", "64x32_c1")),
    *(f"ieee_{tile}" for tile in ("128x128", "64x64", "64x32", "128x64_c1", "64x32_c1")),
]  # fmt: skip


def test_every_kernel_is_tried() -> None:
    assert sorted(KERNEL_NAMES) == sorted(kernels())


@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_kernel_with_tails(name: str, splits: int) -> None:
    """Every kernel with a full tile and a tail in each direction, and more steps than stages."""
    bm, bn, _, copy, _ = kernels()[name]
    channels = {8: 24, 4: 20, 1: 13}[copy]
    case = ConvCase(2, channels, 9, bm // 18 + 2, bn + bn // 2, kernel=3, padding=1, residual=True)
    kind = name.split("_")[0]
    check(case.make(KINDS[kind]), kind, Options(name, splits, seed=splits), f"kernel {name} ")


@pytest.mark.parametrize("seed", range(3))
def test_order_of_threads_does_not_matter(seed: int) -> None:
    call = CONV_CASES[4].make(torch.bfloat16)
    first = conv_calls.run(call, Options(splits=2))[1]
    assert torch.equal(first, conv_calls.run(call, Options(splits=2, seed=seed + 1))[1])


@pytest.mark.parametrize("splits", (1, 2))
@pytest.mark.parametrize("name", ("x", "weight", "residual", "out"))
@pytest.mark.parametrize("kind", KINDS)
def test_misaligned(kind: str, name: str, splits: int) -> None:
    dtype = KINDS[kind]
    case = ConvCase(1, 32, 6, 5, 32, kernel=3, padding=1, residual=True)
    check(case.make(dtype), kind, Options(splits=splits, shift={name: dtype.itemsize}))


@pytest.mark.parametrize("kind", KINDS)
def test_cropped_input(kind: str) -> None:
    """x is a view with gaps between its rows and pixels, and so is the weight."""
    case = ConvCase(2, 32, 9, 8, 24, kernel=3, padding=1)
    call = case.make(KINDS[kind])
    call = call._replace(x=call.x[:, 8:24, 1:8, 2:7], conv=call.conv._replace(weight=call.conv.weight[:, :16]))
    check(call, kind, Options())


@pytest.mark.parametrize("kind", ("bf16", "fp16"))
def test_float32_statistics(kind: str) -> None:
    """Vectors may be float32 beside a half type, each on its own."""
    call = ConvCase(1, 16, 5, 5, 16, bias=True).make(KINDS[kind])
    conv = call.conv
    for names in (("running_mean", "running_var"), ("bn_weight",), ("bn_bias", "bias")):
        vectors = {name: getattr(conv, name).float() + 1e-3 for name in names}
        call = call._replace(conv=conv._replace(**vectors))
        out = conv_calls.run(call, Options())[1]
        wide = double(call)
        assert_within_budget(out, reference.run(wide).to(out.dtype), reference.run(wide))


@pytest.mark.parametrize("splits", (1, 2))
@pytest.mark.parametrize("act", ("relu", "none"))
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinities(kind: str, act: str, splits: int) -> None:
    call = ConvCase(1, 32, 6, 6, 16, kernel=3, padding=1, residual=True, act=act).make(KINDS[kind])
    call.x[0, 3, 0, 0] = float("nan")
    call.x[0, 5, 5, 5] = float("inf")
    assert call.residual is not None
    call.residual[0, 2, 3, 0] = float("nan")
    call.residual[0, 2, 0, 4] = float("-inf")
    check(call, kind, Options(splits=splits))


def test_refusals_give_a_reason() -> None:
    call = CONV_CASES[0].make(torch.bfloat16)
    with pytest.raises(simt_harness.Refused, match="conv_bn_act by cuda: a pointer is not aligned to its element"):
        conv_calls.run(call, Options(shift={"x": 1}))
    with pytest.raises(simt_harness.Refused, match="conv_bn_act by cuda: the kernel asked for does not fit"):
        conv_calls.run(call, Options(kernel="fp16_64x64"))
