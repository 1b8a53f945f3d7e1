"""Compile the Triton kernels for a named architecture, with no GPU, and read what came out.

``python -m resnet_fused.testing.triton_compile`` prints a table of every shipped config. Run it, and import this
module, with TRITON_INTERPRET unset: the interpreter replaces the kernels by plain Python.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.ops.conv_bn_act.triton_config import ConvConfig
from resnet_fused.ops.convbn import short_dtype

ARCHITECTURES = (80, 90, 100)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_CLASSES = ((torch.bfloat16, "tf32"), (torch.float16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee"))
_VECTORS = ("scale", "shift")
_SHAPES = {
    "pointer": ["flat", "taps", "rows"],
    "descriptor": ["3x3s2", "3x3", "1x1"],
    "window": ["7x7s2", "7x7s2-odd"],
}


class Variant(NamedTuple):
    """One kernel to compile: a config for a dtype, the shape of filter it walks, an architecture.

    shape is "rows", "taps" or "flat" for the pointer kernel (conv_pointer's MODE), "1x1", "3x3" or "3x3s2" for the
    descriptor kernel, "reduce" for the second kernel of split-K, "7x7s2" or "7x7s2-odd" for the window kernel on images
    of 3 channels: in a row of odd length elements are read one by one.
    """

    config: ConvConfig
    dtype: torch.dtype
    precision: str
    shape: str
    capability: int
    residual: bool = True
    wide: bool = False
    ones: bool = False  # sizes and strides of 1, which Triton makes constants

    @property
    def id(self) -> str:
        """A readable test id: ``sm90-bf16-descriptor-128x128x64-w8s4-3x3s2``."""
        dtype = short_dtype(self.dtype) + ("" if self.dtype != torch.float32 else f"-{self.precision}")
        flags = "" if self.residual else "-nores"
        flags += "-wide" * self.wide + "-ones" * self.ones
        return f"sm{self.capability}-{dtype}-{self.config}-{self.shape}{flags}"

    @property
    def matrix(self) -> bool:
        """Whether the kernel multiplies matrices on tensor cores."""
        return self.shape != "reduce" and (self.dtype != torch.float32 or self.precision == "tf32")


class Compiled(NamedTuple):
    """What the compiler made of a variant. Bytes of stack and local memory are spills when there is no array."""

    variant: Variant
    registers: int
    shared: int
    stack: int
    local: int
    wgmma: int
    tcgen05: int
    mma: int
    tma: int

    def row(self) -> str:
        """One line of the table."""
        counts = f"{self.wgmma:5d} {self.tcgen05:7d} {self.mma:5d} {self.tma:5d}"
        return f"{self.variant.id:66s} {self.registers:5d} {self.shared:7d} {self.stack + self.local:6d} {counts}"

    def faults(self) -> list[str]:
        """What is wrong with the kernel: spills, too much shared memory, missing instructions."""
        v, found = self.variant, []
        if self.stack or self.local:
            found.append(f"{self.stack} bytes of stack, {self.local} of local memory")
        limit = cfg.shared_limit(v.capability)
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the architecture has {limit}")
        half = v.dtype != torch.float32
        if v.matrix and v.capability == 80 and not self.mma:
            found.append("no mma.sync")
        if v.matrix and v.capability == 90 and half and not self.wgmma:
            found.append("no wgmma")
        if v.matrix and v.capability == 100 and half and v.config.kernel == "descriptor" and not self.tcgen05:
            found.append("no tcgen05.mma")
        if v.config.kernel == "descriptor" and not self.tma:
            found.append("no TMA load or store")
        return found


HEADER = f"{'kernel':66s} {'regs':>5s} {'shared':>7s} {'spills':>6s} wgmma tcgen05   mma   tma"


def compile_variant(variant: Variant) -> Compiled:
    """Compile one variant and count what matters in its PTX and its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants = _specialise(variant)
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    divisible = [["tt.divisibility", 16]]
    attrs = {
        (i,): divisible
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] in ("i32", "i64") and name in _DIVISIBLE)
    }
    source = ASTSource(kernel, signature, constants, attrs)
    target = GPUTarget("cuda", variant.capability, 32)
    warps = 4 if variant.shape == "reduce" else variant.config.warps
    options = {"num_warps": warps, "num_stages": variant.config.stages, "enable_fp_fusion": True}
    result = triton.compile(source, target=target, options=options)
    ptx = result.asm["ptx"]
    usage = resource_usage(result.asm["cubin"])
    return Compiled(
        variant,
        usage["REG"],
        result.metadata.shared,
        usage["STACK"],
        usage["LOCAL"],
        ptx.count("wgmma.mma_async"),
        len(re.findall(r"tcgen05\.mma", ptx)),
        ptx.count("mma.sync"),
        ptx.count("cp.async.bulk.tensor"),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the one kernel in a cubin, by the cuobjdump in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


# Sizes and strides that are multiples of 16 in every ResNet layer but the stem.
_DIVISIBLE = ("C", "K", "x_n", "x_h", "x_w", "weight_k")


def _specialise(v: Variant) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its arguments and its constants, as a launch of the variant would give them."""
    from resnet_fused.ops.conv_bn_act import triton_kernels as kernels
    from resnet_fused.ops.conv_bn_act import triton_window

    config, element = v.config, _TYPES[v.dtype]
    types = {"workspace": "*fp32"}
    types |= dict.fromkeys(("x", "weight", "residual", "out"), f"*{element}") | dict.fromkeys(_VECTORS, "*fp32")
    constants: dict[str, Any] = {"RELU": True, "PRECISION": v.precision, "WIDE": v.wide}
    if not v.residual:
        constants["residual"] = None
    if v.shape == "reduce":
        constants |= {"SPLITS": config.split_k, "BM": 4, "BN": 128}
        kernel = kernels.conv_reduce
    elif config.kernel == "pointer":
        kernel = kernels.conv_pointer
        constants |= {"S": 1, "TAPS": 1} if v.shape == "rows" else {"S": 3, "TAPS": 9}
        constants |= {"MODE": v.shape, "SPLIT": config.split_k > 1, "BM": config.block_m, "BN": config.block_n}
        constants |= {"BK": config.block_k, "GROUP_M": config.group_m}
        constants |= dict.fromkeys(("residual", "out"), None) if config.split_k > 1 else {"workspace": None}
        constants |= dict.fromkeys(("stride_h", "stride_w", "dil_h", "dil_w"), 1)
        if v.ones:
            constants |= dict.fromkeys(("C", "K", "groups", "x_n", "x_h", "x_w", "P", "Q", "steps_per_split"), 1)
    elif config.kernel == "window":
        kernel = triton_window.conv_window
        unit = 1 if v.shape.endswith("odd") else 2
        constants |= {"R": 7, "SPAN": 24, "LEAD": unit - 1, "TAKE": 21, "UNIT": unit, "dil_h": 1}
        constants |= {"BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "GROUP_M": config.group_m}
        if v.ones:
            constants |= dict.fromkeys(("K", "x_n", "x_h", "P", "Q", "step_q"), 1)
    else:
        kernel = kernels.conv_descriptor
        size, stride = (1, 1) if v.shape == "1x1" else (3, 2 if v.shape.endswith("s2") else 1)
        tn, th, tw = (1, 1, config.block_m) if size == 1 else cfg.pixel_tile(256, 28, 28, config.block_m)
        read = f"tensordesc<{element}[{tn}, {th}, {tw}, {config.block_k}]>"
        types |= dict.fromkeys(("x00", "x01", "x10", "x11"), read)
        types["weight"] = f"tensordesc<{element}[{config.block_n}, 1, {config.block_k}]>"
        types |= dict.fromkeys(
            ("residual", "out"), f"tensordesc<{element}[{tn}, {th}, {tw}, {config.block_n // config.parts}]>"
        )
        if stride == 1:
            constants |= dict.fromkeys(("x01", "x10", "x11"), None)
        constants |= {"R": size, "S": size, "STRIDE": stride, "PAD_H": size // 2, "PAD_W": size // 2}
        constants |= {"DIL_H": 1, "DIL_W": 1, "TN": tn, "TH": th, "TW": tw, "BN": config.block_n}
        constants |= {"BK": config.block_k, "GROUP_M": config.group_m, "PARTS": config.parts}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return kernel, dict.fromkeys(kernel.arg_names, "i32") | types, constants


def variants(capabilities: Iterable[int] = ARCHITECTURES, thorough: bool = True) -> Iterator[Variant]:
    """Every shipped config and dtype on each architecture that it fits, in each shape of filter that it walks.

    Without ``thorough``: each config in the shape that takes the most registers, float16 (which compiles as bfloat16
    does) on compute capability 9.0 alone, and one kernel with 64-bit offsets and with sizes of one per architecture.
    """
    for capability in capabilities:
        arch = cfg.Architecture(capability, 1, cfg.shared_limit(capability))
        for dtype, precision in _CLASSES:
            if dtype == torch.float16 and not thorough and capability != 90:
                continue
            configs = [c for c in cfg.shipped(dtype, precision) if cfg.fits(c, dtype, arch)]
            for config in configs:
                shapes = _SHAPES[config.kernel]
                for shape in shapes if thorough else shapes[: 2 if dtype == torch.bfloat16 else 1]:
                    yield Variant(config, dtype, precision, shape, capability)
                if config.split_k > 1:
                    yield Variant(config, dtype, precision, "reduce", capability)
            if thorough or dtype == torch.bfloat16:
                stem = next(config for config in configs if config.kernel == "window")
                yield Variant(stem, dtype, precision, "7x7s2", capability, wide=True)
                yield Variant(stem, dtype, precision, "7x7s2-odd", capability, residual=False, ones=True)
                for shape in ("flat", "taps", "rows"):
                    yield Variant(configs[0], dtype, precision, shape, capability, wide=True)
                    yield Variant(configs[0], dtype, precision, shape, capability, residual=False, ones=True)


def compile_all(wanted: Iterable[Variant], processes: int = 2) -> Iterator[Compiled]:
    """Compile the variants in this many processes; results come in order."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_variant, wanted, chunksize=4)


def main() -> int:
    """Print the table; return 1 when some kernel has a fault."""
    parser = argparse.ArgumentParser(description="Compile every shipped Triton config and print what came out.")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for 9.0")
    parser.add_argument("--quick", action="store_true", help="the hardest shapes of filter per config")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(HEADER)
    failed = 0
    for compiled in compile_all(list(variants(arguments.sm, not arguments.quick)), arguments.processes):
        faults = compiled.faults()
        failed += bool(faults)
        print(compiled.row(), "; ".join(faults), flush=True)
    print(f"{failed} kernels with faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
