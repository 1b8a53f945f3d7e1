"""A network, or one block, as one plan: asked once whether it may be, then one call of the compiled library on a CPU, a
list of launches on a GPU.

Whatever is observed, or is not the library's to compute, goes the other way: module calls and registered ops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.modules import guards, live, parts
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.guard import Guard, Unguarded, unobserved
from resnet_fused.modules.live import Projection
from resnet_fused.modules.spec import FusedState
from resnet_fused.ops import cpu_plan, device_plan, packed
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.cpu_plan import Conv, CpuPlan, MaxPool, Mean, Residual, Step
from resnet_fused.ops.device_plan import DevicePlan

MOST_PLANS = 8  # of one network, for as many shapes; the least recently used goes
_MOST_WAITING = 32  # calls between two attempts where one after the other failed
_BLOCK = f"{__package__}.block"
_DTYPES = (torch.float32, torch.bfloat16)

_ASKER = packed.new_kind()
_MISSING: Any = object()
_OPS = {2: "basic_block", 3: "bottleneck"}


def run(root: FusedModule, x: Any, names: Sequence[str] = ()) -> Tensor | None:
    """What ``root`` computes of ``x`` by a plan; None where there may be none, with nothing done yet.

    Args:
        root: a block; or a model with a stem, which then computes ``names`` in turn and flattens.
        names: the attributes of the model that stand behind its stem, the last one an average pool.
    """
    if type(x) is not Tensor or not unobserved(x):
        return None
    if x.dim() != 4 or x.layout is not torch.strided or not x.numel():
        return None
    state: FusedState = root._rf_state
    if state.draws():
        return None
    on_device = device_plan.serves(x, state.backend)
    if not on_device and (x.device.type != "cpu" or x.dtype not in _DTYPES):
        return None
    prepared = state.prepared
    network: _Network | None = prepared.network
    if network is None or not network.guard.holds(root):
        network = prepared.network = _attempt(root, x, names)
        if network is None:
            return None
    plan = network.plan(x, on_device)
    return None if plan is None else plan(x)


class _Network:
    """Steps that hold while their guard says so, and the plans made of them."""

    def __init__(self, guard: Guard, steps: tuple[Step, ...], state: FusedState, whole: bool) -> None:
        self.guard, self._steps = guard, steps
        self._backend, self._channels_last = state.backend, state.channels_last
        self._graph = state.cuda_graph and whole

    def plan(self, x: Tensor, on_device: bool) -> CpuPlan | DevicePlan | None:
        """The plan for inputs like ``x``; None where there is none for all of it.

        Args:
            on_device: by launches, as on a GPU.
        """
        plans = self.guard.kept
        key: tuple[Any, ...] = (x.shape, x.stride(), x.dtype, x.device)
        # Each number of threads has its own tuning table.
        key += device_plan.switches() if on_device else (torch.get_num_threads(), torch._C._get_mkldnn_enabled())
        plan: CpuPlan | DevicePlan | None = plans.get(key, _MISSING)
        if plan is not _MISSING:
            if len(plans) >= MOST_PLANS:
                plans[key] = plans.pop(key, plan)  # the latest last
            return plan
        try:
            make = functools.partial(device_plan.make, graph=self._graph) if on_device else cpu_plan.make
            plan = make(self._steps, x, self._backend, self._channels_last)
        except (ValueError, TypeError, backends.BackendError):
            plan = None  # the modules' own calls say what is wrong
        while len(plans) >= MOST_PLANS:
            plans.pop(next(iter(plans.copy()), None), None)
        plans[key] = plan
        return plan


def _attempt(root: FusedModule, x: Tensor, names: Sequence[str]) -> _Network | None:
    """A new network; None where none may be made, which is not tried again at each of the next calls."""
    prepared = root._rf_state.prepared
    if prepared.wait > 0 and not torch.are_deterministic_algorithms_enabled():
        prepared.wait -= 1
        return None
    network = _read(root, x, names)
    prepared.failures = 0 if network is not None else prepared.failures + 1
    prepared.wait = min(_MOST_WAITING, max(0, 2 ** min(prepared.failures, 8) // 2 - 2))
    return network


def _read(root: FusedModule, x: Tensor, names: Sequence[str]) -> _Network | None:
    state = root._rf_state
    found = _steps(root, x, names)
    if found is None:
        return None
    steps, modules = found
    tensors = [tensor for conv in cpu_plan.convs_of(steps) for tensor in conv[:6]]
    if any(tensor is not None and tensor.device != x.device for tensor in tensors):
        return None
    if state.backend == backends.AUTO and not packed.settled(tensors, _ASKER):
        return None
    matched = [m.__dict__["_rf_state"].matched for m in (root, *modules) if "_rf_state" in m.__dict__]
    through = tuple(dict.fromkeys((*_own_names(state), *names)))
    try:
        guard = Guard(root, modules, through, tensors, matched)
    except Unguarded:
        return None
    again = _steps(root, x, names)  # what was read before the guard saw it may have been another's since
    if again is None or _identities(again[0]) != _identities(steps):
        return None
    return _Network(guard, steps, state, bool(names))


def _identities(steps: Iterable[Step]) -> list[Any]:
    pools = [step for step in steps if isinstance(step, MaxPool)]
    return [*map(type, steps), *pools, *((*map(id, conv[:6]), *conv[6:]) for conv in cpu_plan.convs_of(steps))]


def _steps(root: Any, x: Tensor, names: Sequence[str]) -> tuple[tuple[Step, ...], list[nn.Module]] | None:
    """What ``root`` computes, and the modules that do it; None where something of it is not for a plan."""
    if not names:
        step = _block(root, x)
        return None if step is None else ((step,), list(root.modules()))
    pairs = root._rf_stem_pairs(x)
    if pairs is None or not all(name in root._modules and name not in root.__dict__ for name in names):
        return None
    steps: list[Step] = []
    modules: list[nn.Module] = []
    for pair in pairs:
        conv = parts.read(*pair)
        if conv is None:
            return None
        steps.append(Conv(conv))
    modules += [m for name in _own_names(root._rf_state) for m in (root._modules.get(name),) if m is not None]
    layers = [root._modules[name] for name in names]
    modules += layers
    for module in [module for layer in layers for module in _in_turn(layer)]:
        if isinstance(module, FusedModule):
            step = _block(module, x) if _called_as_ours(module) else None
            if step is None or _options(module) != _options(root):
                return None
            steps.append(step)
        elif not guards.idle(module):
            pool = _pool(module)
            if pool is None:
                return None
            steps.append(pool)
    if not isinstance(steps[-1], Mean) or any(isinstance(step, Mean) for step in steps[:-1]):
        return None
    return tuple(steps), [m for module in modules for m in module.modules()]


def _own_names(state: FusedState) -> tuple[str, ...]:
    """The attributes of a module through which its forward finds what its spec names."""
    return tuple(name for path, names in state.spec.children if not path for name in names)


def _options(module: FusedModule) -> tuple[str, bool]:
    return module._rf_state.backend, module._rf_state.channels_last


def _called_as_ours(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one of FusedBlock.forward, and of nothing around it."""
    cls: Any = type(module)
    scope = getattr(cls.forward, "__globals__", {}).get("__name__")
    return scope == _BLOCK and cls.__call__ is nn.Module.__call__ and not guards.touched(module)


def _in_turn(layer: nn.Module) -> list[nn.Module]:
    """``layer``, or what it runs in turn, at any depth: what is in a Sequential."""
    if type(layer) is not nn.Sequential or guards.touched(layer):
        return [layer]
    return [module for child in layer._modules.values() for module in _in_turn(child)]


def _block(block: Any, x: Tensor) -> Residual | None:
    """A residual block with given statistics and nothing between its convolutions, by an op of ours."""
    state = block._rf_state
    found = live.read(block, state.spec, state.matched)
    if isinstance(found, str) or found.extras is not None or len(found.pairs) not in _OPS:
        return None
    convs = [parts.read(*pair) for pair in found.pairs]
    shortcut: ConvBN | None = None
    if found.shortcut is not None:
        if not isinstance(found.shortcut, Projection) or found.shortcut.before:
            return None
        shortcut = parts.read(found.shortcut.conv, found.shortcut.norm)
        convs.append(shortcut)
    if None in convs:
        return None
    return Residual(_OPS[len(found.pairs)], tuple(convs[: len(found.pairs)]), shortcut)  # type: ignore[arg-type]


def _pool(module: Any) -> MaxPool | Mean | None:
    """A plain pool; None where it is anything else."""
    if guards.touched(module) or not guards.own_forward(type(module)):
        return None
    if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
        return Mean()
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
        return None
    window = [guards.pair(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation)]
    return None if None in window else MaxPool(*window)  # type: ignore[arg-type]
