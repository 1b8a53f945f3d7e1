"""The generic path: chains of operations in the forward of any module, fused one module at a time.

Each module is examined by itself: its own forward is traced, its submodules left whole. A chain that is found is
computed as one op by the module's new forward; the submodules stay what they are, and can be called as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from resnet_fused import backends
from resnet_fused.fusion.chains import SUM, analyse, within_reach
from resnet_fused.fusion.choice import chosen_backend, chosen_sum
from resnet_fused.fusion.report import FUSED, SKIPPED, FusionEntry
from resnet_fused.fusion.trace import runs_in_turn
from resnet_fused.modules import live
from resnet_fused.modules.base import FusedModule, adopt
from resnet_fused.modules.block import FusedBlock
from resnet_fused.modules.spec import BlockSpec, find
from resnet_fused.modules.traced import NO_SPEC, Chain, FusedForward, TracedState

Filter = Callable[[str, nn.Module], bool]

NOT_FUSED = "can be fused, but fuse was not asked to"


def fuse_generic(
    model: nn.Module, backend: str, filter_fn: Filter | None, channels_last: bool, dropouts: tuple[nn.Module, ...]
) -> None:
    """Fuse, in place, the chains in every module that is not taken by an adapter already."""
    for name, module in list(_owners(model, set())):

        def wanted(chain: Chain, part: nn.Module, name: str = name) -> bool:
            return filter_fn is None or filter_fn(_label(name, chain), part)

        plans = analyse(module, backend, wanted).plans
        if not plans:
            continue
        if isinstance(module, FusedForward):
            module.__dict__["_rf_state"] = dataclasses.replace(
                module._rf_state, backend=backend, plans=plans, channels_last=channels_last, dropouts=dropouts
            )
        else:
            state = TracedState(NO_SPEC, backend, channels_last=channels_last, dropouts=dropouts, plans=plans)
            adopt(module, FusedForward, state)


def generic_entries(
    model: nn.Module, taken: set[int], backend: str | None = None, filter_fn: Filter | None = None
) -> list[FusionEntry]:
    """Entries of the report: what a ``fuse`` with ``backend`` would do, or, where that is None, what one has done.

    ``taken`` are the modules, by identity, that adapters would take.
    """
    entries: dict[str, FusionEntry] = {}
    for name, module in _owners(model, taken):
        fused = module if isinstance(module, FusedForward) else None
        by = backend or (backends.AUTO if fused is None else fused._rf_state.backend)
        plans = () if fused is None else fused._rf_state.plans  # a module may have a length of 0
        planned = {c.name for plan in plans for c in plan.chains}
        stale = next((r for plan in plans if (r := plan.refusal(module))), None)
        for item in analyse(module, by).found:
            chain, label = item.chain, _label(name, item.chain)
            conv = None if chain.conv is None else find(module, chain.conv)
            reason = item.reason or stale
            if reason is None and chain.name not in planned:
                asked = backend is not None and (
                    filter_fn is None or filter_fn(label, module if conv is None else conv)
                )
                reason = None if asked else NOT_FUSED
            if reason is None:
                entry = FusionEntry(label, chain.kind, FUSED, chain.note, _backend(module, chain, by))
            else:
                entry = FusionEntry(label, chain.kind, SKIPPED, reason)
            if label not in entries or entries[label].status == SKIPPED:  # a container's chains are its owner's too
                entries[label] = entry
    return list(entries.values())


def taken_by(module: nn.Module, spec: BlockSpec) -> set[int]:
    """The modules that a fused block replaces: itself and all in it, but not those that it calls as modules."""
    called: list[Any] = [live.lookup(module, path) for paths in spec.extras for path in paths]
    if spec.shortcut is not None:
        shortcut = live.shortcut(live.lookup(module, spec.shortcut))
        called += shortcut.before if isinstance(shortcut, live.Projection) else [shortcut and shortcut.module]
    spare = {id(m) for found in called if isinstance(found, nn.Module) for m in found.modules()}
    return {id(m) for m in module.modules()} - spare


def _owners(model: nn.Module, taken: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward may hold chains that no adapter takes."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            taken = taken | taken_by(module, module._rf_state.spec)
    for name, module in model.named_modules():
        if id(module) in taken or (isinstance(module, FusedModule) and not isinstance(module, FusedForward)):
            continue
        plain = type(module).__module__.startswith("torch.nn.") and not runs_in_turn(module)
        if not plain and any(isinstance(m, (nn.Conv2d, nn.ReLU)) for m in within_reach(module)):
            yield name, module


def _label(owner: str, chain: Chain) -> str:
    """A chain's name in the report: its convolution's path in the model, or its sum's in its module."""
    return ".".join(filter(None, (owner, chain.name)))


def _backend(module: nn.Module, chain: Chain, backend: str) -> str:
    if chain.kind == SUM:
        if backend != backends.AUTO:
            return backend
        weight = next(module.parameters(), None)
        return "reference" if weight is None else chosen_sum(weight.detach().new_zeros(1, 1))
    assert chain.conv is not None and chain.norm is not None
    pairs: list[Any] = [(find(module, chain.conv), find(module, chain.norm))]
    return chosen_backend(chain.kind, pairs, backend)
