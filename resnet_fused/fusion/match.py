"""Decide whether a module can be fused, part by part, and say why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from resnet_fused.fusion.adapters import find_adapter, find_stem
from resnet_fused.fusion.adapters.table import KINDS
from resnet_fused.modules import guards, live
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.block import FusedBlock
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.guards import conv_refusal, dotted, norm_refusal
from resnet_fused.modules.guards import touched_reason as watched_reason
from resnet_fused.modules.matched import Matched, reached
from resnet_fused.modules.spec import BlockSpec, find

__all__ = ["Match", "conv_refusal", "match", "norm_refusal", "pairs_of", "watched_reason"]


@dataclass(frozen=True)
class Match:
    """How one module matches.

    kind is "basic_block", "bottleneck", "stem" or "conv_bn_act"; spec and fused are None where a class is known only
    as one to leave alone; reason says why it is left alone, and is None where it can be fused; note says what of a
    block that can be fused stays eager; matched are the functions that spec was read from.
    """

    kind: str
    spec: BlockSpec | None
    fused: type[FusedModule] | None
    reason: str | None
    note: str = ""
    matched: Matched | None = None


def match(module: nn.Module) -> Match | None:
    """The match of this module, or None where it is neither a block nor the owner of a stem."""
    if isinstance(module, FusedModule):
        return _match_fused(module)
    adapter = find_adapter(module)
    if isinstance(adapter, str):
        return Match("block", None, None, adapter)
    if adapter is not None:
        matched = Matched(type(module), adapter.methods, adapter.names)
        reason = adapter.refusal(module) or _instance_refusal(module) or _refusal(module, adapter.spec, matched)
        return Match(adapter.kind, adapter.spec, KINDS[adapter.kind], reason, _note(module, adapter.spec), matched)
    stem = find_stem(module)
    if isinstance(stem, str):
        return Match("stem", None, None, stem)
    if stem is not None:
        matched = Matched(type(module), reached(type(module), stem.methods))
        reason = stem.refusal(module) or _instance_refusal(module) or _refusal(module, stem.spec, matched)
        return Match("stem", stem.spec, stem.fused, reason, matched=matched)
    return None


def _match_fused(module: FusedModule) -> Match:
    spec = module._rf_state.spec
    reason = _replaced_forward(module) or _refusal(module, spec, module._rf_state.matched)
    if isinstance(module, FusedBlock):
        return Match("basic_block" if len(spec.pairs) == 2 else "bottleneck", spec, None, reason, _note(module, spec))
    return Match("stem" if isinstance(module, FusedStem) else "conv_bn_act", spec, None, reason)


def pairs_of(module: nn.Module, spec: BlockSpec) -> list[tuple[nn.Conv2d, nn.Module]]:
    """The convolutions and norms that are fused, with the projection's."""
    pairs: list[Any] = [(find(module, c), find(module, n)) for c, n in spec.pairs]
    shortcut = None if spec.shortcut is None else live.shortcut(find(module, spec.shortcut))
    return pairs + ([(shortcut.conv, shortcut.norm)] if isinstance(shortcut, live.Projection) else [])


def _refusal(module: nn.Module, spec: BlockSpec, matched: Matched | None) -> str | None:
    """Why the parts of ``module`` cannot be fused, or None when they can: what its forward asks at each call."""
    found = live.read(module, spec, matched)
    return guards.replaced() or (found if isinstance(found, str) else None)


def _note(module: nn.Module, spec: BlockSpec) -> str:
    """What of a block that can be fused stays eager."""
    stays = [
        dotted(path)
        for paths in spec.extras
        for path in paths
        if not guards.idle(live.lookup(module, path))
    ]  # fmt: skip
    notes = [f"{', '.join(stays)} stay{'' if len(stays) > 1 else 's'} eager"] if stays else []
    branch = None if spec.shortcut is None else find(module, spec.shortcut)
    if branch is not None:
        notes.append(_shortcut_note(branch, dotted(spec.shortcut or ())))
    return "; ".join(filter(None, notes))


def _shortcut_note(module: nn.Module, name: str) -> str:
    found = live.shortcut(module)
    if found is None:
        return ""
    if isinstance(found, live.Projection):
        return f"the {type(found.before[0]).__name__} in {name} stays eager" if found.before else ""
    return f"{name} stays eager: {live.why_called(module, name)}"


def _instance_refusal(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    return _replaced_forward(module)


def _replaced_forward(module: nn.Module) -> str | None:
    return "its forward was replaced on the instance" if "forward" in module.__dict__ else None
