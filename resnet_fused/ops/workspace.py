"""The memory that the ops keep between calls: freed buffers in the C library's heap, and packed weights."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools

import torch

from resnet_fused.ops import arena, packed

# A tensor between two convolutions is to be no larger. glibc maps buffers above 32 MB afresh and gives them back, so
# that every use pays for its page faults; below that a freed buffer is used again: the heap is the workspace.
LARGEST_BUFFER = 30 << 20


def clear_workspace() -> None:
    """Release what the ops keep between calls: packed weights, arenas and CUDA graphs, and freed buffers that the C
    library's heap holds.

    On the CPU the intermediates of a block are sub-batches small enough for the heap, where the next block finds them
    again; they stay in the process after the last call. On a GPU a network has an arena for each thread and stream. The
    next call makes what it needs anew.
    """
    packed.clear()
    arena.clear()
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def sub_batch(images: int, bytes_per_image: int) -> int:
    """How many images to take at a time: all, or a share, even where that is possible, in buffers of LARGEST_BUFFER."""
    limit = max(1, min(images, LARGEST_BUFFER // bytes_per_image))
    for size in range(limit, limit // 2, -1):
        if images % size == 0:
            return size
    return limit


@functools.cache
def adapt_heap() -> None:
    """Let glibc's heap see once that the process uses buffers of LARGEST_BUFFER bytes.

    glibc takes large buffers from the system and returns them when freed, and from the first freed one learns to
    serve that size from its heap and to keep up to twice as much there. It cannot learn that from many small buffers,
    and would return the heap's top after each call and take it again page by page. A process with settings of its own
    for malloc (MALLOC_TRIM_THRESHOLD_ and the like) keeps those.
    """
    torch.empty(LARGEST_BUFFER, dtype=torch.uint8)
