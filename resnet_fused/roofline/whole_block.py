"""What the whole-block CUDA kernels move and compute, counted from their own tile parameters (csrc/bottleneck/tile.h).

``python -m resnet_fused.roofline.whole_block`` prints the account of ResNet-50's blocks on an H200, with the kernels
that the plan chooses there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from resnet_fused import extension
from resnet_fused.modules.blocks import FusedBottleneck
from resnet_fused.ops.bottleneck import triton_config
from resnet_fused.roofline import issue
from resnet_fused.roofline.bound import H200, Device
from resnet_fused.roofline.levels import count

_SIZE = 2  # bytes of an element: the kernels compute bfloat16 and float16


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of the account about a device, none of them measured.

    mma: the part of the device's matrix rate that mma.sync reaches. The rest are an H200's figures: multiprocessors,
    clock, bytes of shared memory that one of them reads in a clock, bytes that L2 gives in a second.
    """

    mma: float = 0.62
    multiprocessors: int = 132
    clock_hz: float = 1.7e9
    shared_bytes_per_clock: int = 128
    l2_bytes_per_s: float = 5.5e12


@dataclass(frozen=True)
class Account:
    """One launch: bytes and FLOPs, and from them the least time of each unit that could hold it up.

    x_bytes and out_bytes are what has to cross main memory once; the weights besides. halo_bytes, again_bytes (the
    residual, or x under the output pixels for the projection) and weight_bytes are what the blocks read through L2.
    useful_flops are the block's own, flops what the tensor cores do: the halo's recomputed border and the rows that pad
    a tile are in. shared_bytes go in and out of shared memory. phases are those of one tile, and resident is how many
    blocks share a multiprocessor.
    """

    tiles: int
    blocks: int
    x_bytes: int
    out_bytes: int
    parameter_bytes: int
    halo_bytes: int
    again_bytes: int
    weight_bytes: int
    useful_flops: int
    flops: int
    shared_bytes: int
    phases: tuple[issue.Phase, ...]
    resident: int

    @property
    def l2_bytes(self) -> int:
        return self.halo_bytes + self.again_bytes + self.weight_bytes + self.out_bytes

    def times(
        self, device: Device = H200, dtype: torch.dtype = torch.bfloat16, given: Assumptions | None = None
    ) -> dict[str, float]:
        """Seconds that each unit needs: "memory", "l2", "mma", "shared", "issue" (of instructions). The last three are
        those of the multiprocessor with the most tiles."""
        given = given or Assumptions()
        waves = self._most_tiles(given) * given.multiprocessors / self.tiles
        shared_rate = given.multiprocessors * given.clock_hz * given.shared_bytes_per_clock
        instructions = issue.WARPS * sum(phase.instructions for phase in self.phases)
        return {
            "memory": (self.x_bytes + self.out_bytes + self.parameter_bytes) / device.bytes_per_s,
            "l2": self.l2_bytes / given.l2_bytes_per_s,
            "mma": self.flops / (device.rate(dtype) * given.mma) * waves,
            "shared": self.shared_bytes / shared_rate * waves,
            "issue": self._most_tiles(given) * instructions / issue.SCHEDULERS / given.clock_hz,
        }

    def predicted(
        self, device: Device = H200, dtype: torch.dtype = torch.bfloat16, given: Assumptions | None = None
    ) -> tuple[float, float]:
        """Seconds of the launch, from and to: the slowest unit, where products and the other instructions share time as
        :func:`resnet_fused.roofline.issue.clocks` says; memory, L2 and shared memory overlap with them without loss."""
        given = given or Assumptions()
        products = device.rate(dtype) * given.mma / (2 * given.multiprocessors * given.clock_hz)
        slowest = max(self.times(device, dtype, given).values())
        tile = issue.clocks(self.phases, products, self.resident)
        least, most = (max(slowest, self._most_tiles(given) * clocks / given.clock_hz) for clocks in tile)
        return least, most

    def _most_tiles(self, given: Assumptions) -> int:
        """Of one multiprocessor."""
        return -(-self.tiles // given.multiprocessors)


def account(kernel: Mapping[str, Any], n: int, h: int, w: int, given: Assumptions | None = None) -> Account:
    """The account of ``kernel``, a row of ``_C.bottleneck_kernels()``, on ``[n, cin, h, w]``.

    FLOPs and the fragments that warps read of shared memory are the kernel's own constants for each tile; what crosses
    L2 is counted here, without the halo outside of the image.
    """
    given = given or Assumptions()
    mid, cin, stride, project = kernel["mid"], kernel["cin"], kernel["stride"], kernel["project"]
    out = 4 * mid
    sides = ((h - 1) // stride + 1, (w - 1) // stride + 1)
    counts = [-(-side // tile) for side, tile in zip(sides, kernel["tile"], strict=True)]
    tiles = n * counts[0] * counts[1]
    blocks = min(tiles, kernel["blocks"] * given.multiprocessors)
    halo = [
        _covered(*arguments, stride) for arguments in zip((h, w), counts, kernel["tile"], kernel["halo"], strict=True)
    ]
    pixels = n * sides[0] * sides[1]
    weights = cin * mid + 9 * mid * mid + mid * out + (cin * out if project else 0)
    useful = 2 * (n * h * w * cin * mid + pixels * (weights - cin * mid))
    streamed = kernel["steps"] * kernel["chunk_bytes"]
    read = n * halo[0] * halo[1] * cin * _SIZE
    weight_bytes = (blocks if kernel["resident"] else tiles) * streamed
    centre = pixels * cin * _SIZE
    hidden = tiles * (kernel["halo"][0] * kernel["halo"][1] + kernel["rows"]) * mid * _SIZE
    landed = read + weight_bytes + (centre if project else 0) + hidden
    return Account(
        tiles, blocks, n * h * w * cin * _SIZE, pixels * out * _SIZE, (weights + 2 * (2 * mid + out * (1 + project))
        + 2 * (2 * mid + out * (1 + project))) * _SIZE, read, centre, weight_bytes, useful,
        2 * tiles * kernel["products"], landed + tiles * kernel["fragments"], issue.phases(kernel), kernel["blocks"],
    )  # fmt: skip


def contender_l2_bytes(
    cin: int, mid: int, stride: int, project: bool, n: int, h: int, w: int, *, slot_in_l1: bool = False
) -> int:
    """Bytes through L2 of the Triton kernel (ops/bottleneck/triton_kernel.py) on an H200 for ``[n, cin, h, w]``.

    Each tile reads all weights, its halo of x, the shortcut's x (a projection's once for every part of the output), and
    nine shifted views of its slot, which the first level's cache may serve; it writes its slot and its output.
    """
    config = triton_config.config(mid, stride, 90)
    tiles = n * math.prod(
        -(-((side - 1) // stride + 1) // tile) for side, tile in zip((h, w), config.tile, strict=True)
    )
    pixels, out = math.prod(config.tile), 4 * mid
    halo = math.prod((side - 1) * stride + 3 for side in config.tile)
    weights = cin * mid + 9 * mid * mid + mid * out + (cin * out if project else 0)
    shortcut = pixels * (cin * out // config.block_n if project else out)
    slot = halo * mid + (0 if slot_in_l1 else 9 * pixels * mid)
    return _SIZE * tiles * (weights + halo * cin + shortcut + slot + pixels * out)


def with_changes(kernel: Mapping[str, Any], n: int, side: int, *, shared_weights: bool, wgmma: bool) -> float:
    """Seconds that the account predicts for a kernel that does not exist.

    shared_weights: clusters of two blocks read their weights through L2 once for both. wgmma: the full matrix rate; a
    group of four warps takes 64 rows, which come from shared memory once, with the weights once for each 64 rows;
    nothing is issued to feed the products, and all else is issued under them.
    """
    a = account(kernel, n, side, side)
    if shared_weights:
        a = replace(a, weight_bytes=a.weight_bytes // 2)
    if not wgmma:
        return a.predicted()[0]
    first = kernel["passes"] * kernel["cin"] // 64
    rows = first * kernel["pass_rows"] + (kernel["steps"] - first) * kernel["rows"]
    fragments = (rows + rows // 64 * kernel["mid"]) * 128
    shared = a.shared_bytes - a.tiles * (kernel["fragments"] - fragments)
    a = replace(a, shared_bytes=shared, phases=tuple(replace(phase, feeding=0) for phase in a.phases))
    return max(a.times(given=Assumptions(mma=1.0)).values())


def _covered(side: int, tiles: int, tile: int, halo: int, stride: int) -> int:
    """Pixels along one side of the image that the tiles' halos read, those under two tiles twice."""
    starts = [i * tile * stride - 1 for i in range(tiles)]
    return sum(min(start + halo, side) - max(start, 0) for start in starts)


# ResNet-50's blocks in stages 2 and 3: name, channels of x, hidden channels, stride, projection, input side.
BLOCKS = (
    ("layer1.0", 64, 64, 1, True, 56),
    ("layer1.1", 256, 64, 1, False, 56),
    ("layer2.0", 256, 128, 2, True, 56),
    ("layer2.1", 512, 128, 1, False, 28),
)
SHARED = 227 << 10  # bytes of an H200's shared memory that a block may have


def kernels(cin: int, mid: int, stride: int, project: bool) -> list[dict[str, Any]]:
    """The bfloat16 kernels that compute a block on an H200."""
    problem = {"element": "bf16", "cin": cin, "mid": mid, "stride": stride, "project": project}
    rows = extension.module().bottleneck_kernels()
    return [row for row in rows if problem.items() <= row.items() and row["shared"] <= SHARED]


def chosen(cin: int, mid: int, stride: int, project: bool, n: int, side: int) -> dict[str, Any]:
    """The one of them that the plan (csrc/bottleneck/plan.h) takes for ``[n, cin, side, side]``."""

    def conv(c: int, k: int, kernel: int = 1, stride: int = 1) -> tuple[Any, ...]:
        return (k, c, kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1

    convs = [conv(cin, mid), conv(mid, mid, 3, stride), conv(mid, 4 * mid)]
    shortcut = conv(cin, 4 * mid, stride=stride) if project else None
    device = (SHARED, Assumptions.multiprocessors)
    name, reason = extension.module().bottleneck_choice((n, cin, side, side), convs, shortcut, True, *device)
    if reason:
        raise ValueError(reason)
    return next(row for row in kernels(cin, mid, stride, project) if row["name"] == name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The account of ResNet-50's whole-block kernels on an H200.")
    parser.add_argument("--all", action="store_true", help="every kernel that fits, not the plan's choice alone")
    every = parser.parse_args(argv).all
    reason = extension.missing()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    print("| block | batch | kernel | tiles | FLOPs done / useful | L2 / memory bytes | memory us | L2 us | mma us "
          "| shared us | issue us | **predicted us** | whole-block bound us | per-conv bound us |")  # fmt: skip
    print("|---|---:|---|" + "---:|" * 11)
    for name, cin, mid, stride, project, side in BLOCKS:
        for n in (1, 8, 32, 256):
            plan = chosen(cin, mid, stride, project, n, side)
            for kernel in kernels(cin, mid, stride, project) if every else [plan]:
                print(f"| {name} | {n} | {kernel['name'].removeprefix('bf16_')} | {_cells(kernel, n, side)} |")
    print("\n| block, by Triton | batch | L2 us | L2 us, the slot read from L1 |\n|---|---:|---:|---:|")
    for name, cin, mid, stride, project, side in BLOCKS:
        for n in (32, 256):
            problem = (cin, mid, stride, project, n, side, side)
            moved = [contender_l2_bytes(*problem, slot_in_l1=near) for near in (False, True)]
            cells = " | ".join(f"{1e6 * size / Assumptions.l2_bytes_per_s:.1f}" for size in moved)
            print(f"| {name} | {n} | {cells} |")
    print(
        "\n| block, batch 256 | predicted us | weights for two | wgmma | both | per-conv bound us |\n|---"
        + "|---:" * 5
        + "|"
    )
    for name, cin, mid, stride, project, side in BLOCKS:
        kernel = chosen(cin, mid, stride, project, 256, side)
        changes = [(False, False), (True, False), (False, True), (True, True)]
        seconds = [with_changes(kernel, 256, side, shared_weights=a, wgmma=b) for a, b in changes]
        seconds.append(count(_module(kernel), (256, cin, side, side))["conv"].bound(H200, torch.bfloat16).seconds)
        print(f"| {name} | " + " | ".join(f"{1e6 * value:.1f}" for value in seconds) + " |")
    return 0


def _cells(kernel: Mapping[str, Any], n: int, side: int) -> str:
    a = account(kernel, n, side, side)
    times = list(a.times().values())
    memory = a.x_bytes + a.out_bytes + a.parameter_bytes
    counts = count(_module(kernel), (n, kernel["cin"], side, side))
    bounds = [counts[level].bound(H200, torch.bfloat16).seconds for level in ("block", "conv")]
    cells = [f"{1e6 * seconds:.1f}" for seconds in (*times, *bounds)]
    least, most = (f"{1e6 * seconds:.1f}" for seconds in a.predicted())
    cells.insert(len(times), f"**{least}**" if least == most else f"**{least} to {most}**")
    return " | ".join([f"{a.tiles}", f"{a.flops / a.useful_flops:.2f}", f"{a.l2_bytes / memory:.2f}", *cells])


def _module(kernel: Mapping[str, Any]) -> nn.Module:
    """The block that ``kernel`` computes."""
    cin, out, stride = kernel["cin"], 4 * kernel["mid"], kernel["stride"]
    projection = nn.Sequential(nn.Conv2d(cin, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return FusedBottleneck(cin, kernel["mid"], stride, projection if kernel["project"] else None)


if __name__ == "__main__":
    sys.exit(main())
