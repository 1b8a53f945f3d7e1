"""The compiler's report on every CUDA kernel: no spills, and room to run, on every architecture."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from resnet_fused import extension
from resnet_fused.testing import static_budget
from resnet_fused.testing.static_budget import ARCHITECTURES, Architecture, Resources


@pytest.fixture(scope="module")
def rows() -> list[Resources]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    return static_budget.measure()


def test_every_kernel_is_there(rows: list[Resources]) -> None:
    kernels = {row.kernel for row in rows}
    assert len(kernels) > 30
    assert len(rows) == len(kernels) * len(ARCHITECTURES)


@pytest.mark.minimum
def test_nothing_spills(rows: list[Resources]) -> None:
    assert [row for row in rows if row.spill or row.stack] == []


# Blocks to a multiprocessor of each architecture, oldest first; 0: its shared memory does not hold the kernel, and the
# plan refuses it there.
BOTTLENECKS = {
    "mid64_c256_resident": (0, 1, 1, 0),
    "mid64_c256": (1, 1, 1, 1),
    "mid64_c256_small": (1, 2, 2, 1),
    "mid64_c64_project_resident": (0, 1, 1, 0),
    "mid64_c64_project": (1, 1, 1, 1),
    "mid64_c64_project_small": (2, 2, 2, 1),
    "mid64_c256_project": (1, 1, 1, 0),
    "mid128_c512": (1, 1, 1, 0),
    "mid128_c512_small": (1, 1, 1, 0),
    "mid128_c512_tight": (1, 1, 1, 1),
    "mid128_c256_project": (0, 1, 1, 0),
    "mid128_c256_project_small": (1, 1, 1, 0),
    "mid128_c256_stride2": (0, 1, 1, 0),
    "mid128_c256_stride2_small": (1, 1, 1, 0),
}


# The same of the convolutions' tiles: the largest that the registers allow, unless shared memory holds fewer.
CONVOLUTIONS = {
    "bf16_128x128": (2, 2, 2, 1),
    "bf16_128x64": (3, 3, 3, 2),
    "bf16_64x128": (3, 3, 3, 2),
    "bf16_64x64": (3, 4, 4, 2),
    "bf16_64x32": (4, 5, 5, 2),
    "bf16_64x32_c4": (6, 6, 6, 4),
    "bf16_128x64_c1": (3, 3, 3, 2),
    "bf16_64x32_c1": (6, 6, 6, 5),
    "tf32_128x128": (2, 2, 2, 1),
    "tf32_128x64": (3, 3, 3, 2),
    "tf32_64x64": (3, 4, 4, 2),
    "tf32_64x32": (6, 6, 6, 4),
    "tf32_128x64_c1": (3, 3, 3, 2),
    "tf32_64x32_c1": (6, 6, 6, 5),
    "ieee_128x128": (1, 1, 1, 1),
    "ieee_64x64": (3, 3, 3, 3),
    "ieee_64x32": (4, 4, 4, 4),
    "ieee_128x64_c1": (2, 2, 2, 2),
    "ieee_64x32_c1": (4, 4, 4, 4),
}
CONVOLUTIONS |= {name.replace("bf16", "fp16"): blocks for name, blocks in CONVOLUTIONS.items() if "bf16" in name}


def test_convolutions_hold_what_they_are_planned_for(rows: list[Resources]) -> None:
    found: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row.architecture.number):
        found.setdefault(row.kernel, []).append(row.blocks)
    assert {name: tuple(found[name]) for name in CONVOLUTIONS} == CONVOLUTIONS


def test_the_list_of_convolutions_states_what_the_registers_hold(rows: list[Resources]) -> None:
    """Neither less than the compiler found room for, nor more; shared memory comes on top of it."""
    stated = {row["name"]: row["blocks"] for row in extension.module().conv_bn_act_kernels()}
    assert set(stated) == set(CONVOLUTIONS)
    for row in rows:
        if row.kernel in stated:
            by_registers = dataclasses.replace(row, shared=0).blocks
            assert by_registers == stated[row.kernel], row


@pytest.mark.minimum
def test_every_kernel_fits(rows: list[Resources]) -> None:
    too_large = {(row.kernel, row.architecture.number) for row in rows if row.blocks == 0}
    numbers = [architecture.number for architecture in ARCHITECTURES]
    assert too_large == {
        (f"{half}_{name}", number)
        for half in ("bf16", "fp16")
        for name, blocks in BOTTLENECKS.items()
        for number, count in zip(numbers, blocks, strict=True)
        if count == 0
    }


def test_bottlenecks_hold_what_they_are_planned_for(rows: list[Resources]) -> None:
    found: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row.architecture.number):
        found.setdefault(row.kernel, []).append(row.blocks)
    for half in ("bf16", "fp16"):
        assert {name: tuple(found[f"{half}_{name}"]) for name in BOTTLENECKS} == BOTTLENECKS


def test_batch_norm_is_launched_as_often_as_it_fits(rows: list[Resources]) -> None:
    """The plan gives a multiprocessor two blocks with vectors of 16 bytes, four where elements move one by one."""
    found = {row.kernel: row.blocks for row in rows if "_norm_" in row.kernel and row.architecture.number == 120}
    assert len(found) == 3 * (4 * 4 + 2)
    for row in rows:
        if "_norm_" in row.kernel:
            assert row.blocks >= (2 if row.kernel.endswith(("last8", "last4", "nchw8", "nchw4")) else 4), row


# Kernels whose registers leave room for one block alone, and why that is enough or what it costs.
ALONE = {
    "ieee_128x128": "plain cores: each thread has 64 sums that do not wait for one another, at a latency of 4 clocks",
} | {
    f"{half}_{name}": "a tile's sums fill the registers; roofline.issue counts products and the rest in turns"
    for half in ("bf16", "fp16")
    for name in BOTTLENECKS
    if not name.startswith("mid64") or not name.endswith("_small")
}  # fmt: skip


def starved(rows: list[Resources]) -> list[Resources]:
    """Matrix kernels that cannot hide what their warps wait for.

    While the warps of a block wait at a barrier, for their first tiles or for their stores, none of them multiplies: a
    multiprocessor needs a second block. And with two warps to each of its four schedulers one wait leaves a single warp
    to issue: it needs three on tensor cores, two where independent sums of plain cores fill in. Registers are the
    compiler's to give, so they must allow it; shared memory may allow less where an architecture has little of it.
    """
    found = []
    for row in rows:
        if "_norm_" in row.kernel or "relu" in row.kernel or row.kernel in ALONE or row.blocks == 0:
            continue
        warps, by_registers = row.threads // 32, row.limits["registers"]
        least = 8 if row.kernel.startswith("ieee") else 12
        reachable = min(by_registers, row.limits["threads"]) * warps
        if by_registers < 2 or reachable < least:
            found.append(row)
    return found


def test_matrix_kernels_hide_latency(rows: list[Resources]) -> None:
    assert starved(rows) == []
    names = {row.kernel for row in rows}
    assert names >= ALONE.keys()
    unneeded = {row.kernel for row in rows if row.kernel in ALONE and row.limits["registers"] > 1}
    assert unneeded == set(), "these have room for two blocks by now"


def test_eight_warps_are_not_enough_for_tensor_cores() -> None:
    """One block of eight warps, and two of four, are what a multiprocessor must not be left with."""
    sm90, sm120 = ARCHITECTURES[1], ARCHITECTURES[3]
    one_block = Resources("bf16_128x128", sm90, 256, 161, 0, 0, 64 << 10)
    two_small = Resources("bf16_128x64", sm90, 128, 174, 0, 0, 48 << 10)
    assert (one_block.warps, two_small.warps) == (8, 8) and starved([one_block, two_small]) == [one_block, two_small]
    mended = [
        Resources("bf16_128x128", sm90, 256, 128, 0, 0, 64 << 10),
        Resources("bf16_128x64", sm90, 128, 163, 0, 0, 48 << 10),
        Resources("bf16_128x128", sm120, 256, 128, 0, 0, 64 << 10),  # its shared memory holds one block alone
        Resources("ieee_64x32", sm90, 128, 254, 0, 0, 24 << 10),
    ]
    assert [row.warps for row in mended] == [16, 12, 8, 8] and starved(mended) == []


def test_table_has_a_line_for_each(rows: list[Resources]) -> None:
    assert len(static_budget.table(rows).splitlines()) == 1 + len(rows)


def test_occupancy_is_the_least_of_the_limits() -> None:
    """Figures of NVIDIA's occupancy calculator for an sm_80."""
    sm80: Architecture = ARCHITECTURES[0]
    assert Resources("full", sm80, 256, 32, 0, 0, 0).blocks == 8
    assert Resources("registers", sm80, 256, 128, 0, 0, 0).blocks == 2
    assert Resources("registers", sm80, 256, 129, 0, 0, 0).blocks == 1
    assert Resources("shared", sm80, 128, 32, 0, 0, 64 << 10).blocks == 2
    assert Resources("too large", sm80, 128, 32, 0, 0, 164 << 10).blocks == 0
    assert Resources("full", sm80, 256, 32, 0, 0, 0).occupancy == 1.0
    assert Resources("full", sm80, 256, 129, 0, 0, 0).limits == {"registers": 1, "shared": 164, "threads": 8}
