"""Tracing one module's own forward with torch.fx, its submodules left whole, so that the trace can be relied on.

A trace by torch.fx is blind to whatever Python decided on the way: an ``if`` on an attribute, ``isinstance``, a random
number. So every attribute that was read is noted and compared again before each use of the trace, the functions that
ran may contain only what is allowed here, and whatever else happens ends the attempt, with a reason.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import gc
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from resnet_fused.fusion import allowed
from resnet_fused.fusion.allowed import in_torch
from resnet_fused.fusion.bytecode import MODULES, compares_values, hazard
from resnet_fused.modules import parts
from resnet_fused.modules.base import original_class
from resnet_fused.modules.traced import METHOD, TENSOR, Child, Read, Rebindable, lookup, unpack


class Untraceable(Exception):
    """The forward does something that a trace cannot represent; the message says what."""


@dataclass(frozen=True)
class Trace:
    """A forward as a graph, and what must hold for it to stand for that forward.

    names are the arguments'; types are what each must be at run time, None where only None is ruled out; reads are the
    attributes that the forward looked at, with the values that they had; globals are the names outside of it, of
    functions as a rule, with what they stood for; expanded are the submodules whose own forward is part of the graph.
    """

    graph: fx.Graph
    names: tuple[str, ...]
    types: tuple[type | tuple[type, ...] | None, ...]
    reads: tuple[Read, ...]
    globals: tuple[Rebindable, ...]
    expanded: frozenset[str]


_LOCK = threading.RLock()  # torch.fx patches nn.Module while it traces

# Parts of torch that run a function in a context (decorators, mostly) of which the graph would know nothing.
_CONTEXTS = {"torch.utils._contextlib", "torch.utils.checkpoint", "torch.amp.autocast_mode", "torch._dynamo.eval_frame"}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, enum.Enum)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the module had before anything here changed its class."""
    return (original_class(module) or type(module)).forward


def runs_in_turn(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its children one after the other."""
    return isinstance(module, nn.Sequential) and own_forward(module) is nn.Sequential.forward


def trace(module: nn.Module, expand: frozenset[str] = frozenset()) -> tuple[Trace, ...]:
    """The forward of ``module`` in eval mode: one trace, or one for tensors and one for lists where it asks.

    Args:
        module: its submodules are nodes of the graph.
        expand: names of Sequentials whose children are nodes instead.

    Raises:
        Untraceable: with the reason.
    """
    forward = own_forward(module)
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        raise Untraceable("its forward is decorated or no plain function")
    if original_class(module) is not None and forward is not vars(type(module)).get("_rf_original_forward", forward):
        raise Untraceable("its forward was replaced since it was fused")
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters):
        raise Untraceable("its forward takes a variable number of arguments")
    names = tuple(p.name for p in parameters if p.default is p.empty)
    first, asked = _trace(module, forward, names, Tensor, expand)
    if not asked:
        return (first,)
    with contextlib.suppress(Untraceable):
        return (first, _trace(module, forward, names, list, expand)[0])
    return (first,)


def _trace(
    module: nn.Module, forward: FunctionType, names: tuple[str, ...], kind: type, expand: frozenset[str]
) -> tuple[Trace, bool]:
    tracer = _Tracer(names, kind, expand, "forward" if original_class(module) is None else "_rf_original_forward")
    with _LOCK, _evaluating(module), _watching(module) as seen, _NoTensors():
        try:
            graph = tracer.trace(module)
        except Untraceable:
            raise
        except Exception as error:  # whatever the forward raises on proxies is a reason not to trace it
            text = str(error).strip().split("\n")[0]
            raise Untraceable(f"its forward cannot be traced ({type(error).__name__}: {text})") from error
    unsure = next((n for n in graph.nodes if _may_be_none(module, n)), None) if seen.compares else None
    if unsure is not None:
        raise Untraceable(f"its forward compares with None, which {unsure.target} may give")
    types = tuple((kind if n in tracer.asked else None) for n in names)
    reads = [Read((), "_modules", tuple(module._modules)), *_places(module, graph)]
    reads += [read for read in seen.reads.values() if read not in reads]
    for name in sorted(expand):
        path = tuple(name.split("."))
        reads.append(Read(path, "_modules", tuple(module.get_submodule(name)._modules)))
    reads = [read for n, read in enumerate(reads) if read not in reads[:n]]
    return Trace(graph, names, types, tuple(reads), tuple(seen.globals.values()), expand), bool(tracer.asked)


def _places(module: nn.Module, graph: fx.Graph) -> list[Read]:
    """That each module which the graph names is still found under that name, and of the same class."""
    found = []
    for node in graph.nodes:
        if node.op == "call_module":
            *above, key = str(node.target).split(".")
            path = (*above, key)
            child = module.get_submodule(str(node.target))
            found.append(Read(tuple(above), key, Child(path, original_class(child) or type(child))))
    return found


def _may_be_none(module: nn.Module, node: fx.Node) -> bool:
    """Whether the value may be None where the forward's own values are not: results of modules that we do not know."""
    if node.op == "call_function" and node.target is operator.getitem:
        return any(n.op == "call_module" or n.target is unpack for n in node.all_input_nodes)
    return node.op == "call_module" and not _gives_value(module.get_submodule(str(node.target)))


def _gives_value(module: nn.Module) -> bool:
    """Whether the module gives something other than None for something other than None."""
    if runs_in_turn(module):
        return all(child is not None and _gives_value(child) for child in module._modules.values())
    cls = original_class(module) or type(module)
    return cls.__module__.startswith("torch.nn.modules.") and cls is not nn.Module and not parts.touched(module)


class _Value(fx.Proxy):
    """A value in the graph, which answers ``isinstance`` of a forward for its arguments, and of nothing else."""

    @property
    def __class__(self) -> Any:
        if in_torch(sys._getframe(1).f_globals.get("__name__", "")):
            return fx.Proxy
        return self.tracer.type_of(self)  # type: ignore[attr-defined]

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of a traced value cannot be set")

    def __hash__(self) -> int:
        if not in_torch(sys._getframe(1).f_globals.get("__name__", "")):
            raise Untraceable("its forward puts a value into a set or dict as a key, which asks which object it is")
        return id(self)

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __iter__(self) -> Any:
        """As many values as the names that they are bound to; what they are is asked at run time."""
        frame = sys._getframe(1)
        here = [i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti]
        count = here[0].argval if here and here[0].opname == "UNPACK_SEQUENCE" else None
        if count is None:
            return self.tracer.iter(self)
        values: Any = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([values[n] for n in range(count)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that writes into its first operand, as a node of its own: fx would record one that does not."""

    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(_Value, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Attribute(fx.proxy.Attribute, _Value):
    """An attribute of a value, which may be another view of its memory; or a method, where it is called."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, names: tuple[str, ...], kind: type, expand: frozenset[str], method: str) -> None:
        super().__init__()
        self.names, self.kind, self.expand, self.traced_func_name = names, kind, expand, method
        self.asked: set[str] = set()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """The arguments without defaults are traced; the others keep their defaults."""
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.names]
        return functools.partial(_once_each, root_fn), [self.root, *values]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def type_of(self, value: fx.Proxy) -> type:
        if value.node.op != "placeholder":
            raise Untraceable("its forward asks for the type of an intermediate value")
        self.asked.add(str(value.node.target))
        return self.kind

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.expand

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(type(a) in (list, dict, set) for a in (*args, *kwargs.values())):
            raise Untraceable("its forward hands a list or dict to a submodule, which may change it")
        if type(m).__call__ is not nn.Module.__call__:
            raise Untraceable(f"{type(m).__name__} has a __call__ of its own")
        if self.path_of_module(m) in self.expand:
            return own_forward(m)(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if (
            type(a) not in (list, dict)
            and not issubclass(type(a), fx.Proxy)
            and isinstance(a, (list, dict))
            and not isinstance(a, fx.node.Node)
        ):
            raise Untraceable(f"its forward makes a {type(a).__name__}")
        if type(a) is Tensor:
            raise Untraceable("its forward uses a tensor that is neither parameter nor buffer")
        return super().create_arg(a)


def _once_each(forward: Callable[..., Any], *args: Any) -> Any:
    """What ``forward`` gives, unless the same list or dict is in it twice: a graph would make two of it."""
    result = forward(*args)
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if type(value) in (list, dict, tuple):
            if type(value) is not tuple and id(value) in seen:
                raise Untraceable("its forward returns one list or dict in two places")
            seen.add(id(value))
            for inner in value.values() if type(value) is dict else value:
                visit(inner)

    visit(result)
    return result


class _NoTensors(TorchFunctionMode):
    """No computation on real tensors while tracing: its result would be written into the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise Untraceable(f"its forward calls {getattr(func, '__name__', func)} on no value of its own")
        return func(*args, **kwargs)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """``training`` False everywhere, and back."""
    before = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in before:
            m.training = False
        yield
    finally:
        for m, training in before:
            m.training = training


class _Seen:
    """The values that the forward's own code read, and the functions that ran."""

    def __init__(self, module: nn.Module) -> None:
        self.paths = {id(m): tuple(name.split(".")) if name else () for name, m in module.named_modules()}
        self.reads: dict[tuple[int, str], Read] = {}
        self.allowed: set[CodeType] = set()
        self.inner: set[CodeType] = set()
        self.known: set[CodeType] = set()
        self.globals: dict[tuple[int, str], Rebindable] = {}
        self.compares = False  # whether it asks of a value of its own whether it is None

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """Note a read; raise where its value cannot be compared later."""
        path = self.paths.get(id(module))
        if name.startswith("__") or isinstance(value, fx.Proxy):
            return
        if path is None:
            raise Untraceable(f"its forward reads {name} of a module outside of it")
        if isinstance(value, Tensor):
            self.reads[id(module), name] = Read(path, name, TENSOR)
        elif isinstance(value, MethodType) and name not in module.__dict__:
            if in_torch(value.__func__.__module__ or "") and value.__func__.__code__ not in allowed.codes():
                raise Untraceable(f"its forward uses {name} of a module")
            self.reads[id(module), name] = Read(path, name, METHOD)
        elif isinstance(value, nn.Module):
            if id(value) not in self.paths:
                raise Untraceable(f"its forward reads {name}, a module outside of it")
            child = Child(self.paths[id(value)], original_class(value) or type(value))
            self.reads[id(module), name] = Read(path, name, child)
            if isinstance(value, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and id(value) in self.paths:
                self._container(value)
        elif _plain(value) or isinstance(value, (FunctionType, BuiltinFunctionType)):
            self.reads[id(module), name] = Read(path, name, value)
            if isinstance(value, FunctionType):
                self._follow(value)
        else:
            raise Untraceable(f"its forward reads {name}, a {type(value).__name__}")

    def _container(self, module: nn.Module) -> None:
        """A forward may go through a container's children and ask each for its class."""
        path = self.paths[id(module)]
        self.reads[id(module), "_modules"] = Read(path, "_modules", tuple(module._modules))
        for key, child in module._modules.items():
            if child is not None:
                place = Child(self.paths[id(child)], original_class(child) or type(child))
                self.reads[id(module), key] = Read(path, key, place)

    def _follow(self, function: FunctionType) -> None:
        """Allow a function of the user's to be called; its code is checked when it runs."""
        if in_torch(function.__module__ or ""):
            return
        if any(not name.startswith("_torch") for name in vars(function)):
            raise Untraceable(f"{function.__name__} keeps attributes of its own")
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not all(_plain(d) or callable(d) for d in defaults):
            raise Untraceable(f"{function.__name__} keeps a value between its calls, as a default")
        self.known.add(function.__code__)

    def method(self, frame: Any) -> None:
        """Note which attribute of a module's class the function is that is about to run."""
        code = frame.f_code
        owner: Any = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if not issubclass(type(owner), nn.Module) or code.co_name == "<lambda>":  # no isinstance: a value answers it
            return
        if code.co_name == "__call__":
            raise Untraceable(f"{type(owner).__name__} has a __call__ of its own")
        cls = original_class(owner) or type(owner)
        for base in cls.__mro__:
            for name, value in vars(base).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if getattr(function, "__code__", None) is code:
                    self._follow(function)
                    reached = cls if lookup(cls, name) is value else base
                    self.globals[id(reached), name] = Rebindable(reached, name, value)
                    return

    def names(self, code: CodeType, globals_: dict[str, Any]) -> None:
        """Note what the names in ``code`` stand for: someone may bind them anew."""
        owner: Any = None
        space: Any
        for instruction in dis.get_instructions(code):
            name, argument = instruction.opname, instruction.argval
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                owner, space = globals_, globals_
            elif name in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(owner, (ModuleType, type)):
                space = owner if isinstance(owner, type) else vars(owner)
            else:
                owner = None
                continue
            value = lookup(space, argument)
            if owner is not globals_ and not isinstance(value, _CONSTANT) and not _plain(value):
                raise Untraceable(f"{code.co_name} uses {argument} of {getattr(owner, '__name__', owner)}")
            if isinstance(value, type):
                self._class_used(value)
            self.globals[id(space), argument] = Rebindable(space, argument, value)
            if isinstance(value, ModuleType) and value.__name__ not in MODULES:
                raise Untraceable(f"{code.co_name} uses {value.__name__}")
            if isinstance(owner, ModuleType) and callable(value) and not allowed.named(value):
                raise Untraceable(f"{code.co_name} uses {argument}")
            if isinstance(value, FunctionType):
                self._follow(value)
            owner = value

    def _class_used(self, cls: type) -> None:
        """A forward may reach whatever a class of the user's holds: nothing there may change unseen."""
        for base in cls.__mro__:
            if base.__module__.split(".")[0] in (*sys.stdlib_module_names, "torch"):
                continue
            for name, value in vars(base).items():
                if name.startswith("__") or isinstance(value, _CONSTANT):
                    continue
                if not _plain(value) and not name.startswith("_abc_"):
                    raise Untraceable(f"{name} of {cls.__name__} is a {type(value).__name__}")
                self.globals[id(base), name] = Rebindable(base, name, value)

    def call(self, frame: Any) -> None:
        """Raise when a function about to run is not allowed to."""
        code, globals_ = frame.f_code, frame.f_globals
        if code not in self.inner:
            self.method(frame)
        if code in self.allowed:
            return
        if code not in self.known and code not in self.inner:
            raise Untraceable(f"{code.co_name} is called in a way that cannot be followed")
        problem = hazard(code, globals_, code in self.inner)
        if problem is not None:
            raise Untraceable(f"{code.co_name} {problem}")
        self.names(code, globals_)
        root = frame.f_back is not None and frame.f_back.f_code is _once_each.__code__
        self.compares |= compares_values(code, root)
        self.allowed.add(code)
        self.inner.update(c for c in code.co_consts if isinstance(c, CodeType))


# What a class or module holds under a name and nothing can be kept in.
_CONSTANT = (FunctionType, BuiltinFunctionType, ModuleType, type, staticmethod, classmethod, property)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_plain(v) for v in value)
    return isinstance(value, _PLAIN)


@contextlib.contextmanager
def _watching(module: nn.Module) -> Iterator[_Seen]:
    """Note attribute reads and function calls outside of torch's own code, in this thread."""
    seen, me, profiler = _Seen(module), threading.get_ident(), sys.getprofile()

    def getattribute(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if threading.get_ident() == me and not _quiet(sys._getframe(1)):
            seen.read(self, name, value)
        return value

    original_getattr = nn.Module.__getattr__

    def getattr_(self: nn.Module, name: str) -> Any:
        value = original_getattr(self, name)
        if threading.get_ident() == me and not _quiet(sys._getframe(1)):
            seen.read(self, name, value)
        return value

    def called(frame: Any, event: str, argument: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "c_call" and frame.f_code in seen.allowed and not allowed.builtin_call(argument):
            raise Untraceable(f"its forward calls {getattr(argument, '__name__', argument)}")
        if event != "call":
            return
        if name in _CONTEXTS and frame.f_back is not None and frame.f_back.f_code in seen.allowed:
            raise Untraceable(f"its forward runs a part of itself through {name}")
        if not _quiet(frame) and not _in_library(frame.f_back):  # Python's import hooks belong to no forward
            seen.call(frame)
        elif (
            frame.f_back is not None
            and frame.f_back.f_code in seen.allowed
            and not allowed.library_call(frame.f_code, name)
        ):
            raise Untraceable(f"its forward calls {frame.f_code.co_name} of {name}")

    nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign,assignment]
    nn.Module.__getattr__ = getattr_  # type: ignore[method-assign]
    collecting = gc.isenabled()
    gc.disable()  # finalisers of collected objects belong to no forward
    sys.setprofile(called)
    try:
        yield seen
    finally:
        sys.setprofile(profiler)
        if collecting:
            gc.enable()
        nn.Module.__getattr__ = original_getattr  # type: ignore[method-assign]
        del nn.Module.__getattribute__


def _quiet(frame: Any) -> bool:
    """Whether the frame belongs to torch, Python's library or this package, which a forward may run."""
    name = frame.f_globals.get("__name__", "")
    ours = name.split(".")[0] == __name__.split(".")[0]
    return in_torch(name) or ours or name.startswith("namedtuple_") or _in_library(frame)


def _in_library(frame: Any) -> bool:
    name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.split(".")[0] in sys.stdlib_module_names
