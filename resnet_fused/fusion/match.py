"""Whether a module can be fused, part by part, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resnet_fused.fusion.adapters import find_adapter, find_stem
from resnet_fused.fusion.adapters.table import KINDS
from resnet_fused.modules import parts
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.block import FusedBlock, as_shortcut, idle
from resnet_fused.modules.conv_bn_relu import FusedStem
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
        reason = _instance_refusal(module) or _refusal(module, adapter.spec)
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
    shortcut = None if spec.shortcut is None else as_shortcut(find(module, spec.shortcut))
    return pairs + ([shortcut] if isinstance(shortcut, tuple) else [])


def _refusal(module: nn.Module, spec: BlockSpec) -> str | None:
    """Why the parts of ``module`` cannot be fused, or None when they can."""
    for conv_path, norm_path in spec.pairs:
        conv, norm = find(module, conv_path), find(module, norm_path)
        reason = _conv_refusal(conv, ".".join(conv_path)) or _norm_refusal(norm, ".".join(norm_path))
        if reason is not None:
            return reason
    for act_path in spec.acts:
        act, name = find(module, act_path), ".".join(act_path)
        if type(act) is not nn.ReLU:
            return f"{name} is {_class(act)}, need nn.ReLU"
        if parts.touched(act):
            return _touched(act, name)
    for idle_path in spec.idle:
        found = find(module, idle_path)
        if not idle(found):
            return f"{'.'.join(idle_path)} is {_class(found)}, need None or nn.Identity"
    for path, length in spec.containers:
        container, name = find(module, path), ".".join(path)
        if type(container) is not nn.Sequential or len(container) != length:
            return f"{name} is not the Sequential of {length} modules that it was"
        if parts.touched(container):
            return _touched(container, name)
    return None


def _note(module: nn.Module, spec: BlockSpec) -> str:
    shortcut = None if spec.shortcut is None else find(module, spec.shortcut)
    found = as_shortcut(shortcut)
    if not isinstance(found, nn.Module) or spec.shortcut is None:
        return ""
    name = ".".join(spec.shortcut)
    why = "not a Sequential of convolution and batch norm"
    if type(found) is nn.Sequential and not parts.touched(found) and len(found) == 2:
        why = _conv_refusal(found[0], f"{name}.0") or _norm_refusal(found[1], f"{name}.1") or why
    elif parts.touched(found):
        why = _touched(found, name)
    return f"{name} stays eager: {why}"


def _instance_refusal(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    return None


def _conv_refusal(conv: nn.Module | None, name: str) -> str | None:
    if conv is not None and parametrize.is_parametrized(conv):
        return f"{name} is parametrized"
    if not isinstance(conv, nn.Conv2d) or type(conv) is not nn.Conv2d:
        return f"{name} is {_class(conv)}, need nn.Conv2d"
    if parts.touched(conv):
        return _touched(conv, name)
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


def _norm_refusal(norm: nn.Module | None, name: str) -> str | None:
    if norm is not None and parametrize.is_parametrized(norm):
        return f"{name} is parametrized"
    if norm is None or (type(norm) not in parts.BATCH_NORMS and not parts.is_frozen_norm(type(norm))):
        return f"{name} is {_class(norm)}, need nn.BatchNorm2d, nn.SyncBatchNorm or FrozenBatchNorm2d"
    if parts.touched(norm):
        return _touched(norm, name)
    if norm.running_mean is None or norm.running_var is None:
        return f"{name} has no running statistics (track_running_stats=False)"
    return None


def _touched(module: nn.Module, name: str) -> str:
    if "forward" in module.__dict__:
        return f"the forward of {name} was replaced on the instance"
    return f"{name} has hooks (weight_norm, spectral_norm and pruning are hooks too)"


def _class(module: nn.Module | None) -> str:
    if module is None:
        return "absent"
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"
