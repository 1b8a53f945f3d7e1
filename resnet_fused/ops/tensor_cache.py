"""Values derived from tensors (packed weights, say), kept while the tensors live and are not written to."""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor

V = TypeVar("V")
Stamp = tuple[Any, ...]


class TensorCache(Generic[V]):
    """Maps tensors to a value built from them.

    An entry is used only while each tensor is the same object, at the same address, with the same version counter,
    strides and dtype; it is dropped when one of them is freed. Writes through ``.data`` do not bump the version
    counter: after them call ``drop`` (the modules' ``refresh()`` does). Inference tensors have no version counter;
    what depends on one is built anew each time.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[tuple[weakref.ref[Tensor], ...], Stamp, V]] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tensors: tuple[Tensor | None, ...], extra: Hashable, build: Callable[[], V]) -> V:
        """The value for ``tensors`` and ``extra``, from ``build()`` when there is no fresh one."""
        key = (extra, *map(id, tensors))
        stamp = _stamp(tensors)
        entry = self._entries.get(key)
        if entry is not None and stamp is not None and entry[1] == stamp:
            return entry[2]
        value = build()
        if stamp is not None:
            with self._lock:
                refs = tuple(weakref.ref(t, functools.partial(self._forget, key)) for t in tensors if t is not None)
                self._entries[key] = (refs, stamp, value)
        return value

    def drop(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Forget every value built from any of ``tensors``."""
        ids = {id(t) for t in tensors if t is not None}
        with self._lock:
            for key in [k for k in self._entries if not ids.isdisjoint(k[1:])]:  # type: ignore[index]
                del self._entries[key]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def _forget(self, key: Hashable, _: object) -> None:
        with self._lock:
            self._entries.pop(key, None)


_VERSION, _DTYPE = operator.attrgetter("_version"), operator.attrgetter("dtype")


def _stamp(tensors: tuple[Tensor | None, ...]) -> Stamp | None:
    """What changes when a tensor is written or its storage replaced; None where that cannot be told."""
    present = [t for t in tensors if t is not None]
    try:
        versions = tuple(map(_VERSION, present))
    except RuntimeError:  # an inference tensor has none
        return None
    return (*versions, *map(Tensor.data_ptr, present), *map(Tensor.stride, present), *map(_DTYPE, present))
