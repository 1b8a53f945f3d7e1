"""Blocks of classes that no table knows, tutorials' and the user's own, matched by reading their forward.

A forward made of nothing but calls of submodules, ReLU, sums and an optional shortcut is turned into the expression
that it computes, and that expression must be a residual block's: names of attributes play no part. Any other
statement, decorator, closure or condition, and the class is not taken for a block.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused.fusion.adapters.table import BlockAdapter
from resnet_fused.modules import guards
from resnet_fused.modules.matched import resolve
from resnet_fused.modules.spec import BlockSpec, Path, find

# An expression: ("x",), ("call", path, e), ("maybe", path, e, how) for path(e) if path is there else e, ("relu", e) and
# ("add", e, e, how); how is as in BlockSpec.optional and BlockSpec.adds.
Expr = tuple[Any, ...]

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_X: Expr = ("x",)


class _Unreadable(Exception):
    """The forward has something in it that is not read here."""


@dataclass
class _Reading:
    """What a forward computes, None where it is not read here; the paths that it calls, in order; and what the global
    names in it stood for, dotted ones and their beginnings: it holds while they do."""

    expression: Expr | None
    order: list[Path]
    names: dict[str, Any]
    beginnings: dict[str, Any]


_READINGS: dict[tuple[CodeType, int], tuple[FunctionType, _Reading]] = {}


def read_block(module: nn.Module) -> BlockAdapter | None:
    """The adapter of this very block, or None where its forward is not that of a residual block."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or (forward.__module__ or "").startswith("torch."):
        return None
    key = (forward.__code__, id(forward.__globals__))
    _, reading = _READINGS.get(key, (forward, None))
    if reading is None or not _holds(reading, forward.__globals__):
        reading = _read(forward)
        if len(_READINGS) >= _MOST_READINGS:
            _READINGS.clear()
        _READINGS[key] = forward, reading  # which keeps its globals alive, so that their id stays theirs
    return None if reading.expression is None else _adapter(module, reading.expression, reading)


_MOST_READINGS = 1024


def _holds(reading: _Reading, scope: dict[str, Any]) -> bool:
    now = all(scope.get(name) is value for name, value in reading.beginnings.items())
    return now and all(resolve(scope, tuple(name.split("."))) is value for name, value in reading.names.items())


def _adapter(module: nn.Module, expression: Expr, reading: _Reading) -> BlockAdapter | None:
    """Match relu(norm(conv(… relu(norm(conv(x))))) + shortcut)."""
    last: list[Path] = []
    total = _act(expression, last)
    if total is None or total[0] != "add":
        return None
    _, left, right, how = total
    # A sum in place is written into its left side, which only the last norm's result may be.
    for chain, added in ((left, right), (right, left))[: 1 if how == "+=" else 2]:
        acts = list(last)
        containers: list[tuple[Path, int]] = []
        shortcut, optional, adds = None, "", how
        if added[0] in ("call", "maybe") and added[2] == _X:
            shortcut, optional = added[1], (added[3] if added[0] == "maybe" else "")
            called = {path: i for i, path in enumerate(reading.order)}
            if any(called[path] > called[shortcut] for path in _called(chain)):
                adds = ""
        elif added != _X:
            continue
        pairs = _pairs(_expand(module, chain, containers), acts)
        if pairs is not None:
            spec = BlockSpec(
                pairs, tuple(dict.fromkeys(acts)), shortcut, containers=tuple(containers), optional=optional, adds=adds
            )
            kind = "basic_block" if len(pairs) == 2 else "bottleneck"
            return BlockAdapter(kind, spec, names=tuple(reading.names.items()))
    return None


def _called(expression: Expr) -> Iterator[Path]:
    """The paths that a chain calls."""
    while expression != _X:
        if expression[0] == "call":
            yield expression[1]
        expression = expression[2] if expression[0] == "call" else expression[1]
        if expression[0] not in ("call", "relu", "x"):
            return


def _act(expression: Expr, acts: list[Path]) -> Expr | None:
    """What the activation on the outside is applied to."""
    if expression[0] == "relu":
        return expression[1]  # type: ignore[no-any-return]
    if expression[0] == "call":
        acts.append(expression[1])
        return expression[2]  # type: ignore[no-any-return]
    return None


def _pairs(chain: Expr, acts: list[Path]) -> tuple[tuple[Path, Path], ...] | None:
    pairs: list[tuple[Path, Path]] = []
    rest: Expr | None = chain
    while rest is not None and rest[0] == "call" and rest[2][0] == "call":
        pairs.insert(0, (rest[2][1], rest[1]))
        rest = rest[2][2]
        if rest == _X:
            return tuple(pairs) if len(pairs) in (2, 3) else None
        rest = _act(rest, acts) if rest is not None else None
    return None


def _expand(module: nn.Module, expression: Expr, containers: list[tuple[Path, int]]) -> Expr:
    """``expression`` with calls of Sequentials written as calls of what is in them."""
    if expression[0] == "relu":
        return ("relu", _expand(module, expression[1], containers))
    if expression[0] != "call":
        return expression
    path, inner = expression[1], _expand(module, expression[2], containers)
    found = find(module, path)
    if type(found) is not nn.Sequential or guards.touched(found) or not len(found):
        return ("call", path, inner)
    containers.append((path, len(found)))
    for key in found._modules:
        inner = _expand(module, ("call", (*path, key), inner), containers)
    return inner


def _read(function: FunctionType) -> _Reading:
    """What the function computes."""
    code, scope = function.__code__, function.__globals__
    reading = _Reading(None, [], {}, {name: scope[name] for name in code.co_names if name in scope})
    if code.co_freevars or code.co_argcount != 2 or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return reading
    try:
        source = textwrap.dedent(inspect.getsource(code))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return reading
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return reading
    definition = tree.body[0]
    if not _same_code(definition, code, function.__globals__):
        return reading
    names = [a.arg for a in definition.args.args]
    if definition.decorator_list or len(names) != 2 or definition.args.defaults or definition.args.kwonlyargs:
        return reading
    reader = _Reader(names[0], names[1], function.__globals__, reading)
    with contextlib.suppress(_Unreadable):
        reading.expression = reader.run(definition.body)
    return reading


def _same_code(definition: ast.FunctionDef, code: CodeType, globals_: dict[str, Any]) -> bool:
    """Whether the source found is that of the code that runs, rather than an edited file's.

    Python compiles ``F.relu(x)`` otherwise where it saw F being imported, so both ways are tried.
    """
    modules = [name for name in code.co_names if isinstance(globals_.get(name), ModuleType)]
    imports: list[ast.stmt] = [ast.Import([ast.alias(name)]) for name in modules]
    for before in ([], imports):
        tree = ast.fix_missing_locations(ast.Module([*before, definition], []))
        for constant in compile(tree, "<forward>", "exec", dont_inherit=True).co_consts:
            if isinstance(constant, CodeType) and _content(constant) == _content(code):
                return True
    return False


def _content(code: CodeType) -> tuple[Any, ...]:
    return (code.co_name, code.co_code, code.co_names, code.co_consts, code.co_varnames)


def _calls(expression: Expr) -> int:
    """How many calls are in it."""
    match expression:
        case ("relu", inner) | ("call", _, inner) | ("maybe", _, inner, _):
            return 1 + _calls(inner)
        case ("add", left, right, _):
            return _calls(left) + _calls(right)
        case _:
            return 0


class _Reader:
    """Runs the statements of a forward on expressions."""

    def __init__(self, me: str, x: str, globals_: dict[str, Any], reading: _Reading) -> None:
        self.me, self.globals, self.reading = me, globals_, reading
        self.values: dict[str, Expr] = {x: _X}
        self.calls = 0

    def run(self, body: list[ast.stmt]) -> Expr:
        for statement in body:
            match statement:
                case ast.Expr(value=ast.Constant()):
                    pass
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name != self.me:
                    self.values[name] = self.value(value)
                case ast.AugAssign(target=ast.Name(id=name), op=ast.Add(), value=value):
                    before = self.values.get(name, _X)
                    if before[0] != "call" or before[2] == _X or sum(v is before for v in self.values.values()) > 1:
                        raise _Unreadable  # written in place: it may be the input, or have another name
                    self.values[name] = ("add", before, self.value(value), "+=")
                case ast.If(test=test, body=[ast.Assign(targets=[ast.Name(id=name)], value=value)], orelse=orelse):
                    self.values[name] = self.optional(test, name, value, orelse)
                case ast.Return(value=value) if value is not None:
                    result = self.value(value)
                    if _calls(result) != self.calls:
                        raise _Unreadable  # some call is not part of the result, or is more than once
                    return result
                case _:
                    raise _Unreadable
        raise _Unreadable

    def optional(self, test: ast.expr, name: str, value: ast.expr, orelse: list[ast.stmt]) -> Expr:
        """``if self.a is not None: name = self.a(e)``, where name is e otherwise."""
        match test:
            case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
                path, how = self.path(left), "is not None"
            case _:
                path, how = self.path(test), "truth"
        match orelse:
            case []:
                otherwise = self.values.get(name)
            case [ast.Assign(targets=[ast.Name(id=other)], value=other_value)] if other == name:
                otherwise = self.value(other_value)
            case _:
                raise _Unreadable
        called = self.value(value)
        if called[0] != "call" or called[1] != path or called[2] != otherwise:
            raise _Unreadable
        return ("maybe", path, called[2], how)

    def value(self, node: ast.expr) -> Expr:
        match node:
            case ast.Name(id=name) if name in self.values:
                return self.values[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return ("add", self.value(left), self.value(right), "+")
            case ast.Call(func=func, args=[argument], keywords=keywords):
                self.calls += 1
                if self.is_relu(func):
                    if any(k.arg != "inplace" or not isinstance(k.value, ast.Constant) for k in keywords):
                        raise _Unreadable
                    return ("relu", self.value(argument))
                if keywords:
                    raise _Unreadable
                path, value = self.path(func), self.value(argument)
                self.reading.order.append(path)
                return ("call", path, value)
            case _:
                raise _Unreadable

    def is_relu(self, node: ast.expr) -> bool:
        match node:
            case ast.Call(func=cls, args=[], keywords=keywords):  # nn.ReLU(inplace=True)(…)
                plain = all(k.arg == "inplace" and isinstance(k.value, ast.Constant) for k in keywords)
                return plain and self.known(cls) is nn.ReLU
            case _:
                return any(self.known(node) is relu for relu in _RELUS)

    def known(self, node: ast.expr) -> Any:
        """The object that a global, dotted name stands for, or None."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id == self.me or node.id in self.values:
            return None
        path = (node.id, *reversed(names))
        found = resolve(self.globals, path)
        self.reading.names[".".join(path)] = found
        return found

    def path(self, node: ast.expr) -> Path:
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not names or not isinstance(node, ast.Name) or node.id != self.me:
            raise _Unreadable
        return tuple(names)
