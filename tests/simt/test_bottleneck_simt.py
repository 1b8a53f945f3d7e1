"""The CUDA kernels of bottleneck on the host runtime, against the float64 reference."""

from __future__ import annotations

import re
from dataclasses import dataclass

import bottleneck_calls
import pytest
import simt_harness
import torch
from bottleneck_calls import Options

from resnet_fused.ops.block import BlockCall, run_chain
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase, double

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """One bottleneck at a kernel's channels."""

    cin: int
    mid: int
    project: bool
    stride: int = 1

    def make(self, n: int, h: int, w: int, dtype: torch.dtype, bias: bool = False) -> BlockCall:
        def conv(c: int, k: int, kernel: int = 1, stride: int = 1, seed: int = 0) -> ConvBN:
            case = ConvCase(1, c, 1, 1, k, kernel=kernel, stride=stride, padding=kernel // 2, bias=bias)
            return case.make(dtype, seed=seed).conv

        mid, out = self.mid, 4 * self.mid
        convs = (conv(self.cin, mid, seed=1), conv(mid, mid, 3, self.stride, seed=2), conv(mid, out, seed=3))
        x = torch.randn(n, self.cin, h, w, generator=torch.Generator().manual_seed(4)).to(dtype)
        shortcut = conv(self.cin, out, stride=self.stride, seed=5) if self.project else None
        return BlockCall(x.contiguous(memory_format=torch.channels_last), convs, shortcut, None)


KERNELS = {
    "mid64_c256_resident": Problem(256, 64, False),
    "mid64_c256": Problem(256, 64, False),
    "mid64_c256_small": Problem(256, 64, False),
    "mid64_c64_project_resident": Problem(64, 64, True),
    "mid64_c64_project": Problem(64, 64, True),
    "mid64_c64_project_small": Problem(64, 64, True),
    "mid64_c256_project": Problem(256, 64, True),
    "mid128_c512": Problem(512, 128, False),
    "mid128_c512_small": Problem(512, 128, False),
    "mid128_c512_tight": Problem(512, 128, False),
    "mid128_c256_project": Problem(256, 128, True),
    "mid128_c256_project_small": Problem(256, 128, True),
    "mid128_c256_stride2": Problem(256, 128, True, 2),
    "mid128_c256_stride2_small": Problem(256, 128, True, 2),
}
# With stride 2 a row of the halo has an odd number of pixels, and two at its ends may share their banks: conflicts of a
# tile, of some 3000 stores.
CONFLICTS = {"mid128_c256_stride2": 126, "mid128_c256_stride2_small": 78}
TILES = {"mid128_c512": (28, 4), "mid128_c256_stride2": (7, 14), "mid128_c256_stride2_small": (7, 7)}


def eager(call: BlockCall) -> torch.Tensor:
    return run_chain(call, reference.run)


def exact(call: BlockCall) -> torch.Tensor:
    def wide(conv: ConvBN) -> ConvBN:
        return double(ConvBNActCall(call.x, conv, None, "relu")).conv

    shortcut = None if call.shortcut is None else wide(call.shortcut)
    return eager(BlockCall(call.x.double(), tuple(map(wide, call.convs)), shortcut, None))


def check(call: BlockCall, options: Options, expect: str = "") -> torch.Tensor:
    text, out = bottleneck_calls.run(call, options)
    assert expect in text, text
    found = re.search(r"kernel \w+?_(\w+) grid \d+ tiles (\d+)\nbank conflicts (\d+)\n", text)
    assert found and int(found[3]) == CONFLICTS.get(found[1], 0) * int(found[2]), text
    assert_within_budget(out, eager(call), exact(call))
    return out


def half_of(name: str) -> list[str]:
    """The dtypes that a kernel is tried in: they differ in one instruction, so fp16 need not see every tile."""
    return ["bf16", "fp16"] if name in ("mid64_c256", "mid64_c64_project", "mid128_c256_stride2_small") else ["bf16"]


@pytest.mark.parametrize(("dtype", "name"), [(dtype, name) for name in KERNELS for dtype in half_of(name)])
def test_kernel(dtype: str, name: str) -> None:
    """A full tile and ragged ones on its right, below it and across; each block goes through several tiles."""
    problem = KERNELS[name]
    small = name.endswith(("small", "tight"))
    h, w = [side * problem.stride + 1 for side in TILES.get(name, (8, 8) if small else (8, 16))]
    blocks = 1 if name in ("mid64_c256", "mid64_c256_resident") else 2
    options = Options(f"{dtype}_{name}", multiprocessors=blocks)
    check(problem.make(1, h, w, DTYPES[dtype]), options, f"kernel {dtype}_{name} ")


# Images of less than a tile, where every pixel lies at an edge, and even sides under stride 2.
@pytest.mark.parametrize(
    ("name", "h", "w"),
    [
        ("mid64_c256", 1, 1),
        ("mid64_c256_resident", 3, 2),
        ("mid64_c64_project", 2, 3),
        ("mid64_c64_project_resident", 1, 7),
        ("mid128_c256_stride2_small", 6, 4),
        ("mid128_c256_stride2_small", 1, 2),
    ],
)
def test_small_images_and_batch(name: str, h: int, w: int) -> None:
    check(KERNELS[name].make(2, h, w, torch.bfloat16), Options(f"bf16_{name}", multiprocessors=1), "tiles 2")


@pytest.mark.parametrize("name", ("mid64_c256_resident", "mid64_c64_project"))
def test_order_of_threads_does_not_matter(name: str) -> None:
    call = KERNELS[name].make(1, 9, 4, torch.bfloat16)
    outs = [bottleneck_calls.run(call, Options(f"bf16_{name}", seed=seed))[1] for seed in (1, 2, 3)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_cropped_input() -> None:
    """x is a view with gaps between its rows and its pixels."""
    call = KERNELS["mid64_c64_project"].make(2, 9, 8, torch.bfloat16)
    wide = torch.randn(2, 80, 11, 9, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    x = wide.contiguous(memory_format=torch.channels_last)[:, 8:72, 1:10, :8]
    check(call._replace(x=x), Options("bf16_mid64_c64_project"))


def test_bias_and_float32_vectors() -> None:
    """Convolutions may have a bias; vectors may be float32 beside a half type."""
    call = KERNELS["mid64_c64_project"].make(1, 5, 4, torch.bfloat16, bias=True)
    assert call.shortcut is not None

    def float32(conv: ConvBN, names: tuple[str, ...]) -> ConvBN:
        return conv._replace(**{name: getattr(conv, name).float() + 1e-3 for name in names})

    convs = (
        float32(call.convs[0], ("running_mean", "running_var")),
        float32(call.convs[1], ("bias", "bn_weight")),
        call.convs[2]._replace(bn_weight=None, bn_bias=None),
    )
    call = call._replace(convs=convs, shortcut=float32(call.shortcut, ("bn_bias",)))
    out = bottleneck_calls.run(call, Options())[1]
    rounded = [conv._replace(**{n: None if (t := getattr(conv, n)) is None else t.to(out.dtype) for n in VECTORS})
               for conv in (*convs, call.shortcut)]  # fmt: skip
    low = call._replace(convs=tuple(rounded[:3]), shortcut=rounded[3])
    assert_within_budget(out, eager(low), exact(call))


VECTORS = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")


@pytest.mark.parametrize("name", ("mid64_c256", "mid64_c64_project_resident"))
def test_nan_and_infinities(name: str) -> None:
    call = KERNELS[name].make(1, 9, 5, torch.bfloat16)
    call.x[0, 3, 0, 0] = float("nan")
    call.x[0, 5, 8, 4] = float("inf")
    out = bottleneck_calls.run(call, Options(f"bf16_{name}"))[1]
    assert torch.isnan(out[0, :, :2, :2]).all()
    want = eager(call)
    assert torch.equal(torch.isnan(out), torch.isnan(want))
    assert_within_budget(out[:, :, 2:7], want[:, :, 2:7], exact(call)[:, :, 2:7])


def test_misaligned() -> None:
    """x and weights that no copy of 16 bytes can read are laid out anew; an output like that is refused."""
    call = KERNELS["mid64_c256"].make(1, 2, 2, torch.bfloat16)
    for name in ("x", "conv2_weight"):
        check(call, Options(shift={name: 2}))
    refused(call, Options(shift={"out": 2}), "x or out is not aligned to 16 bytes")


def test_refusals_give_a_reason() -> None:
    call = KERNELS["mid64_c256"].make(1, 2, 2, torch.bfloat16)
    refused(call, Options("fp16_mid64_c256"), "the kernel asked for does not fit")
    refused(call, Options(shared_block=90 << 10), "this device's shared memory does not hold the block")
    other = Problem(128, 64, True).make(1, 2, 2, torch.bfloat16)
    refused(other, Options(), "no whole-block kernel has these channels, stride and shortcut")
    refused(call._replace(identity=call.x), Options(), "add x or a projection of x, no other tensor")
    refused(call._replace(x=call.x.float()), Options(), "compute bfloat16 and float16|need the dtype of x")


def refused(call: BlockCall, options: Options, reason: str) -> None:
    with pytest.raises(simt_harness.Refused, match=reason):
        bottleneck_calls.run(call, options)
