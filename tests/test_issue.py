"""What the whole-block kernels' warps issue, by the account, by hand and in the compiled library's own machine code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from resnet_fused import extension
from resnet_fused.roofline import issue, whole_block
from resnet_fused.roofline.issue import Phase


@pytest.fixture
def resident() -> dict[str, Any]:
    """mid64_c256_resident, without a library: 8 x 16 pixels, weights that stay."""
    return {
        "mid": 64, "cin": 256, "project": False, "resident": True, "tile": (8, 16), "halo": (10, 18), "rows": 128,
        "pass_rows": 192, "passes": 1, "steps": 17,
    }  # fmt: skip


def test_the_instructions_of_a_tile_by_hand(resident: dict[str, Any]) -> None:
    """4 steps of 3 row tiles, 9 and 4 of 2; 180 halo pixels are 6 copies of 16 bytes to a thread."""
    reduce, hidden, convolve, hidden2, expand = issue.phases(resident)
    assert [p.products for p in (reduce, convolve, expand)] == [192 * 256 * 64, 128 * 9 * 64 * 64, 128 * 64 * 256]
    assert (hidden.products, hidden2.products) == (0, 0)
    assert reduce.feeding == 4 * 4 * (12 + 3 + 2 + 3 + 4)
    assert convolve.feeding == 9 * 4 * (8 + 2 + 2 + 2 + 4) and expand.feeding == convolve.feeding // 9 * 4
    assert (reduce.others, convolve.others) == (4 * (50 + 60 + 6 * 38), 9 * 50)
    assert (hidden.others, hidden2.others, expand.others) == (3 * 2 * 50 + 70, 2 * 2 * 50, 4 * 2 * 2 * 95)
    assert [p.stepped for p in (reduce, convolve, expand)] == [True, False, False]


def test_streamed_weights_cost_a_send_and_a_barrier_in_each_step(resident: dict[str, Any]) -> None:
    resident["resident"] = False
    reduce, _, convolve, _, expand = issue.phases(resident)
    assert (reduce.others, convolve.others) == (4 * (50 + 60 + 6 * 38 + 35 + 2 * 20), 9 * (50 + 35 + 2 * 20))
    assert expand.others == 4 * (35 + 2 * 20) + 4 * 4 * 95
    assert reduce.stepped and convolve.stepped and expand.stepped


def test_products_and_the_rest_take_turns_where_a_barrier_holds_the_warps() -> None:
    """Two warps to a scheduler; 100 products a clock."""
    stepped, free = Phase(10_000, 20, 30), Phase(10_000, 20, 30, stepped=False)
    assert issue.clocks((stepped,), 100, 1) == (160, 160)
    assert issue.clocks((free,), 100, 1) == (100, 160)
    assert issue.clocks((free,), 1000, 1) == (100, 100), "what feeds the products bounds them as well"
    assert issue.clocks((stepped, Phase(0, 0, 70)), 100, 1) == (300, 300)
    assert issue.clocks((stepped, Phase(0, 0, 70)), 100, 2) == (240, 300), "another block multiplies meanwhile"


def test_issue_is_a_unit_of_the_account(resident: dict[str, Any]) -> None:
    """Of layer1.1 at batch 256, a multiprocessor has 55 tiles: instructions, not memory, are what it waits for."""
    resident |= {"stride": 1, "blocks": 1, "chunk_bytes": 8192, "products": 9_961_472, "fragments": 1_179_648}
    account = whole_block.account(resident, 256, 56, 56)
    times = account.times()
    issued = 8 * sum(phase.instructions for phase in account.phases)
    assert times["issue"] == pytest.approx(55 * issued / 4 / 1.7e9)
    assert max(times, key=lambda unit: times[unit]) == "issue"
    least, most = account.predicted()
    assert 470e-6 < least < most < 580e-6


class Loop(NamedTuple):
    """A loop of machine code: its first and last instruction, what is in it, the loops inside."""

    first: int
    last: int
    names: list[str]

    def inside(self, loops: list[Loop]) -> list[Loop]:
        """The loops directly in this one."""
        within = [o for o in loops if o is not self and self.first <= o.first and o.last <= self.last]
        return [o for o in within if not any(p is not o and p.first <= o.first and o.last <= p.last for p in within)]


def kernel_loops(template: list[int]) -> list[Loop]:
    """The loops of the bfloat16 kernel with these template arguments in the library's code for sm_90."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    flags = [f"L{'b' if i == 3 else 'i'}{int(value)}E" for i, value in enumerate(template)]
    name = f"_ZN2rf10bottleneck17bottleneck_kernelINS_4bf16ENS0_4TileI{''.join(flags)}EEEEvNS0_4ArgsE"
    command = [str(tools / "cuobjdump"), "-arch", "sm_90", "-fun", name, "-sass", extension.library_path()]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    code = [(int(at, 16), line) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)]
    if not code:
        pytest.skip("the library was built without sm_90")
    return list(_loops(code))


def _loops(code: list[tuple[int, str]]) -> Iterator[Loop]:
    for last, line in code:
        match = re.search(r"\bBRA(?:\.\S+)?\s+.*?0x([0-9a-f]+)", line)
        if match and int(match[1], 16) < last:
            first = int(match[1], 16)
            body = [re.sub(r"^@!?U?P\d+ ", "", text).split()[0] for at, text in code if first <= at <= last]
            yield Loop(first, last, [text.split(".")[0] for text in body])


def test_the_machine_code_has_as_many_instructions() -> None:
    """Loops multiplied by how often they run. Which branch of a stream is taken is not told: all are counted here."""
    if extension.missing(cuda=True):
        pytest.skip(str(extension.missing(cuda=True)))
    (row,) = [r for r in extension.module().bottleneck_kernels() if r["name"] == "bf16_mid64_c256_resident"]
    loops = kernel_loops(row["template"])
    tile = max(loops, key=lambda loop: len(loop.names))
    parts = tile.inside(loops)
    assert len(parts) == 3, "reduce, convolve, expand"
    outside = len(tile.names) - sum(len(part.names) for part in parts)
    counted = outside
    for part, steps in zip(parts, (4, 9, 4), strict=True):
        inner = part.inside(loops)
        counted += steps * (len(part.names) - sum(len(loop.names) for loop in inner))
        for loop in inner:
            feeds = "HMMA" in loop.names
            times = 2 if feeds else 6  # two of the four products at a time; 16 bytes of a thread
            counted += len(loop.names) * times * (1 if not feeds and steps == 9 else steps)
    said = sum(phase.instructions for phase in issue.phases(row))
    assert said == pytest.approx(counted, rel=0.15)
    innermost = [loop for loop in loops if "HMMA" in loop.names and not loop.inside(loops)]
    feeding = sorted(2 * len(loop.names) for loop in innermost)
    assert feeding == pytest.approx([4 * (8 + 2 + 2 + 2 + 4)] * 2 + [4 * (12 + 3 + 2 + 3 + 4)], rel=0.1)
