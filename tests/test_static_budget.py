"""The compiler's report on every CUDA kernel: no spills, and room to run, on every architecture."""

from __future__ import annotations

import shutil

import pytest

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


def test_nothing_spills(rows: list[Resources]) -> None:
    assert [row for row in rows if row.spill or row.stack] == []


def test_every_kernel_fits(rows: list[Resources]) -> None:
    assert [row for row in rows if row.blocks == 0] == []


def test_matrix_kernels_hide_latency(rows: list[Resources]) -> None:
    """At least eight warps to a multiprocessor, two for each of its four schedulers."""
    assert [row for row in rows if row.blocks * row.threads < 256] == []


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
