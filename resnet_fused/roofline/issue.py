"""What a whole-block CUDA kernel's warps issue for one tile, and how that shares time with the tile's products.

A multiprocessor has four schedulers, each of which starts one instruction of one warp in a clock. The counts are what
the compiler made of csrc/bottleneck for sm_90, read from its machine code loop by loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEDULERS = 4
WARPS = 8  # of a block

# Instructions of one warp, in bfloat16.
_FRAGMENT = 4  # besides the address of each row tile: of 16 of a step's 64 channels
_STEP = 50  # wait, barrier, addresses, the loop
_SEND_X, _COPY_X = 60, 38  # one chunk of x: where it lies; each 16 bytes of a thread, with the halo's coordinates
_SEND_WEIGHTS, _COPY_WEIGHTS = 35, 20
_HIDDEN_EIGHT = 50  # eight channels of a hidden pixel: batch norm, ReLU, rounding, the mask, one store
_OUTPUT_EIGHT = 95  # eight channels of the output: the shortcut read, widened and added as well
_PROJECTED_EIGHT = 67  # the same where the shortcut is a product: two batch norms, nothing read
_TILE = 70


@dataclass(frozen=True)
class Phase:
    """A part of a tile between two barriers: its multiply-adds, and the instructions of a warp that feed them and all
    others. ``stepped``: a barrier opens each of its steps, so that no warp multiplies while another copies."""

    products: int
    feeding: int
    others: int
    stepped: bool = True

    @property
    def instructions(self) -> int:
        """What a warp issues."""
        return self.feeding + self.others


def phases(kernel: Mapping[str, Any]) -> tuple[Phase, ...]:
    """Those of one tile of ``kernel``, a row of ``_C.bottleneck_kernels()``."""
    mid, cin, passes, steps = (int(kernel[key]) for key in ("mid", "cin", "passes", "steps"))
    resident, project = kernel["resident"], kernel["project"]
    tiles, halo_tiles, groups = kernel["rows"] // 64, kernel["pass_rows"] // 64, mid // 64
    first, second = passes * cin // 64, 9 * mid // 64
    third = steps - first - second

    def feed(rows: int) -> int:
        """Of one step: fragments of the rows and of the weights, the products."""
        columns = mid // 16
        return 4 * (rows * columns + rows + columns // 2 + rows + _FRAGMENT)

    slot_rows = -(-kernel["halo"][0] * kernel["halo"][1] // passes)
    x = _SEND_X + -(-slot_rows * 8 // (WARPS * 32)) * _COPY_X
    step = _STEP + (0 if resident else _SEND_WEIGHTS + mid * 8 // (WARPS * 32) * _COPY_WEIGHTS)
    centre = -(-cin // 64 * kernel["tile"][0] * kernel["tile"][1] * 8 // (WARPS * 32)) * _COPY_X if project else 0
    hidden, out = 2 * groups * _HIDDEN_EIGHT, 2 * groups * (_PROJECTED_EIGHT if project else _OUTPUT_EIGHT)
    rows = kernel["rows"]
    return (
        Phase(passes * kernel["pass_rows"] * cin * mid, first * feed(halo_tiles), first * (step + x)),
        Phase(0, 0, passes * halo_tiles * hidden + _TILE),
        Phase(rows * 9 * mid * mid, second * feed(tiles), second * step + centre, stepped=not resident),
        Phase(0, 0, tiles * hidden),
        Phase(
            rows * 4 * mid * (mid + (cin if project else 0)),
            third * feed(tiles),
            # Resident weights: a part opens no step, and its loop is in the count of its outputs.
            (0 if resident else third * (step - _STEP)) + 4 * tiles * out,
            stepped=not resident,
        ),
    )


def clocks(parts: tuple[Phase, ...], products_per_clock: float, blocks: int) -> tuple[float, float]:
    """Clocks of a multiprocessor for one tile: the least, and the most that the two units can need.

    At most a scheduler's warps are in step: they multiply, then all issue the rest. At least they drift apart wherever
    no barrier holds them, and the rest is issued under the products; with two blocks to a multiprocessor, everywhere.
    """
    issued = WARPS / SCHEDULERS
    least = most = 0.0
    for part in parts:
        products = part.products / products_per_clock
        in_turns = max(products, part.feeding * issued) + part.others * issued
        most += in_turns
        least += in_turns if part.stepped else max(products, part.instructions * issued)
    if blocks > 1:
        least = max(
            sum(part.products for part in parts) / products_per_clock,
            sum(part.instructions for part in parts) * issued,
        )
    return least, most
