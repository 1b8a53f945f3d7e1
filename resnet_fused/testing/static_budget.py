"""The resources of every CUDA kernel on an architecture, from the compiler's own report: no GPU is needed.

The build keeps that report in the compiled library. ``python -m resnet_fused.testing.static_budget`` prints one line
for each kernel and architecture: registers, spills, shared memory and how many blocks a multiprocessor holds.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from resnet_fused import extension


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
    def limits(self) -> dict[str, int]:
        """Blocks that each of a multiprocessor's means allows: "registers", "shared", "threads"."""
        device = self.architecture
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        return {
            # Each of a multiprocessor's four partitions has a quarter of the registers and of the warps.
            "registers": device.registers // 4 // per_warp * 4 // warps,
            "shared": 0 if self.shared > device.shared_per_block else device.shared // (self.shared + RESERVED_SHARED),
            "threads": min(device.threads // (warps * 32), device.blocks),
        }

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once; 0: the kernel cannot be launched."""
        return min(self.limits.values())

    @property
    def warps(self) -> int:
        """Warps that a multiprocessor holds at once."""
        return self.blocks * -(-self.threads // 32)

    @property
    def occupancy(self) -> float:
        """Resident threads over the most that the multiprocessor holds."""
        return self.blocks * self.threads / self.architecture.threads


def missing() -> str | None:
    """Why there is no compiled library with CUDA kernels to read from, or None."""
    return extension.missing(cuda=True)


_DEFAULT_THREADS = 256  # of the element-wise and the reduce kernels


def measure(architectures: tuple[Architecture, ...] = ARCHITECTURES) -> list[Resources]:
    """What the compiler reported on every kernel of the library as it was built, for these architectures.

    Raises:
        RuntimeError: there is no library, or it holds no CUDA kernels.
    """
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    module = extension.module()
    launches = {
        ":".join((row["element"], row["math"], *map(str, row["template"]))): (
            row["name"],
            row["threads"],
            row["shared"],
        )
        for row in module.conv_bn_act_kernels()
    }
    launches |= {
        ":".join((row["element"], "bottleneck", *map(str, row["template"]))): (
            row["name"],
            row["threads"],
            row["shared"],
        )
        for row in module.bottleneck_kernels()
    }
    by_name = {target.name: target for target in architectures}
    found = {}
    for row in module.kernel_resources():
        if row["architecture"] in by_name:
            label, threads, shared = _launch(row["symbol"], launches)
            target = by_name[row["architecture"]]
            # A kernel that several sources hold is the same in each of them.
            found[row["symbol"], target.name] = Resources(
                label, target, threads, row["registers"], row["stack"], row["spill"], shared + row["shared"]
            )
    return list(found.values())


def _launch(mangled: str, launches: dict[str, tuple[str, int, int]]) -> tuple[str, int, int]:
    """(name, threads, dynamic shared memory) of the kernel with this mangled name."""
    element = next((half for half in ("bf16", "fp16") if f"4{half}" in mangled), "float")
    numbers = re.findall(r"Li(\d+)E", mangled)
    if "conv_kernel" in mangled:
        math = "TensorCore" if "TensorCore" in mangled else "Ieee"
        return launches[":".join((element, math, *numbers))]
    if "bottleneck_kernel" in mangled:
        return launches[":".join((element, "bottleneck", *re.findall(r"L[ib](\d+)E", mangled)))]
    short = "fp32" if element == "float" else element
    if "reduce_kernel" in mangled:
        return f"{short}_reduce", _DEFAULT_THREADS, 0
    if match := re.search(r"norm\d+(\w+?)_kernel", mangled):
        width, last = (numbers[0], "Lb1E" in mangled) if numbers else ("", False)
        layout = f"_{'channels_last' if last else 'nchw'}{width}" if numbers else ""
        return f"{short}_norm_{match[1]}{layout}", _DEFAULT_THREADS, 0
    op = "relu_backward" if "ReluBackward" in mangled else "add_relu"
    shape = "strided" if "strided_kernel" in mangled else f"flat{numbers[0]}"
    return f"{short}_{op}_{shape}", _DEFAULT_THREADS, 0


def table(rows: list[Resources]) -> str:
    """The rows as text, a kernel's architectures together."""
    lines = [
        f"{'kernel':<36}{'arch':<8}{'threads':>8}{'regs':>6}{'spill':>7}{'shared':>9}{'blocks':>8}{'occupancy':>11}"
    ]
    for row in sorted(rows, key=lambda r: (r.kernel, r.architecture.number)):
        lines.append(
            f"{row.kernel:<36}{row.architecture.name:<8}{row.threads:>8}{row.registers:>6}{row.spill:>7}"
            f"{row.shared:>9}{row.blocks:>8}{row.occupancy:>11.0%}"
        )
    return "\n".join(lines)


def main() -> int:
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    print(table(measure()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
