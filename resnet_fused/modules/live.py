"""The parts of a block or stem, read at each call, because users change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnet_fused.modules import guards
from resnet_fused.modules.guards import dotted, idle
from resnet_fused.modules.known import NORMED_CONVS, PROJECTIONS, name_of
from resnet_fused.modules.matched import Matched
from resnet_fused.modules.spec import BlockSpec, Path, find

Pair = tuple[nn.Conv2d, nn.Module]
Step = Callable[[Tensor], Tensor]


class Projection(NamedTuple):
    """A shortcut: the modules before, average pools as a rule, then a bypassable convolution and norm."""

    before: tuple[nn.Module, ...]
    conv: nn.Conv2d
    norm: nn.Module


class Called(NamedTuple):
    """A shortcut that is called as it is; pure: it does not matter when, and how often."""

    module: nn.Module
    pure: bool


Shortcut = Projection | Called | None  # None: x itself


class Parts(NamedTuple):
    """The parts of a block at this call; extras are called on each pair's result, None where there are none."""

    pairs: list[Pair]
    shortcut: Shortcut
    extras: list[list[Step]] | None


def lookup(module: nn.Module, keys: Path) -> Any:
    """What is at ``keys``: a submodule, or whatever else the attribute holds (a function); None where there is none."""
    found = find(module, keys)
    if found is not None:
        return found
    owner = module if len(keys) == 1 else find(module, keys[:-1])
    return getattr(owner, keys[-1], None)


def read(module: nn.Module, spec: BlockSpec, matched: Matched | None) -> Parts | str:
    """The parts of a block or stem, or why they may not be bypassed at the moment.

    It does not ask for modes and tracers: :func:`guards.watched` does.
    """
    reason = (None if matched is None else matched.refusal()) or _hidden(module, spec)
    if reason is not None:
        return reason
    pairs: list[Any] = []
    for conv_path, norm_path in spec.pairs:
        conv, norm = find(module, conv_path), find(module, norm_path)
        reason = guards.pair_refusal(conv, norm, conv_path, norm_path)
        if reason is not None:
            return reason
        pairs.append((conv, norm))
    for act_path in spec.acts:
        reason = guards.relu_refusal(find(module, act_path), act_path)
        if reason is not None:
            return reason
    for idle_path in spec.idle:
        if not idle(found := lookup(module, idle_path)):
            return f"{dotted(idle_path)} is {guards.class_name(found)}, need None or nn.Identity"
    reason = _containers_refusal(module, spec) if spec.containers or spec.wrappers else None
    if reason is not None:
        return reason
    extras = _extras(module, spec) if spec.extras else None
    if spec.shortcut is None:
        return Parts(pairs, None, extras)
    branch = lookup(module, spec.shortcut)
    if not isinstance(branch, nn.Module):
        if branch is not None:
            return f"{dotted(spec.shortcut)} is no module but a {type(branch).__name__}"
        if not spec.optional:
            return f"{dotted(spec.shortcut)} is None, which the forward calls"
    elif spec.optional == "truth" and not branch:
        branch = None
    found = shortcut(branch)
    if isinstance(found, Called) and not found.pure and (not spec.adds or extras is not None):
        return f"{dotted(spec.shortcut)} may do more than return a new tensor, so the moment of its call matters"
    if isinstance(found, Projection) and not all(map(guards.pure, found.before)):
        return f"{dotted(spec.shortcut)} begins with a module that may do more than return a new tensor"
    return Parts(pairs, found, extras)


def _hidden(module: nn.Module, spec: BlockSpec) -> str | None:
    """Which submodule is not what Python finds under its name: an attribute of the instance or the class hides it."""
    for path, names in spec.children:
        owner = find(module, path) if path else module
        if owner is None:
            continue
        modules, entries, cls = owner._modules, owner.__dict__, type(owner)
        for name in names:
            if name in modules and (name in entries or hasattr(cls, name)):
                return f"{dotted((*path, name))} is hidden by an attribute of that name"
    return None


def _containers_refusal(module: nn.Module, spec: BlockSpec) -> str | None:
    for path, count in spec.containers:
        container: Any = find(module, path)
        if not _is_container(container, path, spec) or len(container) != count:
            return f"{dotted(path)} is not the Sequential of {count} modules that it was"
        if guards.touched(container):
            return guards.touched_reason(container, dotted(path))
    for path, name in spec.wrappers:
        wrapper = find(module, path)
        if wrapper is None or name_of(type(wrapper)) != name or not guards.own_forward(type(wrapper)):
            return f"{dotted(path)} is {guards.class_name(wrapper)}, need {dotted(name)} with its own forward"
        if guards.touched(wrapper):
            return guards.touched_reason(wrapper, dotted(path))
    return None


def _is_container(module: nn.Module | None, keys: Path, spec: BlockSpec) -> bool:
    """Whether ``module`` calls its children in turn: a Sequential, or one of the class that ``spec`` names."""
    return type(module) is nn.Sequential or (isinstance(module, nn.Sequential) and keys in dict(spec.wrappers))


def _extras(module: nn.Module, spec: BlockSpec) -> list[list[Step]] | None:
    """The modules to call behind each pair, or None when there are none at the moment."""
    found = [[step for path in paths if not idle(step := lookup(module, path))] for paths in spec.extras]
    return found if any(found) else None


def shortcut(module: nn.Module | None) -> Shortcut:
    """``module`` as a projection where it is one; None where it does nothing; itself, to be called, otherwise."""
    if module is None or idle(module):
        return None
    steps = [module]
    if type(module) is nn.Sequential and not guards.touched(module):
        steps = [child for child in module._modules.values() if not idle(child)]
        if not steps:
            return None
    last = steps[-1]
    name = name_of(type(last))
    if name in PROJECTIONS and tuple(last._modules) == PROJECTIONS[name]:
        if not guards.touched(last) and guards.own_forward(type(last)):
            steps[-1:] = [last._modules[key] for key in PROJECTIONS[name]]  # type: ignore[misc]
    elif name in NORMED_CONVS:
        steps.append(last._modules.get("norm"))  # type: ignore[arg-type]
    if len(steps) >= 2 and guards.pair_refusal(steps[-2], steps[-1], "", "") is None:
        return Projection(tuple(steps[:-2]), steps[-2], steps[-1])  # type: ignore[arg-type]
    return Called(module, guards.pure(module))


def why_called(module: nn.Module, name: str) -> str:
    """Why a shortcut is called as it is, rather than computed as a convolution and norm."""
    if guards.touched(module):
        return guards.touched_reason(module, name)
    if type(module) is nn.Sequential and len(module) == 2:
        reason = guards.pair_refusal(module[0], module[1], f"{name}.0", f"{name}.1")
        if reason is not None:
            return reason
    return "not a Sequential that ends in convolution and batch norm"
