"""A module of any class whose traced forward is run with convolutions, norms, sums and ReLUs computed as one op."""

from __future__ import annotations

import itertools
import operator
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fused import backends
from resnet_fused.modules import parts
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.spec import BlockSpec, FusedState, Path, find
from resnet_fused.ops.add_relu import api as add_relu
from resnet_fused.ops.conv_bn_act import api as conv_bn_act

TENSOR = Tensor  # stands in a Read for any tensor
_MISSING = object()
_NEVER = object()  # nothing stands for it


class METHOD:  # a class, which pickles keep as the one object that it is
    """Stands in a Read for a method of the class: nothing on the instance may hide it."""


class Child(NamedTuple):
    """Stands in a Read for the submodule at ``path``, which had the class ``cls`` before it was fused."""

    path: Path
    cls: type


class Read(NamedTuple):
    """An attribute of the submodule at ``path`` that a forward looked at, and the value that it had."""

    path: Path
    name: str
    value: Any


class Rebindable(NamedTuple):
    """A name outside of a forward, in a module's namespace or a class, and what it stood for."""

    space: Any
    name: str
    value: Any


def lookup(space: Any, name: str) -> Any:
    """What ``name`` stands for in a namespace, or what a class holds under it, itself or from a base."""
    if isinstance(space, dict):
        return space.get(name, _MISSING)
    for base in space.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return _MISSING


class Described(NamedTuple):
    """A :class:`Rebindable` as a pickle keeps it: by names, and what its value says when it is read as code."""

    module: str
    cls: str | None
    name: str
    value: Any

    @classmethod
    def of(cls, bound: Rebindable) -> Described:
        space, name, value = bound
        if isinstance(space, dict):
            return cls(str(space.get("__name__")), None, name, _description(value))
        return cls(space.__module__, space.__qualname__, name, _description(value))

    def found(self) -> Rebindable:
        """What the names stand for in this process; where that is another, a value that nothing ever is."""
        space: Any = sys.modules.get(self.module)
        try:
            space = vars(space) if self.cls is None else operator.attrgetter(self.cls)(space)
        except (AttributeError, TypeError):  # the module has not been imported, or has no such class
            return Rebindable({}, self.name, None)
        value = lookup(space, self.name)
        return Rebindable(space, self.name, value if _description(value) == self.value else _NEVER)


def _function(value: Any) -> FunctionType | None:
    """The function of a user's that this is, or that a property or method of a class holds."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) and (value.__module__ or "").split(".")[0] != "torch" else None


def _description(value: Any) -> Any:
    """What tells a value from another in a pickle; functions by their code, whatever their name."""
    own = _function(value)
    if own is not None:
        return "code", repr(sys.version_info[:2]), _content(own.__code__), repr(own.__defaults__)
    if isinstance(value, (type, BuiltinFunctionType, FunctionType)):
        return type(value).__name__, value.__module__, value.__qualname__
    if isinstance(value, ModuleType):
        return "module", value.__name__
    return ("missing",) if value is _MISSING else ("value", type(value).__qualname__, repr(value))


def _content(code: CodeType) -> tuple[Any, ...]:
    constants = (_content(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, *constants


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
    alone are submodules that must not be observed, since their own forward is part of it or the order of their calls is
    another; symbols are the functions that the text uses, by the names that it has for them. globals have to stand for
    what they stood for; a pickle describes them, and what is there when it is read has to agree. It holds no module and
    no tensor: copies share it.
    """

    source: str
    symbols: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    types: tuple[Any, ...]
    reads: tuple[Read, ...]
    alone: tuple[Path, ...]
    chains: tuple[Chain, ...]
    globals: tuple[Rebindable, ...] = field(default=(), repr=False)
    codes: tuple[tuple[FunctionType, CodeType, Any], ...] = field(init=False, repr=False)
    function: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = tuple(g.found() if isinstance(g, Described) else g for g in self.globals)
        object.__setattr__(self, "globals", found)
        functions = map(_function, (*(g.value for g in found), *(read.value for read in self.reads)))
        object.__setattr__(self, "codes", tuple((f, f.__code__, f.__defaults__) for f in functions if f is not None))
        scope: dict[str, Any] = {name: pkgutil.resolve_name(target) for name, target in self.symbols}
        exec(compile(self.source, "<resnet_fused: traced forward>", "exec"), scope)
        object.__setattr__(self, "function", scope["forward"])

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> Any:
        return Plan, (
            self.source, self.symbols, self.names, self.types, self.reads, self.alone, self.chains,
            tuple(map(Described.of, self.globals)),
        )  # fmt: skip

    def refusal(self, module: nn.Module) -> str | None:
        """Why the traced forward does not stand for that of ``module`` as it is now, whatever its arguments."""
        for path, name, value in self.reads:
            owner = find(module, path)
            if owner is None:
                return f"{'.'.join(path)} is gone"
            if name == "_modules":
                holds = tuple(owner._modules) == value
            elif isinstance(value, Child):
                now = find(module, value.path)
                holds = now is not None and getattr(owner, name, None) is now and _class(now) is value.cls
            elif value is TENSOR:
                holds = isinstance(getattr(owner, name, None), Tensor)
            elif value is METHOD:
                holds = name not in owner.__dict__
            else:
                now = getattr(owner, name, None)
                holds = type(now) is type(value) and now == value
            if not holds:
                return f"{'.'.join((*path, name))} has changed since its forward was traced"
        for path in self.alone:
            part = find(module, path)
            if part is None or parts.touched(part):
                return f"{'.'.join(path)} has hooks"
        if not torch.compiler.is_compiling():  # a compiler would look into each of the namespaces
            for space, name, value in self.globals:
                if lookup(space, name) is not value:
                    return f"{name} has changed since its forward was traced"
            for function, code, defaults in self.codes:  # reloaders put another code into the same function
                if function.__code__ is not code or function.__defaults__ is not defaults:
                    return f"{function.__name__} has changed since its forward was traced"
        return None


@dataclass(frozen=True)
class TracedState(FusedState):
    """The state of a module with a traced forward."""

    plans: tuple[Plan, ...] = ()


class FusedForward(FusedModule):
    """A module that runs the first of its plans that stands for its own forward at this call, or else that forward."""

    _rf_state: TracedState
    _rf_original_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for plan in self._rf_state.plans:
            given = _arguments(plan, args, kwargs)
            if given is not None and not parts.watched() and plan.refusal(self) is None:
                return plan.function(self, *given)
        return self._rf_original_class.forward(self, *args, **kwargs)

    def _rf_parts(self) -> Iterable[nn.Module]:
        paths = [path for plan in self._rf_state.plans for c in plan.chains for path in (c.conv, c.norm) if path]
        return [m for path in dict.fromkeys(paths) if (m := find(self, path)) is not None]


NO_SPEC = BlockSpec(())


def _class(module: nn.Module) -> type:
    """The class that ``module`` had before it was fused."""
    return getattr(type(module), "_rf_original_class", type(module))


def _arguments(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments in the plan's order, or None where they are others than it takes."""
    if len(args) + len(kwargs) != len(plan.names) or _tracing():
        return None
    for name in plan.names[len(args) :]:
        if name not in kwargs:
            return None
        args = (*args, kwargs[name])
    for value, wanted in zip(args, plan.types, strict=True):
        if value is None or isinstance(value, fx.Proxy):
            return None
        if wanted is not None and (not isinstance(value, wanted) or isinstance(value, nn.Parameter)):
            return None
    return args


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """The values that ``count`` names are bound to."""
    found = tuple(itertools.islice(iter(value), count + 1))
    if len(found) != count:
        many = f"too many values to unpack (expected {count})"
        few = f"not enough values to unpack (expected {count}, got {len(found)})"
        raise ValueError(many if len(found) > count else few)
    return found


def iadd_(a: Any, b: Any) -> Any:
    return operator.iadd(a, b)


def isub_(a: Any, b: Any) -> Any:
    return operator.isub(a, b)


def imul_(a: Any, b: Any) -> Any:
    return operator.imul(a, b)


def itruediv_(a: Any, b: Any) -> Any:
    return operator.itruediv(a, b)


def ifloordiv_(a: Any, b: Any) -> Any:
    return operator.ifloordiv(a, b)


def imod_(a: Any, b: Any) -> Any:
    return operator.imod(a, b)


def ipow_(a: Any, b: Any) -> Any:
    return operator.ipow(a, b)


def imatmul_(a: Any, b: Any) -> Any:
    return operator.imatmul(a, b)


def iand_(a: Any, b: Any) -> Any:
    return operator.iand(a, b)


def ior_(a: Any, b: Any) -> Any:
    return operator.ior(a, b)


def ixor_(a: Any, b: Any) -> Any:
    return operator.ixor(a, b)


def ilshift_(a: Any, b: Any) -> Any:
    return operator.ilshift(a, b)


def irshift_(a: Any, b: Any) -> Any:
    return operator.irshift(a, b)


# fx writes Python's own as statements.
IN_PLACE: dict[Any, Callable[[Any, Any], Any]] = {
    operator.iadd: iadd_,
    operator.isub: isub_,
    operator.imul: imul_,
    operator.itruediv: itruediv_,
    operator.ifloordiv: ifloordiv_,
    operator.imod: imod_,
    operator.ipow: ipow_,
    operator.imatmul: imatmul_,
    operator.iand: iand_,
    operator.ior: ior_,
    operator.ixor: ixor_,
    operator.ilshift: ilshift_,
    operator.irshift: irshift_,
}


def _tracing() -> bool:
    """Whether torch.jit.trace is writing down one run, which a later change of mode must not find in it."""
    return torch.jit.is_tracing() and not torch.compiler.is_compiling()  # type: ignore[attr-defined,no-untyped-call]


def conv_norm_act(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    act: nn.Module | str,
    residual: Tensor | None,
    inplace: bool,
    state: FusedState,
    given_format: bool,
) -> Tensor:
    """``act(norm(conv(x)) + residual)``, as one op where that may be; act is a module, "relu" or "none".

    inplace: the sum is ``+=``, which neither promotes nor broadcasts. given_format: the format of x is kept, whatever
    the state says.
    """
    name = act if isinstance(act, str) else "relu"
    if (isinstance(act, str) or parts.plain_relu(act)) and parts.bypassable(conv, norm):
        pair = parts.read(conv, norm)  # type: ignore[arg-type]
        if pair is not None and x.dim() == 4:
            shape = (x.shape[0], pair.weight.shape[0], *pair.output_size(*x.shape[2:]))
            if residual is None or (
                isinstance(residual, Tensor) and residual.shape == shape and _one_dtype(residual, x, inplace)
            ):
                x = parts.feature_map(x, [pair], state.turns() and not given_format)
                return conv_bn_act.call_op(x, pair, residual, name, state.backend)
        # A sum that is not in place promotes, so dtypes must be one from the start.
        alike = residual is None or (
            isinstance(residual, Tensor) and residual.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)
        )
        if pair is None and alike:
            return parts.batch_statistics_step(x, conv, norm, name, residual, state.backend)
    y: Tensor = norm(conv(x))
    if residual is not None:
        y = operator.iadd(y, residual) if inplace else y + residual
    return _activate(y, act)


def sum_relu(a: Tensor, b: Tensor, act: nn.Module | str, inplace: bool, state: FusedState) -> Tensor:
    """``act(a + b)``, as one op where that may be; ``inplace``: the sum may be written into ``a``."""
    if (isinstance(act, str) or parts.plain_relu(act)) and _addable(a, b, inplace):
        if state.backend != backends.AUTO or add_relu.candidates(a)[0] != "reference":
            return add_relu.call_op(a, b, state.backend)
        return torch.relu_(operator.iadd(a, b) if inplace else a + b)
    return _activate(operator.iadd(a, b) if inplace else a + b, act)


def _activate(y: Tensor, act: nn.Module | str) -> Tensor:
    if isinstance(act, str):
        return F.relu(y) if act == "relu" else y
    return act(y)  # type: ignore[no-any-return]


def _one_dtype(residual: Tensor, x: Tensor, inplace: bool) -> bool:
    """Whether the op's sum has eager's dtype; under autocast it promotes."""
    if torch.is_autocast_enabled(x.device.type):
        return not inplace or residual.dtype == torch.get_autocast_dtype(x.device.type)
    return residual.dtype == x.dtype


def _addable(a: Tensor, b: Tensor, inplace: bool) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.is_floating_point() and (not inplace or a.stride() == b.stride())
