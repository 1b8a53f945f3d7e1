"""Compile batch_norm_act's Triton kernels for a named architecture, with no GPU, and read what came out.

As triton_compile, whose rules hold: run it, and import it, with TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from resnet_fused.ops.convbn import short_dtype
from resnet_fused.testing.triton_compile import ARCHITECTURES, resource_usage

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = ("statistics", "merge", "apply", "sums", "gradient")


class NormVariant(NamedTuple):
    """One kernel to compile: its name without ``_kernel``, a tile, channels_last or not, an architecture."""

    kernel: str
    config: Any
    channels_last: bool
    dtype: torch.dtype
    capability: int
    wide: bool = False
    ones: bool = False  # sizes of 1, which Triton makes constants

    @property
    def id(self) -> str:
        """A readable test id: ``sm90-bf16-gradient-64x64-w4-nhwc``."""
        layout = "nhwc" if self.channels_last else "nchw"
        text = f"sm{self.capability}-{short_dtype(self.dtype)}-{self.kernel}-{self.config}-{layout}"
        return text + "-wide" * self.wide + "-ones" * self.ones


class CompiledNorm(NamedTuple):
    """What the compiler made of a variant; spills in bytes, vectors counts 16-byte global accesses."""

    variant: NormVariant
    registers: int
    spills: int
    vectors: int

    def faults(self) -> list[str]:
        """What is wrong with the kernel: spills, or narrow accesses where the layout allows wide ones."""
        found = [f"{self.spills} bytes of spills"] if self.spills else []
        if self.variant.channels_last and not self.variant.ones and not self.vectors:
            found.append("no 16-byte access")
        return found


def compile_variant(variant: NormVariant) -> CompiledNorm:
    """Compile one variant and count what matters."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resnet_fused.ops.batch_norm_act import triton as norm

    kernel: Any = getattr(norm, f"{variant.kernel}_kernel")
    constants: dict[str, Any] = {
        "CHANNELS_LAST": variant.channels_last, "WIDE": variant.wide, "RELU": True, "TRAINING": True,
        "BM": variant.config.block_m, "BC": variant.config.block_c,
    }  # fmt: skip
    if variant.kernel == "merge":
        constants |= {"BS": norm.MERGE.block_m, "BC": norm.MERGE.block_c}
    if variant.ones:
        constants |= dict.fromkeys(("C", "HW", "splits"), 1)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    full = ("x", "grad", "output", "residual", "out", "dx", "dresidual")
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(full, f"*{_TYPES[variant.dtype]}")
    types |= dict.fromkeys(("M", "C", "HW", "rows", "splits"), "i32") | {"momentum": "fp32", "eps": "fp32"}
    types["batches"] = "*i64"
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in ("C", "HW", "rows") and name not in constants)
    }
    result = triton.compile(
        ASTSource(kernel, signature, constants, attrs), target=GPUTarget("cuda", variant.capability, 32),
        options={"num_warps": variant.config.warps, "enable_fp_fusion": True},
    )  # fmt: skip
    ptx = result.asm["ptx"]
    usage = resource_usage(result.asm["cubin"])
    vectors = ptx.count("global.v4.b32") + ptx.count("global.v4.f32") + ptx.count("v4.b32 {")
    return CompiledNorm(variant, usage["REG"], usage["STACK"] + usage["LOCAL"], vectors)


def variants(capabilities: Iterable[int] = ARCHITECTURES, thorough: bool = True) -> Iterator[NormVariant]:
    """Every kernel with every tile that is shipped, in every dtype; 64-bit pixel counts in bfloat16 alone.

    Without ``thorough``: bfloat16 alone.
    """
    from resnet_fused.ops.batch_norm_act import triton as norm

    tiles = [(config, True) for config in norm.CHANNELS_LAST] + [(norm.CONTIGUOUS, False)]
    for capability in capabilities:
        for kernel in KERNELS:
            for config, channels_last in tiles:
                for dtype in _TYPES if thorough else (torch.bfloat16,):
                    yield NormVariant(kernel, config, channels_last, dtype, capability)
                yield NormVariant(kernel, config, channels_last, torch.bfloat16, capability, ones=True)
                if kernel != "merge" and thorough:
                    yield NormVariant(kernel, config, channels_last, torch.bfloat16, capability, True)


def main() -> int:
    """Print the table; return 1 when some kernel has a fault."""
    parser = argparse.ArgumentParser(description="Compile batch_norm_act's Triton kernels and print what came out.")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for 9.0")
    parser.add_argument("--quick", action="store_true", help="bfloat16 alone")
    arguments = parser.parse_args()
    print(f"{'kernel':48s} {'regs':>5s} {'spills':>6s} {'16 B':>5s}")
    failed = 0
    for compiled in map(compile_variant, variants(arguments.sm, not arguments.quick)):
        faults = compiled.faults()
        failed += bool(faults)
        columns = f"{compiled.registers:5d} {compiled.spills:6d} {compiled.vectors:5d}"
        print(f"{compiled.variant.id:48s} {columns} {'; '.join(faults)}", flush=True)
    print(f"{failed} kernels with faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
