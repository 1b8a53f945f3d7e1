"""Giving back memory that the ops keep between calls."""

from __future__ import annotations

import ctypes
import ctypes.util

from resnet_fused.ops import packed


def clear_workspace() -> None:
    """Release what the ops keep between calls: packed weights, and freed buffers that the C library's heap holds.

    On the CPU the intermediates of a block are sub-batches small enough for the heap, where the next block finds them
    again; they stay in the process after the last call. The next call makes what it needs anew.
    """
    packed.clear()
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
