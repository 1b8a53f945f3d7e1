"""Values derived from tensors (packed weights, say), kept while the tensors live and hold what they held.

One cache for the process, of weak entries and bounded length. An entry serves only while all of these hold:

1. each tensor has the storage, address, version, shape, strides and dtype that it had;
2. no optimizer has stepped that holds one of them;
3. a few elements of each, at places that move from call to call, are what they were (ops/fingerprint.py): the version
   counts neither what is written through ``.data``, numpy or another process, nor what batch norm and some optimizers
   write;
4. on a GPU, where looking at elements would stop the queue: no optimizer at all has stepped, and nothing has called
   :meth:`TensorCache.drop` for them, as the autograd rules and training-mode batch norm do.

Nothing here is locked: single operations of a dictionary are atomic, and two threads that build the same value do no
harm. So a process may be forked, and garbage collected, at any time.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from resnet_fused.ops.fingerprint import Glance, Watch, version_of

MOST_ENTRIES = 8192

Tensors = Sequence[Tensor | None]
Key = tuple[Hashable, ...]

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_SEEN = object()  # the kind of the entries that say that tensors were seen
_steps = itertools.count(1)
_last_step = 0  # of any optimizer in this process


class _Look(Protocol):
    def unchanged(self) -> bool: ...


class _Facts(NamedTuple):
    """What changes when tensors are written as PyTorch counts it, or their memory is replaced."""

    addresses: tuple[int, ...]
    storages: tuple[int, ...]
    versions: tuple[int, ...]
    shapes: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtypes: tuple[Any, ...]


class _Entry(NamedTuple):
    facts: _Facts
    look: _Look
    step: int | None  # None on the CPU
    value: Any


class Ticket(NamedTuple):
    """One entry of the cache: see :meth:`TensorCache.ticket`."""

    key: Key
    entry: _Entry


class TensorCache:
    """Maps a kind of value, the tensors that it is derived from and what else decides it to the value.

    Two tensors that share their memory are one here. A value must hold none of the tensors, or their storages would
    never be freed.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        # Keys by the identity of a storage that they depend on; the reference's callback drops them with it.
        self._keys: dict[int, tuple[weakref.ref[Any], dict[Key, None]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, kind: Hashable, tensors: Tensors, extra: Hashable = None) -> Any:
        """The value, or None where there is no fresh one."""
        facts = _facts(tensors)
        return None if facts is None else self._find(_key(kind, tensors, extra, facts), facts)

    def get(self, kind: Hashable, tensors: Tensors, extra: Hashable, build: Callable[[], Any]) -> Any:
        """The value, from ``build()`` where there is no fresh one; kept where that is possible."""
        facts = _facts(tensors)
        if facts is None:
            return build()
        key = _key(kind, tensors, extra, facts)
        value = self._find(key, facts)
        if value is None:
            look = Watch(tensors)  # of the tensors as they are before they are read
            value = build()
            self._keep(key, facts, look, value, tensors)
        return value

    def settled(self, tensors: Tensors, asker: Hashable = None) -> bool:
        """Whether an earlier call of this by the same asker saw the tensors as they are now, so that what is derived
        from them may last. Weights that are new at each call are never settled."""
        facts = _facts(tensors)
        if facts is None:
            return False
        key = _key(_SEEN, tensors, asker, facts)
        if self._find(key, facts) is not None:
            return True
        self._keep(key, facts, Glance(tensors), True, tensors)
        return False

    def ticket(self, kind: Hashable, tensors: Tensors, release: Callable[[], object]) -> Ticket | None:
        """What stands for the tensors as they are now, for :meth:`holds`; None for some of which nothing can be told.

        release: a method, of which this is a weak reference, to call when the ticket is forgotten.
        """
        facts = _facts(tensors)
        if facts is None:
            return None
        key = _key(kind, tensors, None, facts)
        self._keep(key, facts, Watch(tensors), weakref.WeakMethod(release), tensors)
        entry = self._entries.get(key)
        return None if entry is None else Ticket(key, entry)

    def holds(self, ticket: Ticket) -> bool:
        """Whether the tensors of a ticket are as they were, as far as rules 2 to 4 tell. Rule 1 is the caller's: they
        must be at the same addresses when this is asked."""
        key, entry = ticket
        if self._entries.get(key) is not entry or entry.step not in (None, _last_step):
            return False
        if entry.look.unchanged():
            return True
        self._forget(key)
        return False

    def drop(self, tensors: Iterable[Tensor | None]) -> None:
        """Forget every value derived from memory that one of ``tensors`` shares."""
        if not self._entries:
            return
        for tensor in tensors:
            if type(tensor) in _PLAIN_TYPES:
                found = self._keys.get(id(tensor.untyped_storage()))  # type: ignore[union-attr]
                for key in () if found is None else list(found[1]):
                    self._forget(key)

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._entries):
            self._forget(key)

    def _find(self, key: Key, facts: _Facts) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.facts == facts and entry.step in (None, _last_step) and entry.look.unchanged():
            return entry.value
        self._forget(key)
        return None

    def _keep(self, key: Key, facts: _Facts, look: _Look, value: Any, tensors: Tensors) -> None:
        while len(self._entries) >= MOST_ENTRIES:
            self._forget(next(iter(self._entries.copy()), key))
        on_cpu = all(t is None or t.device.type == "cpu" for t in tensors)
        self._entries[key] = _Entry(facts, look, None if on_cpu else _last_step, value)
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                at = id(storage)
                found = self._keys.get(at)
                if found is None:
                    found = self._keys.setdefault(at, (weakref.ref(storage, functools.partial(self._freed, at)), {}))
                found[1][key] = None

    def _forget(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        for at in () if entry is None else entry.facts.storages:
            found = self._keys.get(at)
            if found is not None:
                found[1].pop(key, None)
        release = entry.value() if entry is not None and type(entry.value) is weakref.WeakMethod else None
        if release is not None:
            release()

    def _freed(self, at: int, _: object) -> None:
        for key in list(self._keys.pop(at, (None, ()))[1]):
            self._forget(key)


_VERSION, _DTYPE, _SHAPE = map(operator.attrgetter, ("_version", "dtype", "shape"))


def _facts(tensors: Tensors) -> _Facts | None:
    """The facts of the tensors; None where they cannot be known."""
    present = [t for t in tensors if t is not None]
    if not _PLAIN_TYPES.issuperset(map(type, present)):
        return None
    try:
        versions = tuple(map(_VERSION, present))
    except RuntimeError:  # some have none; on the CPU their elements are looked at
        versions = tuple(map(version_of, present))
        if any(version < 0 and t.device.type != "cpu" for version, t in zip(versions, present, strict=True)):
            return None
    return _Facts(
        tuple(map(Tensor.data_ptr, present)), tuple(map(id, map(Tensor.untyped_storage, present))), versions,
        tuple(map(_SHAPE, present)), tuple(map(Tensor.stride, present)), tuple(map(_DTYPE, present)),
    )  # fmt: skip


def _key(kind: Hashable, tensors: Tensors, extra: Hashable, facts: _Facts) -> Key:
    """Two tensors of one address differ in the facts; which of the tensors are None is part of the key."""
    return (kind, extra, *facts.addresses, *[i for i, t in enumerate(tensors) if t is None])


CACHE = TensorCache()


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused optimizers write without a count. What holds other parameters may copy from these soon: rule 4."""
    global _last_step
    if torch.compiler.is_compiling():
        return  # compiled writes are counted
    _last_step = next(_steps)
    CACHE.drop(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_stepped)
