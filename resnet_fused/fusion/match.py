"""Whether a module can be fused, part by part, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resnet_fused.fusion.adapters import find_adapter, find_stem
from resnet_fused.fusion.adapters.table import KINDS
from resnet_fused.modules import live, parts
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.block import FusedBlock
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.known import name_of
from resnet_fused.modules.spec import BlockSpec, find


@dataclass(frozen=True)
class Match:
    """What was found out about one module.

    kind is "basic_block", "bottleneck", "stem" or "conv_bn_act"; spec and fused are None where a class is known only
    as one to leave alone; reason says why it is left alone, and is None where it can be fused; note says what of a
    block that can be fused stays eager.
    """

    kind: str
    spec: BlockSpec | None
    fused: type[FusedModule] | None
    reason: str | None
    note: str = ""


def match(module: nn.Module) -> Match | None:
    """What ``fuse`` can do with this module, or None where it is neither a block nor the owner of a stem."""
    if isinstance(module, FusedModule):
        return _match_fused(module)
    adapter = find_adapter(module)
    if isinstance(adapter, str):
        return Match("block", None, None, adapter)
    if adapter is not None:
        reason = adapter.refusal(module) or _instance_refusal(module) or _refusal(module, adapter.spec)
        return Match(adapter.kind, adapter.spec, KINDS[adapter.kind], reason, _note(module, adapter.spec))
    stem = find_stem(module)
    if isinstance(stem, str):
        return Match("stem", None, None, stem)
    if stem is not None:
        reason = stem.refusal(module) or _instance_refusal(module) or _refusal(module, stem.spec)
        return Match("stem", stem.spec, stem.fused, reason)
    return None


def _match_fused(module: FusedModule) -> Match:
    spec = module._fused.spec
    reason = _refusal(module, spec)
    if isinstance(module, FusedBlock):
        return Match("basic_block" if len(spec.pairs) == 2 else "bottleneck", spec, None, reason, _note(module, spec))
    return Match("stem" if isinstance(module, FusedStem) else "conv_bn_act", spec, None, reason)


def pairs_of(module: nn.Module, spec: BlockSpec) -> list[tuple[nn.Conv2d, nn.Module]]:
    """The convolutions and norms that are fused, with the projection's."""
    pairs: list[Any] = [(find(module, c), find(module, n)) for c, n in spec.pairs]
    shortcut = None if spec.shortcut is None else live.shortcut(find(module, spec.shortcut))
    return pairs + ([(shortcut.conv, shortcut.norm)] if isinstance(shortcut, live.Projection) else [])


def _refusal(module: nn.Module, spec: BlockSpec) -> str | None:
    """Why the parts of ``module`` cannot be fused, or None when they can."""
    for conv_path, norm_path in spec.pairs:
        conv, norm = find(module, conv_path), find(module, norm_path)
        reason = conv_refusal(conv, ".".join(conv_path)) or norm_refusal(norm, ".".join(norm_path))
        if reason is not None:
            return reason
    for act_path in spec.acts:
        act, name = find(module, act_path), ".".join(act_path)
        if type(act) is not nn.ReLU:
            return f"{name} is {_class(act)}, need nn.ReLU"
        if parts.touched(act):
            return watched_reason(act, name)
    for idle_path in spec.idle:
        found = live.lookup(module, idle_path)
        if not live.idle(found):
            return f"{'.'.join(idle_path)} is {_class(found)}, need None or nn.Identity"
    for path, length in spec.containers:
        container: Any = find(module, path)
        name = ".".join(path)
        if not live.is_container(container, path, spec) or len(container) != length:
            return f"{name} is not the Sequential of {length} modules that it was"
        if parts.touched(container):
            return watched_reason(container, name)
    for path, class_name in spec.wrappers:
        wrapper, name = find(module, path), ".".join(path)
        if wrapper is None or name_of(type(wrapper)) != class_name or not _own_forward(type(wrapper)):
            return f"{name} is {_class(wrapper)}, need {'.'.join(class_name)} with its own forward"
        if parts.touched(wrapper):
            return watched_reason(wrapper, name)
    shortcut = None if spec.shortcut is None else live.lookup(module, spec.shortcut)
    if shortcut is not None and not isinstance(shortcut, nn.Module):
        return f"{'.'.join(spec.shortcut or ())} is no module but a {type(shortcut).__name__}"
    return None


def _own_forward(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` has a forward as some class's own source defines it, rather than a patched one."""
    base = next(base for base in cls.__mro__ if "forward" in vars(base))
    forward = vars(base)["forward"]
    origin = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
    return origin == (base.__module__, f"{base.__qualname__}.forward")


def _note(module: nn.Module, spec: BlockSpec) -> str:
    """What of a block that can be fused stays eager."""
    stays = [
        ".".join(path)
        for paths in spec.extras
        for path in paths
        if not live.idle(live.lookup(module, path))
    ]  # fmt: skip
    notes = [f"{', '.join(stays)} stay{'' if len(stays) > 1 else 's'} eager"] if stays else []
    if spec.shortcut is not None:
        found = find(module, spec.shortcut)
        notes += [_shortcut_note(found, ".".join(spec.shortcut))] if found is not None else []
    return "; ".join(filter(None, notes))


def _shortcut_note(module: nn.Module, name: str) -> str:
    found = live.shortcut(module)
    if found is None:
        return ""
    if isinstance(found, live.Projection):
        return f"the {type(found.before[0]).__name__} in {name} stays eager" if found.before else ""
    why = "not a Sequential that ends in convolution and batch norm"
    if type(module) is nn.Sequential and not parts.touched(module) and len(module) == 2:
        why = conv_refusal(module[0], f"{name}.0") or norm_refusal(module[1], f"{name}.1") or why
    elif parts.touched(module):
        why = watched_reason(module, name)
    return f"{name} stays eager: {why}"


def _instance_refusal(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    return None


def conv_refusal(conv: nn.Module | None, name: str) -> str | None:
    """Why this convolution cannot be part of a fused op, or None when it can."""
    if conv is not None and parametrize.is_parametrized(conv):
        return f"{name} is parametrized"
    if not isinstance(conv, nn.Conv2d) or not parts.is_plain_conv(conv):
        return f"{name} is {_class(conv)}, need nn.Conv2d"
    if parts.touched(conv):
        return watched_reason(conv, name)
    if conv.padding_mode != "zeros":
        return f"{name} has padding_mode={conv.padding_mode!r}, need 'zeros'"
    weight = conv.weight
    if not weight.is_floating_point():
        return f"{name}.weight is {weight.dtype}, need a floating-point dtype"
    if type(weight) not in (nn.Parameter, Tensor) and not isinstance(weight, torch._subclasses.FakeTensor):
        return f"{name}.weight is a tensor of class {type(weight).__name__}"
    if conv.padding == "same" and not parts.symmetric(conv):
        return f"{name} has padding='same' with an even filter, which pads one side more"
    return None


def norm_refusal(norm: nn.Module | None, name: str) -> str | None:
    """Why this norm cannot be part of a fused op, or None when it can."""
    if norm is not None and parametrize.is_parametrized(norm):
        return f"{name} is parametrized"
    if norm is None or (type(norm) not in parts.BATCH_NORMS and not parts.is_frozen_norm(type(norm))):
        return f"{name} is {_class(norm)}, need nn.BatchNorm2d, nn.SyncBatchNorm or FrozenBatchNorm2d"
    if parts.touched(norm):
        return watched_reason(norm, name)
    if norm.running_mean is None or norm.running_var is None:
        return f"{name} has no running statistics (track_running_stats=False)"
    return None


def watched_reason(module: nn.Module, name: str) -> str:
    """The refusal of a module for which ``parts.touched`` is true."""
    if "forward" in module.__dict__:
        return f"the forward of {name} was replaced on the instance"
    return f"{name} has hooks (weight_norm, spectral_norm and pruning are hooks too)"


def _class(module: nn.Module | None) -> str:
    if module is None:
        return "absent"
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"
