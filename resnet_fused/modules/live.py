"""A block's or stem's parts as they are at this moment: read anew at each call, since users change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnet_fused.modules import parts
from resnet_fused.modules.known import NORMED_CONVS, PROJECTIONS, name_of
from resnet_fused.modules.spec import BlockSpec, Path, find

Pair = tuple[nn.Conv2d, nn.Module]
Step = Callable[[Tensor], Tensor]


class Projection(NamedTuple):
    """A shortcut: the modules before, average pools as a rule, then a bypassable convolution and norm."""

    before: tuple[nn.Module, ...]
    conv: nn.Conv2d
    norm: nn.Module


def lookup(module: nn.Module, keys: Path) -> Any:
    """What is at ``keys``: a submodule, or whatever else the attribute holds (a function); None where there is none."""
    found = find(module, keys)
    if found is not None:
        return found
    owner = module if len(keys) == 1 else find(module, keys[:-1])
    return getattr(owner, keys[-1], None)


def idle(module: Any) -> bool:
    """Whether ``module`` does nothing."""
    return module is None or (type(module) is nn.Identity and not parts.touched(module))


def pairs(module: nn.Module, spec: BlockSpec) -> list[Pair] | None:
    """The convolutions and norms, or None when something may not be bypassed at the moment."""
    found: list[Any] = []
    for conv_path, norm_path in spec.pairs:
        conv, norm = find(module, conv_path), find(module, norm_path)
        if not parts.bypassable(conv, norm):
            return None
        found.append((conv, norm))
    for act_path in spec.acts:
        act = find(module, act_path)
        if act is None or not parts.plain_relu(act):
            return None
    for idle_path in spec.idle:
        if not idle(lookup(module, idle_path)):
            return None
    for path, count in spec.containers:
        container: Any = find(module, path)
        if not is_container(container, path, spec) or parts.touched(container) or len(container) != count:
            return None
    for path, name in spec.wrappers:
        wrapper = find(module, path)
        if wrapper is None or name_of(type(wrapper)) != name or parts.touched(wrapper):
            return None
    return None if parts.watched() else found


def is_container(module: nn.Module | None, keys: Path, spec: BlockSpec) -> bool:
    """Whether ``module`` calls its children in turn: a Sequential, or one of the class that ``spec`` names."""
    return type(module) is nn.Sequential or (isinstance(module, nn.Sequential) and keys in dict(spec.wrappers))


def extras(module: nn.Module, spec: BlockSpec) -> list[list[Step]] | None:
    """The modules to call behind each pair, or None when there are none at the moment."""
    found = [[step for path in paths if not idle(step := lookup(module, path))] for paths in spec.extras]
    return found if any(found) else None


def shortcut(module: Any) -> Projection | Step | None:
    """``module`` as a projection where it is one; None where it does nothing; itself, to be called, otherwise."""
    if idle(module):
        return None
    steps = [module]
    if type(module) is nn.Sequential and not parts.touched(module):
        steps = [child for child in module._modules.values() if not idle(child)]
        if not steps:
            return None
    last = steps[-1]
    name = name_of(type(last))
    if name in PROJECTIONS and not parts.touched(last) and tuple(last._modules) == PROJECTIONS[name]:
        steps[-1:] = [find(last, (key,)) for key in PROJECTIONS[name]]
    elif name in NORMED_CONVS:
        steps.append(find(last, ("norm",)))
    if len(steps) >= 2 and parts.bypassable(steps[-2], steps[-1]):
        return Projection(tuple(steps[:-2]), steps[-2], steps[-1])
    return module  # type: ignore[no-any-return]
