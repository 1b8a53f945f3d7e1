"""A module of any class whose traced forward is run with convolutions, norms, sums and ReLUs computed as one op."""

from __future__ import annotations

import operator
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.modules import parts
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.spec import BlockSpec, FusedState, Path, find
from resnet_fused.ops.add_relu import api as add_relu
from resnet_fused.ops.conv_bn_act import api as conv_bn_act

PRESENT = nn.Module  # stands in a Read for an attribute that is a submodule, whichever


class Read(NamedTuple):
    """An attribute of the submodule at ``path`` that a forward looked at, and the value that it had."""

    path: Path
    name: str
    value: Any


class Chain(NamedTuple):
    """Operations computed as one: kind, and the paths of the modules that take part, None where there is none."""

    kind: str
    name: str
    conv: Path | None = None
    norm: Path | None = None
    act: Path | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Plan:
    """A traced forward as source text, and when it stands for the module's own.

    names are the arguments that it takes, types what each has to be (None: anything but None); reads have to hold;
    containers are submodules whose own forward is part of it, so nobody may watch them; symbols are the functions that
    the text uses, by the names that it has for them. It holds no module and no tensor: copies share it.
    """

    source: str
    symbols: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    types: tuple[Any, ...]
    reads: tuple[Read, ...]
    containers: tuple[Path, ...]
    chains: tuple[Chain, ...]
    function: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scope: dict[str, Any] = {name: pkgutil.resolve_name(target) for name, target in self.symbols}
        exec(compile(self.source, "<resnet_fused: traced forward>", "exec"), scope)
        object.__setattr__(self, "function", scope["forward"])

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> Any:
        return Plan, (
            self.source, self.symbols, self.names, self.types, self.reads, self.containers, self.chains,
        )  # fmt: skip

    def refusal(self, module: nn.Module) -> str | None:
        """Why the traced forward does not stand for that of ``module`` as it is now, whatever its arguments."""
        for path, name, value in self.reads:
            owner = find(module, path)
            if owner is None:
                return f"{'.'.join(path)} is gone"
            if name == "_modules":
                holds = tuple(owner._modules) == value
            elif value is PRESENT:
                holds = isinstance(getattr(owner, name, None), nn.Module)
            else:
                now = getattr(owner, name, None)
                holds = type(now) is type(value) and now == value
            if not holds:
                return f"{'.'.join((*path, name))} is not what it was when its forward was traced"
        for path in self.containers:
            container = find(module, path)
            if container is None or parts.touched(container):
                return f"{'.'.join(path)} has hooks"
        return None


@dataclass(frozen=True)
class TracedState(FusedState):
    """The state of a module with a traced forward."""

    plans: tuple[Plan, ...] = ()


class FusedForward(FusedModule):
    """A module that runs the first of its plans that stands for its own forward at this call, or else that forward."""

    _rf_state: TracedState
    _rf_original_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for plan in self._rf_state.plans:
            given = _arguments(plan, args, kwargs)
            if given is not None and not parts.watched() and plan.refusal(self) is None:
                return plan.function(self, *given)
        return self._rf_original_forward(*args, **kwargs)

    def _rf_parts(self) -> Iterable[nn.Module]:
        paths = [path for plan in self._rf_state.plans for c in plan.chains for path in (c.conv, c.norm) if path]
        return [m for path in dict.fromkeys(paths) if (m := find(self, path)) is not None]


NO_SPEC = BlockSpec(())


def _arguments(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments in the plan's order, or None where they are others than it takes."""
    if len(args) + len(kwargs) != len(plan.names):
        return None
    for name in plan.names[len(args) :]:
        if name not in kwargs:
            return None
        args = (*args, kwargs[name])
    for value, wanted in zip(args, plan.types, strict=True):
        if value is None or (wanted is not None and not isinstance(value, wanted)):
            return None
    return args


def conv_norm_act(
    x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module | str, residual: Tensor | None, backend: str
) -> Tensor:
    """``act(norm(conv(x)) + residual)``, as one op where that may be; act is a module, "relu" or "none"."""
    name = act if isinstance(act, str) else "relu"
    if (isinstance(act, str) or parts.plain_relu(act)) and parts.bypassable(conv, norm):
        pair = parts.read(conv, norm)  # type: ignore[arg-type]
        if pair is not None and x.dim() == 4:
            shape = (x.shape[0], pair.weight.shape[0], *pair.output_size(*x.shape[2:]))
            if residual is None or (residual.shape == shape and _one_dtype(residual, x)):
                return conv_bn_act.call_op(x, pair, residual, name, backend)
        # A sum that is not in place promotes, so dtypes must be one from the start.
        alike = residual is None or (residual.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type))
        if pair is None and alike:
            return parts.batch_statistics_step(x, conv, norm, name, residual, backend)
    y: Tensor = norm(conv(x))
    if residual is not None:
        y = y + residual
    return _activate(y, act)


def sum_relu(a: Tensor, b: Tensor, act: nn.Module | str, inplace: bool, backend: str) -> Tensor:
    """``act(a + b)``, as one op where that may be; ``inplace``: the sum may be written into ``a``."""
    if (isinstance(act, str) or parts.plain_relu(act)) and _addable(a, b, inplace):
        if backend != backends.AUTO or add_relu.candidates(a)[0] != "reference":
            return add_relu.OP(a, b, backend)  # type: ignore[no-any-return]
        return torch.relu_(operator.iadd(a, b) if inplace else a + b)
    return _activate(operator.iadd(a, b) if inplace else a + b, act)


def _activate(y: Tensor, act: nn.Module | str) -> Tensor:
    if isinstance(act, str):
        return F.relu(y) if act == "relu" else y
    return act(y)  # type: ignore[no-any-return]


def _one_dtype(residual: Tensor, x: Tensor) -> bool:
    return residual.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


def _addable(a: Tensor, b: Tensor, inplace: bool) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.is_floating_point() and (not inplace or a.stride() == b.stride())
