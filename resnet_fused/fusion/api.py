"""fuse, unfuse and their reports."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from resnet_fused import backends
from resnet_fused.fusion.choice import chosen_backend
from resnet_fused.fusion.generic import NOT_FUSED, fuse_generic, generic_entries, taken_by
from resnet_fused.fusion.match import Match, match, pairs_of
from resnet_fused.fusion.report import FUSED, SKIPPED, FusionEntry, FusionReport
from resnet_fused.modules import parts
from resnet_fused.modules.base import FusedModule, adopt, original_class, release
from resnet_fused.modules.spec import FusedState
from resnet_fused.modules.traced import FusedForward

M = TypeVar("M", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool]


class FusionError(ValueError):
    """``fuse(strict=True)`` found a block that cannot be fused; the message names it and says why."""


def fuse(
    model: M,
    *,
    inplace: bool = False,
    backend: str = "auto",
    filter_fn: Filter | None = None,
    strict: bool = False,
    memory_format: torch.memory_format = torch.channels_last,
    recompute: str | None = None,
    generic: bool = False,
    tune: Any = None,
    cuda_graph: bool = False,
) -> M:
    """Make the residual blocks and the stem of ``model`` run as fused ops.

    Each part keeps its object, parameters, buffers, state_dict keys, hooks and attributes; only its class becomes
    one derived from FusedBasicBlock or FusedBottleneck and its own. Other blocks are left alone, and ``report`` of
    the result says why. The model can be trained, moved, saved and loaded as before.

    Equivalent to::

        model if inplace else copy.deepcopy(model)      # in what it computes

    Args:
        model: any module; blocks are found wherever they are in it, ``model`` may be one itself.
        inplace: change ``model`` itself and return it.
        backend: "auto", or a name in ``resnet_fused.backends.NAMES``, for every op of the fused parts.
        filter_fn: called with the name and module of each block or owner of a stem; False leaves it alone.
        strict: raise when there is no residual block, or when one is left alone though ``filter_fn`` wanted it.
        memory_format: of the feature maps in fused parts with given statistics: torch.channels_last, as kernels
            read them, or torch.preserve_format for the input's. Parameters keep their strides, and training its format:
            where channels_last is quicker, say ``model.to(memory_format=torch.channels_last)`` as in eager.
        recompute: None, "activations" or "last_conv": what the blocks compute again in the backward pass instead of
            keeping it, as in FusedBottleneck. With several processes a block with nn.SyncBatchNorm keeps everything.
        generic: also fuse convolution → batch norm (→ sum) (→ ReLU) and sum → ReLU in the forwards of all other
            modules, traced with torch.fx one by one: heads, necks, other networks than ResNets. No other thread may
            run a model meanwhile. ``filter_fn`` is then also called with each convolution, or the module of a sum, and
            its name in the report; ``strict`` is about residual blocks only.
        tune: an example input (a tensor, or a tuple of arguments): measure every backend on the calls that the fused
            model makes for it, as ``resnet-fused tune`` does, unless the user's table has them already. Takes minutes;
            ``model`` must be in eval mode and ``backend`` "auto".
        cuda_graph: replay the network from a CUDA graph wherever one plan computes it: inference on a GPU with nothing
            that looks on, in a ResNet of this package or of torchvision. Each shape of input is captured at its first
            call, by thread and stream, at most 8 of them; what was captured is not used once a weight, a hook or a
            switch is another. The input is copied into the graph, the result out of it. Copies and pickles of the model
            capture their own.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such backend, memory format or recompute; nothing can be tuned, see ``tune``; or
            ``cuda_graph`` without a CUDA device, or for a model without such a plan.
        FusionError: see ``strict``; ``model`` is then unchanged.
    """
    _check_model(model)
    backend = backends.check_name(backend)
    if memory_format not in (torch.channels_last, torch.preserve_format):
        raise ValueError(f"memory_format: got {memory_format}, need torch.channels_last or torch.preserve_format")
    if tune is not None and backend != backends.AUTO:
        raise ValueError(f"tune: got an input with backend={backend!r}, need backend='auto', which reads what is tuned")
    parts.check_recompute(recompute)
    if cuda_graph:
        _check_cuda_graph(model)
    if strict:
        _check_strict(model, filter_fn)
    if backend == backends.AUTO:
        backends.warn_without_kernels(next((p.device for p in model.parameters()), torch.device("meta")))
    if not inplace:
        model = copy.deepcopy(model)
    channels_last = memory_format is torch.channels_last
    dropouts = tuple(m for m in model.modules() if isinstance(m, _DropoutNd))
    for name, module, found in list(_matches(model)):
        if found.spec is None or (filter_fn is not None and not filter_fn(name, module)):
            continue
        if isinstance(module, FusedModule):
            module.__dict__["_rf_state"] = dataclasses.replace(
                module._rf_state, backend=backend, recompute=recompute, channels_last=channels_last,
                cuda_graph=cuda_graph, dropouts=dropouts,
            )  # fmt: skip
        elif found.reason is None and found.fused is not None:
            state = FusedState(found.spec, backend, recompute, channels_last, found.matched, cuda_graph, dropouts)
            adopt(module, found.fused, state)
    if generic:
        fuse_generic(model, backend, filter_fn, channels_last, dropouts)
    if tune is not None:
        from resnet_fused.tuning import tuner

        tuner.tune(model, *(tune if isinstance(tune, tuple) else (tune,)))
    return model


def fuse_(
    model: M,
    *,
    backend: str = "auto",
    filter_fn: Filter | None = None,
    strict: bool = False,
    memory_format: torch.memory_format = torch.channels_last,
    recompute: str | None = None,
    generic: bool = False,
    tune: Any = None,
    cuda_graph: bool = False,
) -> M:
    """``fuse(model, inplace=True, …)``."""
    return fuse(
        model, inplace=True, backend=backend, filter_fn=filter_fn, strict=strict, memory_format=memory_format,
        recompute=recompute, generic=generic, tune=tune, cuda_graph=cuda_graph,
    )  # fmt: skip


def unfuse(model: M, *, inplace: bool = False) -> M:
    """Undo ``fuse``: every fused part has its own class again.

    Parameters, buffers and hooks are the fused model's, with all that was trained or loaded meanwhile. Modules that
    this package built (``FusedBottleneck(…)``, ``resnet50()``) do not change.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: something else has changed the class of a fused part since; undo that first.
    """
    _check_model(model)
    if not inplace:
        model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, FusedModule):
            continue
        if original_class(module) is None and hasattr(type(module), "_rf_original_class"):
            raise RuntimeError(
                f"model: the class of {name or 'the model'} was changed after fusion, to {type(module).__name__}; "
                "undo that before unfuse"
            )
        if original_class(module) is not None:
            release(module)
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether anything in ``model`` is a fused module."""
    return any(isinstance(module, FusedModule) for module in model.modules())


def explain(
    model: nn.Module, *, backend: str = "auto", filter_fn: Filter | None = None, generic: bool = False
) -> FusionReport:
    """The report that ``fuse(model, …)`` would give, without changing or copying ``model``."""
    _check_model(model)
    backend = backends.check_name(backend)
    entries = []
    taken: set[int] = set()
    for name, module, found in _matches(model):
        wanted = filter_fn is None or filter_fn(name, module)
        reason = found.reason if wanted or isinstance(module, FusedModule) else NOT_FUSED
        entries.append(_entry(name, module, found, reason, backend))
        if reason is None and found.spec is not None:
            taken |= {id(module)} if found.kind == "stem" else taken_by(module, found.spec)
    if generic:
        entries += generic_entries(model, taken, backend, filter_fn)
    return FusionReport(tuple(entries))


def report(model: nn.Module, *, generic: bool = False) -> FusionReport:
    """List the fused parts of ``model`` with their backends, and the parts left alone with the reason.

    ``backend`` of an entry is the choice of "auto" for the device and dtype that the parameters have now; where the
    tuning table has calls of these parameters, for the shapes that were tuned: "cpu (tuned)". What
    ``fuse(generic=True)`` looks at is reported where it fused something, or when ``generic`` asks for it.
    """
    _check_model(model)
    entries = []
    for name, module, found in _matches(model):
        if isinstance(module, FusedModule):
            entries.append(_entry(name, module, found, found.reason, module._rf_state.backend))
        else:
            entries.append(_entry(name, module, found, found.reason or NOT_FUSED, ""))
    if generic or any(isinstance(module, FusedForward) for module in model.modules()):
        entries += generic_entries(model, set())
    return FusionReport(tuple(entries))


def _entry(name: str, module: nn.Module, found: Match, reason: str | None, backend: str) -> FusionEntry:
    label = f"{name}.stem".lstrip(".") if found.kind == "stem" else name
    if reason is not None or found.spec is None:
        return FusionEntry(label, found.kind, SKIPPED, reason or "")
    pairs = pairs_of(module, found.spec)
    chosen = chosen_backend(found.kind, pairs, backend)
    return FusionEntry(label, found.kind, FUSED, found.note, chosen)


def _matches(model: nn.Module) -> Iterator[tuple[str, nn.Module, Match]]:
    for name, module in model.named_modules():
        found = None if isinstance(module, FusedForward) else match(module)
        if found is not None:
            yield name, module, found


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, need an nn.Module")


def _check_cuda_graph(model: nn.Module) -> None:
    if not torch.cuda.is_available():
        raise ValueError("cuda_graph: got True, but there is no CUDA device here; leave it out")
    for _, module, found in _matches(model):
        cls = type(module) if isinstance(module, FusedModule) else found.fused
        if cls is not None and getattr(cls, "_rf_whole", False):
            return
    raise ValueError(
        f"cuda_graph: got True, but no single plan computes a {type(model).__name__}, as one does a ResNet of this "
        "package or of torchvision; leave it out, or capture the model with torch.cuda.make_graphed_callables"
    )


def _check_strict(model: nn.Module, filter_fn: Filter | None) -> None:
    blocks = [m for m in _matches(model) if m[2].kind != "stem"]
    if not blocks:
        raise FusionError(
            f"model: {type(model).__name__} has no residual block of a known class, but strict=True needs one; "
            "register your own block class with resnet_fused.register_adapter, or use strict=False"
        )
    for name, module, found in blocks:
        if found.reason is not None and (filter_fn is None or filter_fn(name, module)):
            raise FusionError(
                f"model: {name or type(module).__name__} cannot be fused, but strict=True needs it: {found.reason}; "
                "leave it out with filter_fn, or use strict=False"
            )
