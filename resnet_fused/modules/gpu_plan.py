"""A fused network's convolutional part as one plan on a GPU: asked once whether it may be, not block by block.

A plan holds for one shape of input and for the tensors that the network has. Everything that could tell it from the
modules' own calls is asked at each call, as the blocks do; whatever refuses leaves the call to them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.modules import guards, parts
from resnet_fused.modules.block import FusedBlock, _parts
from resnet_fused.modules.live import Pair, Projection
from resnet_fused.ops import library, packed, triton_launch
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.device_plan import Block, Conv, DevicePlan, Node, Pool, Unplannable
from resnet_fused.ops.tensor_cache import CACHE
from resnet_fused.tuning import lookup

MOST_PLANS = 8  # of one network, the least recently used goes
_TOKENS = packed.new_kind()


class _Kept(NamedTuple):
    plan: DevicePlan | None
    token: object  # while the cache has it, all that the plan was made from is as it was


_plans: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, _Kept]] = weakref.WeakKeyDictionary()


def features(model: nn.Module, x: Tensor, stem: list[Pair], layers: Iterable[nn.Module]) -> Tensor | None:
    """The stem and ``layers``, flattened to ``[N, features]``, by a plan; None where there may be none.

    Args:
        model: a fused network, whose ``_rf_state`` says by which backend.
        stem: its first convolutions and norms, which may be bypassed.
    """
    state: Any = model._rf_state
    if not _served(x, state.backend) or not library.unobserved(x) or not state.channels_last:
        return None
    if lookup.observed() or triton_launch.watched():
        return None
    nodes = _nodes(stem, layers, x, state)
    if nodes is None:
        return None
    convs = [conv for node in nodes for conv in _convs(node)]
    tensors = [tensor for conv in convs for tensor in conv[:6]]
    key = (
        x.shape, x.stride(), x.dtype, x.device, state.backend, state.cuda_graph, _switches(),
        tuple(node[:-1] if isinstance(node, Pool) else type(node) for node in nodes),
        tuple(conv[6:] for conv in convs),
    )  # fmt: skip
    token = CACHE.find(_TOKENS, tensors)
    if token is None:
        if state.backend == backends.AUTO and not packed.settled(tensors):
            return None
        CACHE.get(_TOKENS, tensors, None, object)
        token = CACHE.find(_TOKENS, tensors)
        if token is None:  # inference tensors, of which nothing tells that they were written
            return None
    plans = _plans.setdefault(model, OrderedDict())
    kept = plans.pop(key, None)
    if kept is None or kept.token is not token:
        while len(plans) >= MOST_PLANS:
            plans.popitem(last=False)
        try:
            plan = DevicePlan(nodes, x, state.backend, _pooled, graph=state.cuda_graph)
        except (Unplannable, ValueError, TypeError, backends.BackendError):
            plan = None  # the modules' own calls say what is wrong
        kept = _Kept(plan, token)
    plans[key] = kept  # the latest last
    return None if kept.plan is None else kept.plan(x)


def _served(x: Tensor, backend: str) -> bool:
    """Whether GPU plans are for this input at all; the interpreter stands in for a GPU where it is asked for."""
    if not guards.plain_tensor(x) or x.dim() != 4 or not x.numel():
        return False
    return x.is_cuda or (backend == backends.Backend.TRITON and backends.interpreting())


def _switches() -> tuple[Any, ...]:
    """What of PyTorch decides who computes an op, and how."""
    cudnn: Any = torch.backends.cudnn
    return (
        cudnn.conv.fp32_precision, cudnn.enabled, cudnn.benchmark, cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _nodes(stem: list[Pair], layers: Iterable[nn.Module], x: Tensor, state: Any) -> list[Node] | None:
    """The network as data, or None where something in it is not for a plan at the moment."""
    found: list[Node] = []
    for pair in stem:
        conv = parts.read(*pair)
        if conv is None:
            return None
        found.append(Conv(len(found), None, len(found) + 1, conv, "relu"))
    steps = [step for layer in layers for step in _steps(layer)]
    if not steps or not _pools(steps.pop()):
        return None
    for step in steps:
        at = len(found)
        if isinstance(step, FusedBlock):
            block = _block(step, x, at, state)
            if block is None:
                return None
            found.append(block)
        elif type(step) is nn.MaxPool2d:
            geometry = [guards.pair(v) for v in (step.kernel_size, step.stride, step.padding, step.dilation)]
            if guards.touched(step) or not guards.own_forward(nn.MaxPool2d) or None in geometry:
                return None
            if step.ceil_mode or step.return_indices:
                return None
            found.append(Pool(at, at + 1, *geometry))  # type: ignore[arg-type]
        elif not guards.idle(step) and not (type(step) is nn.Sequential and not guards.touched(step)):
            return None
    return found


def _block(step: FusedBlock, x: Tensor, at: int, state: Any) -> Block | None:
    own = step._rf_state
    if (own.backend, own.channels_last) != (state.backend, True) or guards.touched(step):
        return None
    found = _parts(step, x)
    if found is None or found.extras is not None:
        return None
    shortcut = None
    if found.shortcut is not None:
        if not isinstance(found.shortcut, Projection) or found.shortcut.before:
            return None
        shortcut = parts.read(found.shortcut.conv, found.shortcut.norm)
        if shortcut is None:
            return None
    convs = [parts.read(*pair) for pair in found.pairs]
    if None in convs:
        return None
    return Block(at, at + 1, "basic_block" if len(convs) == 2 else "bottleneck", tuple(convs), shortcut)  # type: ignore[arg-type]


def _pools(module: nn.Module) -> bool:
    """Whether ``module`` averages each channel, as :func:`_pooled` does."""
    plain = type(module) is nn.AdaptiveAvgPool2d and guards.own_forward(nn.AdaptiveAvgPool2d)
    return plain and not guards.touched(module) and module.output_size in (1, (1, 1), [1, 1])


def _pooled(y: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)


def _convs(node: Node) -> tuple[ConvBN, ...]:
    if isinstance(node, Conv):
        return (node.conv,)
    if isinstance(node, Pool):
        return ()
    return node.convs if node.shortcut is None else (*node.convs, node.shortcut)


def _steps(layer: nn.Module) -> list[nn.Module]:
    """``layer``, or what it runs in turn, at any depth: a Sequential and all that is in it."""
    if type(layer) is not nn.Sequential:
        return [layer]
    return [layer, *(step for child in layer._modules.values() for step in _steps(child))]
