"""Finding convolution → batch norm (→ sum) (→ ReLU) and sum → ReLU in one module's forward, and planning it anew."""

from __future__ import annotations

import builtins
import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.fx.node import _get_qualified_name
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from resnet_fused import backends
from resnet_fused.fusion.match import conv_refusal, norm_refusal, watched_reason
from resnet_fused.fusion.trace import Trace, Untraceable, runs_in_turn, trace
from resnet_fused.modules import parts
from resnet_fused.modules.spec import path
from resnet_fused.modules.traced import IN_PLACE, Chain, Plan, conv_norm_act, sum_relu

CONV = "conv_bn_act"
SUM = "add_relu"

_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Found:
    """A chain in a module's forward, or something that might have been one; reason says why it is left alone."""

    chain: Chain
    reason: str | None = None


@dataclass(frozen=True)
class Analysis:
    """What the forward of one module holds, and the plans that run it so; no plan where nothing in it is fused."""

    found: tuple[Found, ...]
    plans: tuple[Plan, ...] = ()


def analyse(module: nn.Module, backend: str = backends.AUTO, wanted: Any = None) -> Analysis:
    """Find chains in the forward of ``module`` and plan them.

    ``wanted``, called with a chain, says whether to fuse it; all are when it is None.
    """
    reason = _module_refusal(module)
    try:
        if reason is not None:
            raise Untraceable(reason)
        traces = trace(module)
        expand = _expandable(module, traces[0].graph)
        if expand:
            traces = trace(module, expand)
        if any(_writes_argument(node) for traced in traces for node in traced.graph.nodes):
            raise Untraceable("its forward writes to an argument, where the caller would see another rounding")
    except Untraceable as error:
        return Analysis(_might_have_been(module, str(error)))
    found: dict[str, Found] = {}
    plans = []
    for traced in traces:
        rewriter = _Rewriter(module, traced, backend, wanted)
        rewriter.run()
        for item in rewriter.found:
            found.setdefault(item.chain.name, item)
        if rewriter.chains:
            plans.append(rewriter.plan())
    return Analysis(tuple(found.values()), tuple(plans))


def within_reach(module: nn.Module) -> Iterator[nn.Module]:
    """The children, and those in containers among them."""
    for child in module.children():
        yield child
        if isinstance(child, _CONTAINERS):
            yield from within_reach(child)


def _module_refusal(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        return f"it is a {'ScriptModule' if isinstance(module, torch.jit.ScriptModule) else 'GraphModule'}"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has another __call__"
    return None


def _might_have_been(module: nn.Module, reason: str) -> tuple[Found, ...]:
    """One entry for a module that holds convolutions and norms of its own, none for any other."""
    near = list(within_reach(module))
    if any(isinstance(m, nn.Conv2d) for m in near) and any(isinstance(m, _BatchNorm) for m in near):
        return (Found(Chain(CONV, ""), reason),)
    return ()


def _expandable(module: nn.Module, graph: fx.Graph) -> frozenset[str]:
    """Sequentials whose result is a term of a sum before a ReLU: their last convolution may take the sum along."""
    names: set[str] = set()
    for node in graph.nodes:
        if _relu_of(module, node) is None or not _is_add(node.args[0]):
            continue
        for term in node.args[0].args[:2]:
            if isinstance(term, fx.Node) and term.op == "call_module":
                names |= _in_turn(module.get_submodule(str(term.target)), str(term.target))
    return frozenset(names)


def _in_turn(module: nn.Module, name: str) -> set[str]:
    """The names of this Sequential and of those in it; none for another module or one that is watched."""
    if not runs_in_turn(module) or parts.touched(module):
        return set()
    inner = (_in_turn(child, f"{name}.{key}") for key, child in module._modules.items() if child is not None)
    return {name}.union(*inner)


def _is_add(node: Any) -> bool:
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return False
    if not all(isinstance(a, fx.Node) for a in node.args):
        return False
    return node.target in (_ADDS if node.op == "call_function" else ("add", "add_") if node.op == "call_method" else ())


def _writes_argument(node: fx.Node) -> bool:
    """Whether an operation in place has an argument of the forward on its left."""
    name = str(getattr(node.target, "__name__", node.target))
    written = node.args[0] if node.op in ("call_function", "call_method") and node.args else None
    return isinstance(written, fx.Node) and written.op == "placeholder" and _writes(name)


def _writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


def _adds_in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def _relu_of(module: nn.Module, node: fx.Node) -> nn.Module | str | None:
    """The ReLU that this node calls: a module, or "relu" for a function; None where it calls none."""
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.args) > 2:
        return None
    if node.op == "call_module":
        found = module.get_submodule(str(node.target))
        return found if type(found) is nn.ReLU else None
    if node.op == "call_function" and node.target in _RELUS and set(node.kwargs) <= {"inplace"}:
        return "relu"
    return "relu" if node.op == "call_method" and node.target in ("relu", "relu_") else None


class _Rewriter:
    """Replaces chains of nodes in one trace by calls of the fused ops."""

    def __init__(self, module: nn.Module, traced: Trace, backend: str, wanted: Any) -> None:
        self.module, self.traced, self.graph = module, traced, traced.graph
        self.backend, self.wanted = backend, wanted
        self.found: list[Found] = []
        self.chains: list[Chain] = []
        self.alone: set[str] = set(traced.expanded)
        self.given_format = _format_matters(module, self.graph)
        named = [n for n in self.graph.nodes if n.op == "get_attr"]
        self.tensors = {_memory(functools.reduce(getattr, str(n.target).split("."), module)) for n in named}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_module" and isinstance(self.module.get_submodule(str(node.target)), nn.Conv2d):
                self.convolution(node)
        for node in list(self.graph.nodes):
            if _is_add(node):
                self.sum(node)

    def plan(self) -> Plan:
        for node in self.graph.nodes:  # fx writes operators of Python as ``a += b``, which binds every other name of a
            if node.op == "call_function" and node.target in IN_PLACE:
                node.target = IN_PLACE[node.target]
        self.graph.lint()
        code = self.graph.python_code("self")
        used = set(compile(code.src, "<traced>", "exec").co_names)
        for constant in compile(code.src, "<traced>", "exec").co_consts:
            used |= set(getattr(constant, "co_names", ()))
        symbols = tuple((name, _importable(value)) for name, value in sorted(code.globals.items()) if name in used)
        t = self.traced
        alone = tuple(map(path, sorted(self.alone)))
        return Plan(code.src, symbols, t.names, t.types, t.reads, alone, tuple(self.chains), t.globals)

    def convolution(self, node: fx.Node) -> None:
        """A convolution and what follows it."""
        norm = next((user for user in node.users if self._is_norm(user)), None)
        if norm is None:
            return
        conv_name, norm_name = str(node.target), str(norm.target)
        conv, norm_module = self.module.get_submodule(conv_name), self.module.get_submodule(norm_name)
        reason = conv_refusal(conv, conv_name) or norm_refusal(norm_module, norm_name)
        if reason is None and len(node.users) > 1:
            others = ", ".join(sorted(str(user.target) for user in node.users if user is not norm))
            reason = f"the result of {conv_name} is also used by {others}"
        if reason is None and (len(node.args) != 1 or len(norm.args) != 1 or node.kwargs or norm.kwargs):
            reason = f"{conv_name} or {norm_name} is called with more than one tensor"
        if reason is None and any(n.target == norm.target for n in _between(node, norm)):
            reason = f"{norm_name} is used for something else between"
        if reason is None and self.tensors & _tensors(conv, norm_module):
            reason = f"its forward also uses tensors of {conv_name} or {norm_name} by themselves"
        act, last, residual, note = self._tail(node, norm)
        between = [n for n in _between(node, last) if n.op == "call_module" and n not in (norm, last)]
        if reason is None:
            reason = next((r for n in between if (r := self._shares(n, conv, norm_module))), None)
        act_path = path(str(last.target)) if isinstance(act, nn.Module) else None
        chain = Chain(CONV, conv_name, path(conv_name), path(norm_name), act_path, note)
        if not self._take(chain, conv, reason):
            return
        if between:  # the order of the calls changes, so nothing may observe it
            self.alone.update(str(n.target) for n in (node, norm, *between, last) if n.op == "call_module")
        with self.graph.inserting_before(node if residual is None else residual[0]):
            arguments = [self.graph.get_attr(conv_name), self.graph.get_attr(norm_name)]
            activation = act if isinstance(act, str) else self.graph.get_attr(str(last.target))
            state = self.graph.get_attr("_rf_state")
            term = None if residual is None else residual[1]
            inplace = residual is not None and _adds_in_place(residual[0])
            options = (term, inplace, state, self.given_format)
            fused = self.graph.call_function(conv_norm_act, (node.args[0], *arguments, activation, *options))
        self._replace(last, fused, [norm, node] if residual is None else [residual[0], norm, node])

    def _tail(self, conv: fx.Node, norm: fx.Node) -> tuple[Any, fx.Node, tuple[fx.Node, fx.Node] | None, str]:
        """Behind the norm: the activation, the chain's last node, the sum with its other term, and a note."""
        if len(norm.users) != 1:
            return "none", norm, None, ""
        user = next(iter(norm.users))
        act = _relu_of(self.module, user)
        if act is not None:
            if isinstance(act, nn.Module) and parts.touched(act):
                return "none", norm, None, watched_reason(act, str(user.target))
            return act, user, None, ""
        if _is_add(user) and len(user.users) == 1 and user.args[0] is not user.args[1]:
            last = next(iter(user.users))
            act = _relu_of(self.module, last)
            other: Any = user.args[1] if user.args[0] is norm else user.args[0]
            kept = user.args[0] is norm or not _adds_in_place(user)  # else the sum is written into the other term
            watched = isinstance(act, nn.Module) and parts.touched(act)
            if act is not None and kept and not watched and self._private(conv.args[0]):
                return act, last, (user, other), ""
        if user.op == "call_module" and len(user.args) == 1:
            follower = self.module.get_submodule(str(user.target))
            if type(follower).__module__ == "torch.nn.modules.activation":
                return "none", norm, None, f"{user.target} stays eager: it is {type(follower).__name__}"
        return "none", norm, None, ""

    def sum(self, node: fx.Node) -> None:
        """A sum and the ReLU behind it."""
        users = [user for user in node.users if _relu_of(self.module, user) is not None]
        if not users:
            return
        relu, inplace = users[0], _adds_in_place(node)
        act = _relu_of(self.module, relu)
        a, b = node.args
        reason = None
        if len(node.users) > 1:
            reason = "the sum is used by something else too"
        elif isinstance(act, nn.Module) and parts.touched(act):
            reason = watched_reason(act, str(relu.target))
        elif inplace and not self._private(a):
            reason = f"the sum is written into {a}, which is used by something else too"
        elif self.backend != backends.AUTO and backends.implementation(SUM, self.backend) is None:
            reason = f"{self.backend} has no {SUM}"
        act_path = path(str(relu.target)) if isinstance(act, nn.Module) else None
        if not self._take(Chain(SUM, node.name, None, None, act_path), self.module, reason):
            return
        with self.graph.inserting_before(node):
            activation = act if isinstance(act, str) else self.graph.get_attr(str(relu.target))
            state = self.graph.get_attr("_rf_state")
            fused = self.graph.call_function(sum_relu, (a, b, activation, inplace, state))
        self._replace(relu, fused, [node])

    def _take(self, chain: Chain, module: nn.Module, reason: str | None) -> bool:
        self.found.append(Found(chain, reason))
        if reason is not None or (self.wanted is not None and not self.wanted(chain, module)):
            return False
        self.chains.append(chain)
        return True

    def _replace(self, last: fx.Node, fused: fx.Node, inner: list[fx.Node]) -> None:
        last.replace_all_uses_with(fused)
        for node in dict.fromkeys([last, *inner]):
            self.graph.erase_node(node)

    def _shares(self, node: fx.Node, *chain: nn.Module) -> str | None:
        """Why ``node`` must keep its place among the calls of these modules."""
        other = self.module.get_submodule(str(node.target))
        if _tensors(*chain) & _tensors(other) or any(other is m for m in chain):
            return f"{node.target}, called between, uses the same tensors"
        return None

    def _private(self, node: Any) -> bool:
        """Whether nothing else can see the memory of this value: used once, and no name of an argument's.

        Hooks could keep it: the modules that make it are noted as ``alone``.
        """
        if not isinstance(node, fx.Node) or len(node.users) != 1 or node.op in ("placeholder", "get_attr"):
            return False
        if node.op == "call_function" and node.target in (conv_norm_act, sum_relu, operator.add):
            modules = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr" and n.target != "_rf_state"]
            self.alone.update(name for name in modules if self._is_module(name))
            return True
        if node.op == "call_module":
            cls = type(self.module.get_submodule(str(node.target)))
            if cls not in (*_FRESH, nn.ReLU):
                return False
            self.alone.add(str(node.target))
            if cls in _FRESH:
                return True
        return bool(node.all_input_nodes) and all(self._private(n) for n in node.all_input_nodes)

    def _is_module(self, name: str) -> bool:
        try:
            self.module.get_submodule(name)
        except AttributeError:  # a parameter or buffer
            return False
        return True

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self.module.get_submodule(str(node.target))
        return isinstance(module, _BatchNorm) or "Norm" in type(module).__name__


def _tensors(*modules: nn.Module) -> set[int]:
    """The memory of all that the modules compute with."""
    return {_memory(t) for m in modules for t in (*m.parameters(), *m.buffers())}


def _memory(value: Any) -> int:
    """Tensors of one storage have one number, whether or not they are one object."""
    if isinstance(value, Tensor) and value.layout is torch.strided and not isinstance(value, FakeTensor):
        return value.untyped_storage().data_ptr() or id(value)
    return id(value)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


_FRESH = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d)


_VIEWS = {"view", "as_strided", "stride", "storage_offset", "data_ptr", "storage", "untyped_storage", "set_", "unfold"}
# They draw their numbers in the order of memory.
_RANDOM = {"rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "uniform_", "normal_", "random_"} | {
    "dropout", "dropout_", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "rrelu",
    "exponential_", "cauchy_", "log_normal_", "geometric_", "gumbel_softmax",
}  # fmt: skip
_MAY_COPY = {"reshape", "flatten", "contiguous", "ravel", "reshape_as", "unflatten"}


def _format_matters(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether strides may decide what a forward does: views fail, and views that become copies are written apart.

    Random numbers come in the order of memory too.
    """
    names = {str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op.startswith("call_")}
    calls = [n for n in graph.nodes if n.op == "call_module"]
    names |= {
        "rand_like" for n in calls if isinstance(module.get_submodule(str(n.target)), nn.modules.dropout._DropoutNd)
    }
    names |= {"flatten" for n in calls if isinstance(module.get_submodule(str(n.target)), nn.Flatten)}
    if names & (_VIEWS | _RANDOM):
        return True
    return any(map(_writes, names)) and bool(names & _MAY_COPY)


_WRITES = {"setitem"} | {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


def _importable(value: Any) -> str:
    """The dotted name of a global of the generated text."""
    if isinstance(value, float):
        return "math.inf" if value == float("inf") else "math.nan"
    if hasattr(value, "__path__") or type(value).__name__ == "module":
        return str(value.__name__)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if getattr(builtins, getattr(value, "__name__", ""), None) is value:
        return f"builtins.{value.__name__}"
    return _get_qualified_name(value)
