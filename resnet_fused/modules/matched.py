"""The code that a fused part stands for: the functions of its class, as they were when they were matched."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# How a module is called and its attributes are looked up.
_MACHINERY = ("__call__", "__getattr__", "__getattribute__")

Global = tuple[str, Any]  # a dotted name among a function's globals, and what it stood for


class Matched:
    """What the forward of ``cls`` consisted of: its methods, and functions that it has by global names.

    ``refusal()`` says which of them has been replaced since, or None. It holds no module; copies share it, and a pickle
    has the class, and each function's name and fingerprint.
    """

    refusal: Callable[[], str | None]

    def __init__(self, cls: type, methods: Iterable[str], names: Iterable[Global] = ()) -> None:
        self.cls, self.names = cls, tuple(names)
        present = [(name, getattr(cls, name)) for name in dict.fromkeys((*methods, *_MACHINERY))]
        self.methods = tuple((name, function, _code(function)) for name, function in present)
        scope: dict[str, Any] = next((f.__globals__ for _, f, _ in self.methods if hasattr(f, "__globals__")), {})
        self.globals = tuple((scope, tuple(dotted.split(".")), value) for dotted, value in self.names)
        self.refusal = _checker(cls, self.methods, self.globals)

    def __deepcopy__(self, memo: Any) -> Matched:
        return self

    def __reduce__(self) -> Any:
        prints = tuple((name, fingerprint(code)) for name, _, code in self.methods if name not in _MACHINERY)
        return _load, (self.cls, prints, self.names)


def _checker(cls: type, methods: Any, globals_: Any) -> Callable[[], str | None]:
    """A plain function without arguments, which torch.compile calls once and takes for constant."""

    def refusal() -> str | None:
        for name, function, code in methods:
            now = getattr(cls, name, None)
            if now is getattr(nn.Module, name, cls):
                continue  # inherited: of nn.Module's own functions guards.replaced speaks
            if now is not function or _code(now) is not code:
                return f"{cls.__qualname__}.{name} was replaced since it was matched"
        for scope, names, value in globals_:
            if resolve(scope, names) is not value:
                return f"{'.'.join(names)} in the forward of {cls.__qualname__} was replaced since it was matched"
        return None

    refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result
    return refusal


def resolve(scope: dict[str, Any], names: tuple[str, ...]) -> Any:
    """What a dotted name stands for among these globals; None where there is nothing."""
    found = scope.get(names[0])
    for name in names[1:]:
        found = getattr(found, name, None)
    return found


def _code(function: Any) -> CodeType | None:
    return getattr(function, "__code__", None)


def fingerprint(code: CodeType | None) -> str:
    """Equal for code that does the same, wherever its source is, under one version of Python."""
    return "" if code is None else hashlib.sha256(repr(tuple(_content(code))).encode()).hexdigest()


def _content(code: CodeType) -> Iterator[Any]:
    yield from (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_argcount)
    for constant in code.co_consts:
        yield tuple(_content(constant)) if isinstance(constant, CodeType) else constant


def _load(cls: type, prints: tuple[tuple[str, str], ...], names: tuple[Global, ...]) -> Matched:
    """From a pickle: what the class has now stands for what it had then only where it is the same code."""
    matched = Matched(cls, (name for name, _ in prints), names)
    for name, print_ in prints:
        if fingerprint(_code(getattr(cls, name, None))) != print_:
            matched.refusal = functools.partial(
                str,
                f"{cls.__qualname__}.{name} is not the function that it was when it was saved; fuse it again",
            )
    return matched


def reached(cls: type[nn.Module], start: Iterable[str]) -> tuple[str, ...]:
    """The names of ``start`` and of all methods of ``cls`` that they may call: whatever their code names."""
    found: dict[str, None] = {}
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in found or not hasattr(cls, name):
            continue
        found[name] = None
        method = getattr(cls, name)
        getter = method.fget if isinstance(method, property) else method
        if isinstance(getter, FunctionType):
            waiting += [n for n in _named(getter.__code__) if hasattr(cls, n) and not hasattr(nn.Module, n)]
    return tuple(found)


def _named(code: CodeType) -> Iterator[str]:
    """The names that code mentions, that of the functions within it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(constant)
