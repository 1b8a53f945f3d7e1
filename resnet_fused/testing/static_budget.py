"""What every CUDA kernel costs an architecture, from the compiler's own report: no GPU is needed.

``python -m resnet_fused.testing.static_budget`` compiles every kernel of the lists in csrc and prints one line for each
kernel and architecture: registers, spills, shared memory and how many blocks a multiprocessor holds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


@dataclass(frozen=True)
class Architecture:
    """Limits from the CUDA programming guide's table of compute capabilities; shared memory in bytes."""

    number: int
    threads: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536

    @property
    def name(self) -> str:
        return f"sm_{self.number}"


ARCHITECTURES = (
    Architecture(80, 2048, 32, 164 << 10, 163 << 10),
    Architecture(90, 2048, 32, 228 << 10, 227 << 10),
    Architecture(100, 2048, 32, 228 << 10, 227 << 10),
    Architecture(120, 1536, 24, 100 << 10, 99 << 10),
)
RESERVED_SHARED = 1 << 10  # that the system takes of each block
REGISTER_UNIT = 256  # registers are given to warps in such units


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture; memory in bytes."""

    kernel: str
    architecture: Architecture
    threads: int
    registers: int
    stack: int
    spill: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once; 0: the kernel cannot be launched."""
        limits = self.architecture
        if self.shared > limits.shared_per_block:
            return 0
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        # Each of a multiprocessor's four partitions has a quarter of the registers and of the warps.
        by_registers = limits.registers // 4 // per_warp * 4 // warps
        by_shared = limits.shared // (self.shared + RESERVED_SHARED)
        return min(by_registers, by_shared, limits.threads // (warps * 32), limits.blocks)

    @property
    def occupancy(self) -> float:
        """Resident threads over the most that the multiprocessor holds."""
        return self.blocks * self.threads / self.architecture.threads


def missing_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if not CSRC.is_dir():
        return f"the CUDA sources are not at {CSRC}: an installed package has none"
    return None


# Prints, for each kernel, the template arguments by which it is known again in the compiler's report, and its launch.
_DESCRIBE = """
#include <cstdio>
#include "conv_bn_act/plan.h"
#define LINE(name, element, math, bm, bn, row, m, n, stages, copy)                                      \
  {                                                                                                     \
    const auto& k = rf::conv::info(rf::conv::Kernel::k_##name);                                         \
    std::printf("%s %s:%s:%d:%d:%d:%d:%d:%d:%d %d %d\\n", #name, #element, #math, bm, bn, row, m, n, stages, copy, \
                k.threads, k.shared_bytes);                                                             \
  }
int main() { RF_CONV_KERNELS(LINE) }
"""

_SOURCES = {
    **{
        part: f"""
#include "conv_bn_act/launch.cuh"
namespace rf::conv {{
#define KERNEL(name, ...) template __global__ void conv_kernel<tile_##name>(RF_CONSTANT Args);
{kernels}
template __global__ void reduce_kernel<{element}>(RF_CONSTANT Args);
}}
"""
        for part, element, kernels in (
            ("bf16", "bf16", "RF_CONV_HALF(KERNEL, bf16)"),
            ("fp16", "fp16", "RF_CONV_HALF(KERNEL, fp16)"),
            ("fp32", "float", "RF_CONV_FP32(KERNEL)"),
        )
    },
    "add_relu": """
#include "add_relu/launch.cuh"
namespace rf::add_relu {
#define KERNEL(T, OP)                                                            \\
  template __global__ void flat_kernel<T, OP, 16 / sizeof(T)>(RF_CONSTANT FlatArgs); \\
  template __global__ void flat_kernel<T, OP, 1>(RF_CONSTANT FlatArgs);              \\
  template __global__ void strided_kernel<T, OP>(RF_CONSTANT StridedArgs);
RF_ADD_RELU_KERNELS(KERNEL)
}
""",
}
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
_DEFAULT_THREADS = 256  # of the element-wise and the reduce kernels


def measure(architectures: tuple[Architecture, ...] = ARCHITECTURES) -> list[Resources]:
    """Compile every kernel for every architecture, from one PTX as the package is built, and read the report.

    Raises:
        RuntimeError: there is no compiler, or the compilation failed.
    """
    reason = missing_compiler()
    if reason:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "describe.cpp").write_text(_DESCRIBE)
        _nvcc(folder, "-o", "describe", "describe.cpp")
        lines = subprocess.run([folder / "describe"], capture_output=True, text=True, check=True).stdout.splitlines()
        launches = {key: (label, int(threads), int(shared)) for label, key, threads, shared in map(str.split, lines)}

        def compile_one(part: str) -> str:
            (folder / f"{part}.cu").write_text(_SOURCES[part])
            targets = [f"-gencode=arch=compute_80,code={target.name}" for target in architectures]
            return _nvcc(folder, "-O3", "-Xptxas", "-v", *targets, "-c", f"{part}.cu", "-o", f"{part}.o")

        with ThreadPoolExecutor(2) as pool:
            reports = list(pool.map(compile_one, _SOURCES))
    by_name = {target.name: target for target in architectures}
    return [resources for report in reports for resources in _parse(report, by_name, launches)]


def _nvcc(folder: Path, *arguments: str) -> str:
    command = ["nvcc", "-std=c++17", f"-I{CSRC}", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def _parse(
    report: str, architectures: dict[str, Architecture], launches: dict[str, tuple[str, int, int]]
) -> list[Resources]:
    found = []
    entry, stack, spill = ("", ""), 0, 0
    for line in report.splitlines():
        if match := _ENTRY.search(line):
            entry = (match[1], match[2])
        elif match := _STACK.search(line):
            stack, spill = int(match[1]), int(match[2]) + int(match[3])
        elif match := _USED.search(line):
            label, threads, shared = _launch(entry[0], launches)
            static = int(match[2] or 0)
            target = architectures[entry[1]]
            found.append(Resources(label, target, threads, int(match[1]), stack, spill, shared + static))
    return found


def _launch(mangled: str, launches: dict[str, tuple[str, int, int]]) -> tuple[str, int, int]:
    """(name, threads, dynamic shared memory) of the kernel with this mangled name."""
    element = next((half for half in ("bf16", "fp16") if f"4{half}" in mangled), "float")
    numbers = re.findall(r"Li(\d+)E", mangled)
    if "conv_kernel" in mangled:
        math = "TensorCore" if "TensorCore" in mangled else "Ieee"
        return launches[":".join((element, math, *numbers))]
    short = "fp32" if element == "float" else element
    if "reduce_kernel" in mangled:
        return f"{short}_reduce", _DEFAULT_THREADS, 0
    op = "relu_backward" if "ReluBackward" in mangled else "add_relu"
    shape = "strided" if "strided_kernel" in mangled else f"flat{numbers[0]}"
    return f"{short}_{op}_{shape}", _DEFAULT_THREADS, 0


def table(rows: list[Resources]) -> str:
    """The rows as text, a kernel's architectures together."""
    lines = [
        f"{'kernel':<28}{'arch':<8}{'threads':>8}{'regs':>6}{'spill':>7}{'shared':>9}{'blocks':>8}{'occupancy':>11}"
    ]
    for row in sorted(rows, key=lambda r: (r.kernel, r.architecture.number)):
        lines.append(
            f"{row.kernel:<28}{row.architecture.name:<8}{row.threads:>8}{row.registers:>6}{row.spill:>7}"
            f"{row.shared:>9}{row.blocks:>8}{row.occupancy:>11.0%}"
        )
    return "\n".join(lines)


def main() -> int:
    reason = missing_compiler()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    print(table(measure()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
