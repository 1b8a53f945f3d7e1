"""The known block classes: one table per model family, looked up by the class's module path and name.

A table names classes and says where their parts are, so a family whose package is not installed costs nothing.
"""

from __future__ import annotations

import threading
from abc import ABCMeta
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import nn

from resnet_fused.fusion.adapters import (
    detectron2,
    huggingface,
    open_clip,
    openmmlab,
    others,
    smp,
    source,
    timm,
    torchvision,
)
from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.modules.guards import own_method
from resnet_fused.modules.matched import reached
from resnet_fused.modules.spec import BlockSpec

__all__ = ["BlockAdapter", "StemAdapter", "find_adapter", "find_stem", "register_adapter"]

_BLOCKS: dict[str, BlockAdapter | Callable[[nn.Module], BlockAdapter]] = {
    **torchvision.BLOCKS,
    **timm.BLOCKS,
    **huggingface.BLOCKS,
    **smp.BLOCKS,
    **open_clip.BLOCKS,
    **detectron2.BLOCKS,
    **openmmlab.BLOCKS,
    **others.BLOCKS,
}
_REFUSED: dict[str, str] = {**torchvision.REFUSED, **timm.REFUSED, **detectron2.REFUSED}
_STEMS: dict[str, StemAdapter | Callable[[nn.Module], StemAdapter]] = {
    **torchvision.STEMS,
    **timm.STEMS,
    **huggingface.STEMS,
    **smp.STEMS,
    **open_clip.STEMS,
    **detectron2.STEMS,
}
_REGISTERED: dict[type, tuple[BlockAdapter, dict[str, Any]]] = {}  # with the functions of the class, by name
_LOCK = threading.Lock()


def register_adapter(
    cls: type[nn.Module],
    *,
    convs: tuple[str, ...],
    norms: tuple[str, ...],
    acts: tuple[str, ...] = (),
    shortcut: str | None = None,
    idle: tuple[str, ...] = (),
) -> None:
    """Let ``fuse`` take your own class of residual blocks.

    Its forward must compute, with two or three convolutions::

        h = x
        for conv, norm in zip(convs, norms): h = norm(conv(h)), followed by a ReLU except at the end
        return relu(h + (x if shortcut is None else shortcut(x)))

    Args:
        cls: the block's class. A subclass of it is taken only while it has the same forward.
        convs, norms: dotted attribute paths, in the order of computation.
        acts: paths of all the ReLU modules that forward uses; empty when it calls ``F.relu``.
        shortcut: path of the projection; where it is None or an empty Sequential in a block, x itself is added.
        idle: paths of modules that must be None or nn.Identity for the above to hold.

    ``verify(block, x)`` compares a block with its fused form on your input.

    Raises:
        TypeError: ``cls`` is not a class of modules with a forward of its own.
        ValueError: not two or three convolutions, or not one norm for each.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or cls.forward is nn.Module.forward:
        raise TypeError(f"cls: got {cls!r}, need a subclass of nn.Module that defines forward")
    if len(convs) not in (2, 3) or len(norms) != len(convs):
        raise ValueError(f"convs, norms: got {len(convs)} and {len(norms)} paths, need two or three of each")
    if not isinstance(cls.forward, FunctionType):
        raise TypeError(f"cls: the forward of {cls.__name__} is no plain function")
    spec = BlockSpec.of(" ".join(convs), " ".join(norms), " ".join(acts), shortcut, " ".join(idle))
    with _LOCK:
        _REGISTERED[cls] = (BlockAdapter("basic_block" if len(convs) == 2 else "bottleneck", spec), _functions(cls))


def find_adapter(module: nn.Module) -> BlockAdapter | str | None:
    """The adapter of a block; the reason why a relative of a known class cannot be taken; None for anything else."""
    cls = type(module)
    for base in cls.__mro__:
        if base in _REGISTERED:
            adapter, functions = _REGISTERED[base]
            same = _functions(cls) == functions and _called_plainly(cls)
            return replace(adapter, methods=tuple(functions)) if same else _other_forward(cls, base)
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _REFUSED:
            return _REFUSED[name]
        if name in _BLOCKS:
            same = _own_methods(cls, base, ("forward",)) and _called_plainly(cls)
            entry = _BLOCKS[name]
            if not same:
                return _other_forward(cls, base)
            adapter = entry if isinstance(entry, BlockAdapter) else entry(module)
            return replace(adapter, methods=reached(cls, adapter.methods))
    return source.read_block(module) if _called_plainly(cls) else None


def find_stem(module: nn.Module) -> StemAdapter | str | None:
    """The adapter of a model's stem; the reason why a relative of a known model's cannot be taken; None otherwise."""
    cls = type(module)
    for base in cls.__mro__:
        stem = _STEMS.get(f"{base.__module__}.{base.__qualname__}")
        if stem is not None:
            adapter = stem if isinstance(stem, StemAdapter) else stem(module)
            same = _own_methods(cls, base, adapter.methods) and _called_plainly(cls)
            return adapter if same else _other_forward(cls, base)
    return None


def _functions(cls: type[nn.Module]) -> dict[str, Any]:
    """The forward of ``cls`` and the methods that it may call."""
    return {name: getattr(cls, name) for name in reached(cls, ("forward",))}


def _own_methods(cls: type[nn.Module], base: type, names: tuple[str, ...]) -> bool:
    """Whether ``cls`` has these methods of ``base``, and those that they call, as the classes' own source defines them:
    neither overridden nor patched."""
    if any(getattr(cls, name) is not vars(base).get(name) for name in names):
        return False
    return all(own_method(cls, n) for n in reached(cls, names) if isinstance(getattr(cls, n), FunctionType))


def _called_plainly(cls: type[nn.Module]) -> bool:
    """Whether a call of such a module is a call of its forward, its attributes are found as nn.Module finds them, and
    a class can be derived from it without a metaclass that interferes."""
    plain = all(getattr(cls, name) is getattr(nn.Module, name) for name in _MACHINERY)
    return plain and type(cls) in (type, ABCMeta)


_MACHINERY = ("__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward", "__getattr__", "__getattribute__")


def _other_forward(cls: type, base: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__} has another forward than {base.__module__}.{base.__qualname__}"
