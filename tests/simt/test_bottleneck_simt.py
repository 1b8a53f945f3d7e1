"""The CUDA kernels of bottleneck on the host runtime, against the float64 reference."""

from __future__ import annotations

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
    "mid64_c64_project_resident": Problem(64, 64, True),
    "mid64_c64_project": Problem(64, 64, True),
    "mid64_c256_project": Problem(256, 64, True),
    "mid128_c512": Problem(512, 128, False),
    "mid128_c512_small": Problem(512, 128, False),
    "mid128_c256_project": Problem(256, 128, True),
    "mid128_c256_project_small": Problem(256, 128, True),
    "mid128_c256_stride2": Problem(256, 128, True, 2),
}


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
    assert_within_budget(out, eager(call), exact(call))
    return out


# Sides for the kernel's tiles: a full one and a ragged one each way, or an image of less than one tile.
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel(dtype: str, name: str) -> None:
    problem = KERNELS[name]
    h, w = (15, 17) if problem.stride == 2 else (9, 17)
    check(problem.make(1, h, w, DTYPES[dtype]), Options(f"{dtype}_{name}"), f"kernel {dtype}_{name} ")
