"""Compile what calls of batch_norm_act and add_relu launch by Triton for a named architecture, and read what came out.

As triton_compile, whose rules hold: no GPU is needed, and TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall
from resnet_fused.ops.conv_bn_act import triton_config
from resnet_fused.ops.convbn import short_dtype
from resnet_fused.testing.triton_compile import ARCHITECTURES
from resnet_fused.testing.triton_driver import Binary, launches

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHANNELS = ((256, True), (16, True), (256, False))  # one for each tile, see batch_norm_act/triton.py's pick
KERNELS = ("statistics", "merge", "apply", "sums", "gradient", "add_relu")


class NormVariant(NamedTuple):
    """One problem: channels, channels_last or not, a dtype, an architecture. It launches all of KERNELS."""

    channels: int
    channels_last: bool
    dtype: torch.dtype
    capability: int
    wide: bool = False  # more than 2³¹ pixels
    ones: bool = False  # sizes of 1, which Triton makes constants

    def id(self, kernel: str) -> str:
        """A readable test id: ``sm90-bf16-gradient-C256-nhwc``."""
        layout = "nhwc" if self.channels_last else "nchw"
        text = f"sm{self.capability}-{short_dtype(self.dtype)}-{kernel}-C{self.channels}-{layout}"
        return text + "-wide" * self.wide + "-ones" * self.ones

    def faults(self, kernel: Binary) -> list[str]:
        """What is wrong with a kernel: spills, or narrow accesses where the layout allows wide ones."""
        found = kernel.faults()
        if self.channels_last and not self.ones and not vectors(kernel):
            found.append("no 16-byte access")
        return found


def vectors(kernel: Binary) -> int:
    """How many accesses of 16 bytes there are."""
    return len(re.findall(r"global\S*\.v4\.[bf]32|v4\.b32 \{", kernel.ptx))


def compile_variant(variant: NormVariant) -> list[Binary]:
    """Launch a forward pass in training mode, a backward pass and a sum, as a user's would be."""
    from resnet_fused.ops.add_relu import triton as add_relu
    from resnet_fused.ops.batch_norm_act import triton as norm

    c, size = (1, 1) if variant.ones else (variant.channels, 28)
    n = 2**31 // size**2 + 1 if variant.wide else 1 if variant.ones else 256
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    x, residual, grad = (
        torch.empty((n, c, size, size), dtype=variant.dtype, device="meta", memory_format=layout) for _ in range(3)
    )
    weight, bias, mean, var = torch.ones(4, c, device="meta").unbind()
    batches = torch.zeros((), dtype=torch.int64, device="meta")
    with launches(variant.capability, triton_config.shared_limit(variant.capability)) as kernels:
        call = BatchNormCall(x, weight, bias, mean, var, batches, residual, True, None, 1e-5, "relu")
        output, mean, rstd = norm.run(call)
        norm.backward(GradientCall(grad, x, weight, None, None, mean, rstd, output, True, 1e-5, True, True))
        add_relu.run(AddReLUCall(x, residual))
    return kernels


def variants(capabilities: Iterable[int] = ARCHITECTURES, thorough: bool = True) -> Iterator[NormVariant]:
    """Every tile that is shipped, in every dtype; sizes of one and 64-bit pixel counts in bfloat16 alone.

    Without ``thorough``: bfloat16 alone, and no 64-bit pixel counts.
    """
    for capability in capabilities:
        for channels, channels_last in _CHANNELS:
            for dtype in _DTYPES if thorough else _DTYPES[:1]:
                yield NormVariant(channels, channels_last, dtype, capability)
            if thorough:
                yield NormVariant(channels, channels_last, torch.bfloat16, capability, wide=True)
        yield NormVariant(1, True, torch.bfloat16, capability, ones=True)


def main() -> int:
    """Print the table; return 1 when some kernel has a fault."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels of batch_norm_act and add_relu.")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for 9.0")
    parser.add_argument("--quick", action="store_true", help="bfloat16 alone")
    arguments = parser.parse_args()
    print(f"{'kernel':48s} {'regs':>5s} {'stack':>5s} {'spills':>6s} {'16 B':>5s}")
    failed = 0
    for variant in variants(arguments.sm, not arguments.quick):
        for kernel in compile_variant(variant):
            faults = variant.faults(kernel)
            failed += bool(faults)
            columns = f"{kernel.registers:5d} {kernel.stack:5d} {kernel.spills:6d} {vectors(kernel):5d}"
            print(f"{variant.id(kernel.name.removesuffix('_kernel')):48s} {columns} {'; '.join(faults)}", flush=True)
    print(f"{failed} kernels with faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
