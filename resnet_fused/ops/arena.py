"""One buffer for all that a plan computes between its input and its result, where no two that are needed at once
overlap. There is one for each thread, device and stream; none of it is ever handed out.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: what the device's allocator gives, and tensor descriptors want 16
_MOST = 8  # streams of one thread; the one that came first goes


class Interval(NamedTuple):
    """A buffer of so many bytes, in use from the step that writes it to the last that reads it."""

    size: int
    first: int
    last: int


def lay_out(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """Where each interval begins, and the bytes of all together: the largest first, each as low as it fits among those
    that are in use with it."""
    offsets = [0] * len(intervals)
    placed: list[int] = []
    for index in sorted(range(len(intervals)), key=lambda i: -intervals[i].size):
        _, first, last = intervals[index]
        at = 0
        for other in sorted(placed, key=offsets.__getitem__):
            size, begin, end = intervals[other]
            if begin > last or end < first:
                continue
            if offsets[other] - at >= _rounded(intervals[index].size):
                break
            at = max(at, offsets[other] + _rounded(size))
        offsets[index] = at
        placed.append(index)
    return offsets, max((o + _rounded(i.size) for o, i in zip(offsets, intervals, strict=True)), default=0)


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Arena:
    """The memory, and what plans made of its addresses: dropped with it."""

    def __init__(self, device: torch.device, size: int) -> None:
        with torch.inference_mode(False):
            memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
        begin = -memory.data_ptr() % ALIGNMENT
        self.memory = memory[begin : begin + size]
        self.made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A dense tensor at ``offset``; one of four dimensions is channels_last."""
        with torch.inference_mode(False):  # calls of either mode may write to it
            flat = self.memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype)
            if len(shape) != 4:
                return flat.view(*shape)
            n, c, h, w = shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)


class Place:
    """What one thread has on one stream: an arena, and the CUDA graphs that were captured for it, the latest last."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by plan
        self._arena: Arena | None = None

    def arena(self, device: torch.device, size: int) -> Arena:
        """Memory of at least ``size`` bytes. Where it is too small another takes its place: what the device still has
        to do with the old one comes first on the same stream."""
        found = self._arena
        if found is None or found.memory.numel() < size:
            found = self._arena = None
            found = self._arena = Arena(device, size)
        return found


class _Places(OrderedDict[tuple[torch.device, int], Place]):
    """Those of one thread, by device and stream; a dictionary that can be referred to weakly."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Local(threading.local):
    def __init__(self) -> None:
        self.places = _Places()
        _all.add(self.places)


_all: weakref.WeakSet[_Places] = weakref.WeakSet()
_local = _Local()


def place(device: torch.device, stream: int) -> Place:
    """This thread's place on a stream."""
    places, key = _local.places, (device, stream)
    found = places.get(key)
    if found is None:
        while len(places) >= _MOST:
            places.popitem(last=False)
        found = places[key] = Place()
    return found


def clear() -> None:
    """Drop every thread's arenas and graphs; a plan that runs meanwhile holds what it uses until it is done."""
    for places in list(_all):
        places.clear()
