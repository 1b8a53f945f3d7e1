"""The functions that a traced forward may call: those that compute with tensors and have no side effects."""

from __future__ import annotations

import functools
import inspect
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import get_overridable_functions

BUILTINS = {
    "abs", "bool", "dict", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min", "range", "reversed",
    "sorted", "str", "sum", "super", "tuple", "zip", "__debug__",
}  # fmt: skip
# They make tensors from traced values; called with none, _NoTensors in trace.py refuses them.
_MAKERS = ("zeros", "ones", "full", "empty", "arange", "linspace", "rand", "randn", "randint", "eye")
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
_IN_PLACE = ("relu_", "sigmoid_", "tanh_", "dropout_", "clamp_", "exp_", "neg_", "sqrt_", "square_", "abs_")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_READS = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items", "_get_abs_string_index")
# fx stands between a forward and its modules; the namedtuples' and typing's code only builds values.
_MODULES = ("torch.fx", "typing", "collections", "enum", "abc", "_collections_abc", "resnet_fused", "operator")
_LOCALS = (list, tuple, dict, set, str, int, float, bool, slice, range)


@functools.cache
def functions() -> frozenset[Any]:
    """The functions of torch that may be called: what computes with the tensors that it is given."""
    found = {f for fs in get_overridable_functions().values() for f in fs if callable(f)}
    named = {getattr(m, n, None) for m in (torch, F) for n in (*_MAKERS, *_LIKE, *_IN_PLACE, "hardswish", "elu_")}
    return frozenset(found | {f for f in named if f is not None} | {F.leaky_relu_, F.selu_, F.celu_})


@functools.cache
def codes() -> frozenset[CodeType]:
    """The code of what of torch is written in Python and may be called."""
    found = {code for f in functions() if (code := _code(f)) is not None}
    for cls in _CONTAINERS:
        found |= {code for name in _READS if (code := _code(getattr(cls, name, None))) is not None}
    scripting: Any = torch.jit
    more = (nn.Sequential.forward, nn.Module.children, nn.Module.named_children, scripting.is_scripting)
    instance_checks = (type(nn.Parameter).__instancecheck__,)
    return frozenset(found | {code for f in (*more, *instance_checks) if (code := _code(f)) is not None})


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None) or getattr(function, "__code__", None)


def in_torch(name: str) -> bool:
    """Whether a module of this name is part of torch."""
    return name == "torch" or name.startswith("torch.")


def named(value: Any) -> bool:
    """Whether a forward may name this callable, which it finds in a module of torch or of Python."""
    return isinstance(value, type) or builtin_call(value) or (_code(value) in codes())


def library_call(code: CodeType, module: str) -> bool:
    """Whether a forward may call this function of torch or of Python's library."""
    return code in codes() or any(module == m or module.startswith(f"{m}.") for m in _MODULES) or (
        module.startswith("namedtuple_") or code.co_filename == "<string>"
    )  # fmt: skip


def builtin_call(function: Any) -> bool:
    """Whether a forward may call this function that is not written in Python."""
    owner = getattr(function, "__self__", None)
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    if issubclass(type(owner), _LOCALS):  # no isinstance: a traced value answers it
        return True
    if module == "builtins" or getattr(owner, "__name__", "") == "builtins":
        return name in BUILTINS
    if module in ("math", "_operator"):
        return True
    if inspect.ismethoddescriptor(function):
        return getattr(function, "__objclass__", None) in (*_LOCALS, object) or _known(function)
    return _known(function)


def _known(function: Any) -> bool:
    try:
        return function in functions()
    except TypeError:  # it cannot be hashed
        return False
