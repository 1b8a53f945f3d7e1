"""The host runtime itself: faults that are planted in small kernels must be found."""

from __future__ import annotations

import pytest
import simt_harness

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)

RUNTIME_FAULTS = {
    "missing_barrier": "no barrier between",
    "write_after_read": "no barrier between",
    "missing_warp_barrier": "no barrier between",
    "missing_wait": "async copy to it is under way",
    "missing_barrier_after_wait": "race|under way",
    "divergent_barrier": "divergent barrier",
    "two_barriers": "divergent barrier",
    "divergent_warp": "divergent ballot",
    "stored_twice": "a second time",
    "shared_out_of_bounds": "outside the block's",
    "shared_uninitialised": "nobody wrote",
    "shared_misaligned": "misaligned",
    "global_misaligned": "misaligned global access",
    "copy_left_behind": "never committed",
}
SANITIZER_FAULTS = ("global_out_of_bounds_store", "global_out_of_bounds_load", "async_copy_out_of_bounds")


def planted(name: str) -> str:
    return simt_harness.call("resnet_fused_host::planted", name, apart=True).text


def test_sound_kernels_pass() -> None:
    planted("sound")


def test_bank_conflicts_are_counted_by_width() -> None:
    """By hand: turns beyond the first of each 128 bytes that a warp asks for; two warps in each line."""
    found = list(map(int, planted("banks").split()))
    assert found == [
        0,  # float after float
        2,  # every other word: two words of each bank
        2 * 31,  # all lanes in one bank
        0,  # pairs: half a warp at a time
        2 * 2,  # pairs 16 bytes apart
        0,  # fours: a quarter of a warp at a time
        2 * 4,  # fours 32 bytes apart, as in an epilogue of half types
        0,  # two halves of a word
        0,  # all lanes ask for one word
        2 * 4,  # ldmatrix: each of four matrices has its eight rows 32 bytes apart
    ]


@pytest.mark.parametrize("name", RUNTIME_FAULTS)
def test_planted_fault_is_found(name: str) -> None:
    with pytest.raises(simt_harness.RunnerError, match=RUNTIME_FAULTS[name]) as error:
        planted(name)
    assert f"exit status {simt_harness.FAULT_STATUS}\n" in str(error.value)


@pytest.mark.parametrize("name", SANITIZER_FAULTS)
def test_planted_fault_is_found_by_the_sanitizer(name: str) -> None:
    with pytest.raises(simt_harness.RunnerError, match="heap-buffer-overflow"):
        planted(name)
