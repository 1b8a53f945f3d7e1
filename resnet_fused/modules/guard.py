"""What a network must not have changed for what was prepared of it to hold: laid out once, asked by a few sweeps.

``guards`` says whether a part may be bypassed, ``live`` which parts there are. Both read module by module what users
may change. A :class:`Guard` keeps all that they read as flat tuples, and compares it with what is there now, at the
speed of C: whatever is another object than it was, of another class, at another address or of another version makes it
say no. It is asked with nobody looking on: :func:`unobserved`.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from resnet_fused import extension
from resnet_fused.modules import guards
from resnet_fused.modules.matched import Matched
from resnet_fused.modules.spec import BlockSpec, find
from resnet_fused.ops import fingerprint, library, packed
from resnet_fused.ops.tensor_cache import CACHE
from resnet_fused.tuning import lookup

_ABSENT = object()
_KIND = packed.new_kind()

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Entries of a module that decide nothing of what its forward computes with given statistics.
_IDLE_ENTRIES = frozenset({
    "_non_persistent_buffers_set", "_is_full_backward_hook", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "in_channels", "out_channels",
    "transposed", "output_padding", "_reversed_padding_repeated_twice", "num_features", "momentum", "affine",
    "track_running_stats", "inplace", "num_batches_tracked",
})  # fmt: skip
# Modules that compute the same in both modes, and have no children.
_LEAVES = frozenset({nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity})
_CALLED = ("__call__", "forward", "__getattr__", "__getattribute__")
_PLAIN_TYPES = frozenset((Tensor, nn.Parameter))

_entries = operator.attrgetter("__dict__")
_code = operator.attrgetter("__code__")
_version = operator.attrgetter("_version")
_refusal = operator.methodcaller("refusal")


def unobserved(x: Any) -> bool:
    """Whether nobody would notice that ``x`` goes another way than through module calls and registered ops."""
    return library.unobserved(x) and not lookup.observed() and guards.watched() is None


class Guard:
    """All that decides what ``root`` computes between ``tensors``, as it was when this was made.

    It holds the modules below ``root`` and their tensors, not ``root``: it is to be kept by that. ``kept`` is for what
    was prepared: it is emptied as soon as that is known to be of no use.
    """

    def __init__(
        self, root: nn.Module, modules: Iterable[nn.Module], names: Sequence[str], tensors: Sequence[Tensor | None],
        matched: Iterable[Matched | None],
    ) -> None:  # fmt: skip
        """
        Args:
            modules: everything below ``root`` that is bypassed.
            names: the attributes of ``root`` through which these are found.
            tensors: what the prepared form is derived from: parameters and buffers of ``modules``.
            matched: the code that bypassed forwards, and that of ``root``, were matched with.

        Raises:
            Unguarded: something of it can change without a trace.
        """
        self.kept: dict[Any, Any] = {}
        self._tensors = tuple(t for t in tensors if t is not None)
        ticket = CACHE.ticket(_KIND, self._tensors, self._release)  # before anything is read from them
        if ticket is None or -1 in map(fingerprint.version_of, self._tensors):
            raise Unguarded("tensors of which nothing tells that they were written")
        self._ticket = ticket
        modules = tuple(dict.fromkeys(m for m in modules if m is not root))
        types, entries = tuple(map(type, modules)), tuple(map(_entries, modules))
        self._root_type, self._root_keys = type(root), ("_modules", *names)
        self._root_values = tuple(root.__dict__.get(key, _ABSENT) for key in self._root_keys)

        slots: list[Slot] = [*_children(root, names)]
        sized: list[dict[str, Any]] = []
        for module in modules:
            slots += _slots(module, sized)
        holders, keys, values = (tuple(column) for column in zip(*slots, strict=True))
        self._sweep = (
            holders, keys, values, modules, types, entries, tuple(map(tuple, entries)),
            tuple(own[name] for own in entries for name in _HOOKS), tuple(sized), tuple(map(len, sized)),
        )  # fmt: skip
        if not set(map(id, values)).issuperset(map(id, self._tensors)):
            raise Unguarded("tensors that are no parameters or buffers of the modules")

        places = dict.fromkeys((cls, name) for cls in types for name in _CALLED)
        places |= dict.fromkeys((self._root_type, name) for name in (*_CALLED, *names))
        places |= dict.fromkeys(pair for module in (root, *modules) for pair in _hiding(module))
        if any(getattr(self._root_type, name, None) is not None for name in names):
            raise Unguarded("a submodule that is hidden by an attribute of the class")
        self._classes, self._attributes = zip(*places, strict=True)
        self._found = tuple(map(getattr, self._classes, self._attributes, repeat(None)))
        self._functions = tuple(f for f in dict.fromkeys(self._found) if type(f) is FunctionType)
        self._codes = tuple(map(_code, self._functions))
        self._matched = tuple(dict.fromkeys(m for m in matched if m is not None))

        self._versions = list(map(_version, self._tensors))
        self._facts = fingerprint.facts(self._tensors)
        if not self.holds(root):
            raise Unguarded("something changed meanwhile")

    def _release(self) -> None:
        self.kept.clear()
        self._facts = []

    def holds(self, root: nn.Module) -> bool:
        """Whether all of it is as it was. ``root`` is the module that this was made of, or nothing is."""
        same, entries = operator.is_, root.__dict__
        try:
            return (
                type(root) is self._root_type
                and all(map(same, map(entries.get, self._root_keys, repeat(_ABSENT)), self._root_values))
                and _unchanged()(*self._sweep)
                and all(map(same, map(getattr, self._classes, self._attributes, repeat(None)), self._found))
                and all(map(same, map(_code, self._functions), self._codes))
                and _PLAIN_TYPES.issuperset(map(type, self._tensors))
                and list(map(_version, self._tensors)) == self._versions
                and fingerprint.facts_hold(self._facts, self._tensors)
                and not any(map(_refusal, self._matched))
                and CACHE.holds(self._ticket)
            )
        except (KeyError, AttributeError, RuntimeError):  # gone, or a tensor without a version
            return False


class Unguarded(Exception):
    """No guard can be made; the text says why."""


@functools.cache
def _unchanged() -> Callable[..., bool]:
    """The sweep over dictionaries and modules: the library's, or the one below."""
    return _sweep if extension.missing() is not None else extension.module().unchanged


def _sweep(
    holders: Any, keys: Any, values: Any, modules: Any, types: Any, entries: Any, names: Any, empty: Any, sized: Any,
    sizes: Any,
) -> bool:  # fmt: skip
    """As csrc/common/unchanged.h."""
    return (
        all(map(operator.is_, map(operator.getitem, holders, keys), values))
        and tuple(map(type, modules)) == types
        and all(map(operator.is_, map(_entries, modules), entries))
        and tuple(map(tuple, entries)) == names
        and not any(empty)
        and tuple(map(len, sized)) == sizes
    )


Slot = tuple[dict[str, Any], str, Any]


def _slots(module: nn.Module, sized: list[dict[str, Any]]) -> Iterator[Slot]:
    """What in ``module`` has to stay; dictionaries whose length has to stay go to ``sized``."""
    entries, cls = module.__dict__, type(module)
    state = entries.get("_rf_state")
    for name in _HOOKS:
        yield entries, name, entries[name]
    for name in ("_parameters", "_buffers"):
        tensors = entries[name]
        if tensors or cls not in _LEAVES:
            yield entries, name, tensors
            sized.append(tensors)
            for key, value in tensors.items():
                if key not in _IDLE_ENTRIES:
                    yield tensors, key, value
    if cls not in _LEAVES:
        yield entries, "_modules", entries["_modules"]
        sized.append(entries["_modules"])
        for key, value in entries["_modules"].items():
            yield entries["_modules"], key, value
    if state is not None:  # a block's own entries are its owner's affair, but for what its forward finds by name
        yield entries, "_rf_state", state
        names = _names(state.spec)
    else:
        names = tuple(entries)
    for name in names:
        if name not in entries or name in _IDLE_ENTRIES or name in _HOOKS:
            continue
        if name in ("_parameters", "_buffers", "_modules") or (name == "training" and cls in _LEAVES):
            continue
        value = entries[name]
        if state is None and not _lasts(name, value):
            raise Unguarded(f"{name} of a {cls.__name__} can change without a trace")
        yield entries, name, value


# Numbers that decide what a convolution, norm or pool computes.
_GEOMETRY = frozenset({
    "kernel_size", "stride", "padding", "dilation", "groups", "eps", "output_size", "ceil_mode", "return_indices",
})  # fmt: skip


def _lasts(name: str, value: Any) -> bool:
    """Whether the entry ``name`` of a module stays what it is as long as ``value`` is the same object."""
    if name not in _GEOMETRY:
        return not isinstance(value, (list, dict, set))
    if isinstance(value, tuple):
        return all(_lasts(name, one) for one in value)
    return value is None or isinstance(value, (str, numbers.Number))  # no array or tensor of one element


def _hiding(module: nn.Module) -> Iterator[tuple[type, str]]:
    """Attributes of classes that would hide the submodules which a block's forward finds by name."""
    state = module.__dict__.get("_rf_state")
    for path, names in () if state is None else state.spec.children:
        owner = find(module, path)
        if owner is not None:
            yield from ((type(owner), name) for name in names)


def _names(spec: BlockSpec) -> tuple[str, ...]:
    return tuple(name for owner, names in spec.children if not owner for name in names)


def _children(root: nn.Module, names: Sequence[str]) -> Iterator[Slot]:
    for name in names:
        if name in root._modules:
            yield root._modules, name, root._modules[name]
