"""Compile what calls of conv_bn_act launch by Triton for a named architecture, with no GPU, and read what came out.

``python -m resnet_fused.testing.triton_compile`` prints a table of every shipped config. Run it with TRITON_INTERPRET
unset: the interpreter replaces the kernels by plain Python.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.ops.conv_bn_act.triton_config import Architecture, ConvConfig
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, short_dtype
from resnet_fused.testing.triton_driver import Binary, launches

ARCHITECTURES = (80, 90, 100)
_CLASSES = ((torch.bfloat16, "tf32"), (torch.float16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee"))
# The hardest shapes of each kernel first.
_SHAPES = {
    "descriptor": ("3x3s2", "3x3", "1x1s2", "1x1"),
    "pointer": ("flat", "taps", "rows"),
    "window": ("7x7-odd", "7x7", "5x5"),
}
_PROCESSORS = 132


class Variant(NamedTuple):
    """One call to compile: a config for a dtype, the shape of filter it walks, an architecture.

    shape is "rows", "taps" or "flat" for the pointer kernel (conv_pointer's MODE); for the descriptor kernel it is the
    filter and its stride; for the window kernel the filter of a stem, "-odd" where a row of x is of odd length, so that
    its elements are read one by one. A config with split_k launches a second kernel, which adds the sums.
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
        return self.dtype != torch.float32 or self.precision == "tf32"

    def call(self) -> ConvBNActCall:
        """A call that a launch with this config and shape serves; x and the residual are on the meta device."""
        c = k = 1 if self.ones else 256
        image, size, stride, padding = (1 if self.ones else 28), 1, 1, 0
        if self.shape == "flat":  # fewer channels than a step reads, and a step for every split
            size = 3 if self.config.split_k <= 8 else 7
            c = 1 if self.ones else self.config.block_k * (4 if self.config.split_k <= 4 else 7) // 8
        elif self.shape == "taps" and self.ones:
            stride = 2
        elif self.config.kernel == "window":
            c, size, stride = 1 if self.ones else 3, int(self.shape[0]), 2
        elif self.shape != "rows":
            size = 1 if self.shape.startswith("1x1") else 3
            stride = 2 if self.shape.endswith("s2") else 1
        padding = size // 2
        n = 1 if self.ones else 2**30 // (c * image * image) + 1 if self.wide else 256
        x = _channels_last(n, c, image * stride, image * stride + self.shape.endswith("-odd"), self.dtype)
        gamma, beta, mean, var = torch.ones(4, k, dtype=self.dtype).unbind()
        weight = torch.zeros(k, c, size, size, dtype=self.dtype).to(memory_format=torch.channels_last)
        conv = ConvBN(weight, None, gamma, beta, mean, var, 1e-5, (stride, stride), (padding, padding))
        residual = _channels_last(n, k, *conv.output_size(*x.shape[2:]), self.dtype) if self.residual else None
        return ConvBNActCall(x, conv, residual, "relu")


def _channels_last(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((n, c, h, w), dtype=dtype, device="meta", memory_format=torch.channels_last)


class Compiled(NamedTuple):
    """The kernels that a variant launched, the one that multiplies first; or why it did not come so far."""

    variant: Variant
    kernels: tuple[Binary, ...]
    error: str = ""

    def rows(self) -> list[str]:
        """A line of the table for each kernel."""
        names = (self.variant.id, *(f"  {kernel.name}" for kernel in self.kernels[1:]))
        return [
            f"{name:66s} {kernel.registers:5d} {kernel.shared:7d} {kernel.stack:5d} {kernel.spills:6d} "
            f"{' '.join(f'{kernel.ptx.count(word):5d}' for word in _INSTRUCTIONS.values())}"
            for name, kernel in zip(names, self.kernels, strict=True)
        ] or [f"{self.variant.id:66s}"]

    def faults(self) -> list[str]:
        """What is wrong: spills, too much shared memory, missing instructions."""
        v = self.variant
        if self.error:
            return [self.error]
        limit, half = cfg.shared_limit(v.capability), v.dtype != torch.float32
        found = [fault for kernel in self.kernels for fault in kernel.faults()]
        found += [
            f"{kernel.shared} bytes of shared memory, the architecture has {limit}"
            for kernel in self.kernels
            if kernel.shared > limit
        ]
        found += ["batch norm's root in the epilogue" for kernel in self.kernels if "rsqrt" in kernel.ptx]
        if v.shape in ("7x7", "5x5") and half and not v.ones and re.search(r"ld\.global\S*\.b16", self.kernels[0].ptx):
            found.append("elements of x are read one by one")
        wanted = []
        if v.matrix and v.capability == 80:
            wanted.append("mma")
        if v.matrix and v.capability == 90 and half:
            wanted.append("wgmma")
        if v.config.kernel == "descriptor":
            wanted += ["tcgen05", "tma"] if v.matrix and v.capability == 100 and half else ["tma"]
        found += [f"no {_INSTRUCTIONS[name]}" for name in wanted if _INSTRUCTIONS[name] not in self.kernels[0].ptx]
        return found


_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "tma": "cp.async.bulk.tensor",
}  # fmt: skip
HEADER = f"{'kernel':66s} {'regs':>5s} {'shared':>7s} {'stack':>5s} {'spills':>6s} " + " ".join(
    f"{name[:5]:>5s}" for name in _INSTRUCTIONS
)


def compile_variant(variant: Variant) -> Compiled:
    """Launch the variant's call as a user's would be, on a device that is not there."""
    from resnet_fused.ops.conv_bn_act import triton as conv_bn_act

    v = variant
    limit = cfg.shared_limit(v.capability)
    flags, precision = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    with (
        launches(v.capability, limit) as kernels,
        mock.patch.object(cfg, "INTERPRETER", Architecture(v.capability, _PROCESSORS, limit)),
    ):
        flags.fp32_precision = v.precision
        try:
            conv_bn_act.run(v.call(), v.config)
        except Exception as error:
            return Compiled(v, (), f"{type(error).__name__}: {str(error).strip()}")
        finally:
            flags.fp32_precision = precision
    return Compiled(v, tuple(kernels))


def variants(capabilities: Iterable[int] = ARCHITECTURES, thorough: bool = True) -> Iterator[Variant]:
    """Every shipped config and dtype on each architecture that it fits, in each shape of filter that it walks.

    Without ``thorough``: each config in the shape that takes the most registers, bfloat16 in two more of them, float16
    (which compiles as bfloat16 does) on compute capability 9.0 alone, and one kernel with 64-bit offsets and one with
    sizes of one for each shape and architecture.
    """
    for capability in capabilities:
        arch = Architecture(capability, 1, cfg.shared_limit(capability))
        for dtype, precision in _CLASSES:
            if dtype == torch.float16 and not thorough and capability != 90:
                continue
            configs = [c for c in cfg.shipped(dtype, precision) if cfg.fits(c, dtype, arch)]
            for config in configs:
                shapes = _SHAPES[config.kernel]
                quick = len(shapes) - 1 if dtype == torch.bfloat16 else 1
                for shape in shapes if thorough else shapes[:quick]:
                    if config.split_k == 1 or shape != "rows":
                        yield Variant(config, dtype, precision, shape, capability)
            if thorough or dtype == torch.bfloat16:
                for kernel in ("pointer", "window"):
                    first = next(config for config in configs if config.kernel == kernel)
                    for shape in _SHAPES[kernel]:
                        yield Variant(first, dtype, precision, shape, capability, wide=True)
                        yield Variant(first, dtype, precision, shape, capability, residual=False, ones=True)


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
        print("\n".join(compiled.rows()), "; ".join(faults), flush=True)
    print(f"{failed} calls with faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
