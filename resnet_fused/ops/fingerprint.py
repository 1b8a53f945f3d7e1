"""Fingerprints of tensors' memory: they show that a tensor was written to, in whatever way.

A fingerprint holds one hash for each 64 bytes. :meth:`Watch.unchanged` hashes a few lines of every tensor again, at
places that move from call to call: a write to a whole tensor is seen at once; a write to a few elements may hide for
some calls. The work is done by csrc/common/fingerprint.cpp, or here where there is no compiled library.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import extension

_LINE = 64
_SAMPLES = 2  # lines of each tensor that Python looks at, which takes a thousand times as long as the library
_MULTIPLIERS = (
    0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93,
    0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3,
)  # fmt: skip
_turns = itertools.count()


class Fingerprint:
    """The hashes of one CPU tensor's memory, from its first element to its last."""

    __slots__ = ("__weakref__", "address", "bytes", "hashes")

    def __init__(self, tensor: Tensor) -> None:
        self.address, self.bytes = tensor.data_ptr(), _span(tensor)
        self.hashes = array.array("I", bytes(4 * -(-self.bytes // _LINE)))
        _functions()[0](self.address, self.bytes, self.hashes.buffer_info()[0])


# Tensors from which several things are derived share their fingerprint.
_Place = tuple[int, int, int, int]  # storage, address, size, version
_known: weakref.WeakValueDictionary[_Place, Fingerprint] = weakref.WeakValueDictionary()


class Watch:
    """The fingerprints of all CPU tensors of a group. The tensors' memory must be alive whenever it is asked."""

    __slots__ = ("_count", "_places", "_prints", "_rows")

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        """Hash the tensors, or take the fingerprints that others have made of what they hold now."""
        self._prints: list[Fingerprint] = []
        self._places: list[_Place] = []
        for tensor in tensors:
            if tensor is None or tensor.device.type != "cpu" or tensor.numel() == 0:
                continue
            place = (id(tensor.untyped_storage()), tensor.data_ptr(), _span(tensor), version_of(tensor))
            found = _known.get(place)
            if found is None or not _unchanged([found]):
                found = _known[place] = Fingerprint(tensor)
            self._prints.append(found)
            self._places.append(place)
        self._rows, self._count = _rows(self._prints), len(self._prints)

    def unchanged(self) -> bool:
        """Whether the lines that are looked at in this call hold what they held."""
        changed = _functions()[1](self._rows.buffer_info()[0], self._count, next(_turns))
        if changed < 0:
            return True
        _known.pop(self._places[changed], None)
        return False


class Glance:
    """A few elements of CPU tensors, at places that stay: cheaper to take than a :class:`Watch`, and weaker."""

    __slots__ = ("_count", "_rows", "_seen")

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        some = [t for t in tensors if t is not None and t.device.type == "cpu" and t.numel()]
        self._rows = array.array("q", [n for t in some for n in (t.data_ptr(), _span(t), 0)])
        self._count = len(some)
        self._seen = self._look()

    def unchanged(self) -> bool:
        """Whether these elements are what they were."""
        return self._look() == self._seen

    def _look(self) -> int:
        return int(_functions()[2](self._rows.buffer_info()[0], self._count, 0))


def facts(tensors: Sequence[Tensor]) -> Any:
    """Where these tensors are, their dtypes, shapes and strides, for :func:`facts_hold`: what versions do not count."""
    if extension.missing() is None:
        return torch.ops.resnet_fused_cpu.tensor_facts.default(tensors)
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def facts_hold(seen: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether all of that is as it was."""
    if isinstance(seen, list):
        return bool(seen == facts(tensors))
    return torch.ops.resnet_fused_cpu.tensor_facts_hold.default(seen, tensors)  # type: ignore[no-any-return]


def version_of(tensor: Tensor) -> int:
    """The tensor's version, or -1: inference tensors have none, nor has what was made of them since."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def _rows(prints: list[Fingerprint]) -> array.array[int]:
    return array.array("q", [n for p in prints for n in (p.address, p.bytes, p.hashes.buffer_info()[0])])


def _unchanged(prints: list[Fingerprint]) -> bool:
    rows = _rows(prints)
    return bool(_functions()[1](rows.buffer_info()[0], len(prints), next(_turns)) < 0)


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + steps) * tensor.element_size()


@functools.cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """``fingerprint``, ``first_changed`` and ``glance``: the library's, or those below."""
    if extension.missing() is not None:
        return _fingerprint, _first_changed, _glance
    integers = (ctypes.c_int64,) * 3
    path = extension.library_path()
    fingerprint = ctypes.CDLL(path).resnet_fused_fingerprint  # lets other threads run meanwhile
    fingerprint.argtypes, fingerprint.restype = integers, None
    looks = ctypes.PyDLL(path)  # too short for that
    for look in (looks.resnet_fused_first_changed, looks.resnet_fused_glance):
        look.argtypes, look.restype = integers, ctypes.c_int64
    return fingerprint, looks.resnet_fused_first_changed, looks.resnet_fused_glance


def _fingerprint(address: int, size: int, hashes: int) -> None:
    """As in csrc/common/fingerprint.cpp, by PyTorch."""
    memory = torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)
    lines = torch.nn.functional.pad(memory, (0, -size % _LINE)).view(torch.int64).view(-1, _LINE // 8)
    total = torch.zeros(len(lines), dtype=torch.int64)
    for word, multiplier in zip(lines.unbind(1), _MULTIPLIERS, strict=True):
        total += word * (multiplier - (1 << 64) if multiplier >> 63 else multiplier)
    out = torch.frombuffer((ctypes.c_int32 * len(lines)).from_address(hashes), dtype=torch.int32)
    out.copy_((total ^ (total >> 32)).to(torch.int32))


def _hash(line: bytes) -> int:
    words = struct.unpack("=8Q", line.ljust(_LINE, b"\0"))
    total = sum(map(int.__mul__, words, _MULTIPLIERS)) & ((1 << 64) - 1)
    return (total ^ (total >> 32)) & 0xFFFFFFFF


def _sampled(rows: int, count: int, turn: int) -> Iterator[tuple[int, int, int]]:
    """The row, the hash that a sampled line has, and the address of the one that it had."""
    numbers = (ctypes.c_int64 * (3 * count)).from_address(rows)
    for row in range(count):
        address, size, hashes = numbers[3 * row : 3 * row + 3]
        lines = -(-size // _LINE)
        samples = min(lines, _SAMPLES)
        for sample in range(samples):
            line = (sample * lines // samples + turn) % lines
            held = ctypes.string_at(address + line * _LINE, min(_LINE, size - line * _LINE))
            yield row, _hash(held), hashes + 4 * line


def _first_changed(rows: int, count: int, turn: int) -> int:
    """As in csrc/common/fingerprint.cpp, of fewer lines."""
    for row, now, before in _sampled(rows, count, turn):
        if now != ctypes.c_uint32.from_address(before).value:
            return row
    return -1


def _glance(rows: int, count: int, turn: int) -> int:
    return hash(tuple(now for _, now, _ in _sampled(rows, count, turn)))
