"""Read the bytecode of a function before it is traced."""

from __future__ import annotations

import builtins
import dis
import math
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.fusion import allowed

MODULES = {"torch", "torch.nn", "torch.nn.functional", "torch.jit", "math", "operator"}
_BLOCKED = {"checkpoint", "get_default_dtype", "get_autocast_dtype", "initial_seed", "hasattr", "getattr", "setattr"}
_EFFECTS = {
    "STORE_ATTR": "writes an attribute", "DELETE_ATTR": "deletes an attribute", "STORE_GLOBAL": "writes a global",
    "IMPORT_NAME": "imports", "YIELD_VALUE": "is a generator", "SETUP_FINALLY": "has a try or with statement",
    "SETUP_WITH": "has a with statement", "BEFORE_WITH": "has a with statement", "LOAD_SPECIAL": "has a with statement",
    "PUSH_EXC_INFO": "has a try or with statement",
}  # fmt: skip
# What a tensor has, or None: no question whether it is there can be answered while tracing.
_OPTIONAL = {"grad", "grad_fn", "_base", "_grad", "_grad_fn", "names"}


def hazard(code: CodeType, globals_: dict[str, Any], inner: bool) -> str | None:
    """What could make a function that ran behave differently another time."""
    if not inner and set(code.co_freevars) - {"__class__"}:
        return "is a closure"
    previous = ""
    for instruction in dis.get_instructions(code):
        name, argument, before = instruction.opname, instruction.argval, previous
        previous = name
        if name == "IS_OP" and before != "LOAD_CONST":
            return "asks whether two values are the same object"
        if name in _EFFECTS and not (name == "YIELD_VALUE" and inner):
            return _EFFECTS[name]
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            missing = object()
            found = globals_.get(argument, missing)
            builtin = found is missing
            known = getattr(builtins, argument, None)
            error = isinstance(known, type) and issubclass(known, Exception)
            if builtin and argument not in allowed.BUILTINS and not error:
                return f"uses {argument}"
            if not builtin and not _allowed(found):
                return f"uses {argument}"
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and (
            argument in _BLOCKED
            or argument in _OPTIONAL
            or (argument.startswith("__") and argument.endswith("__"))
            or (argument.startswith("is_") and argument != "is_scripting")
        ):
            return f"uses {argument}"
    return None


def compares_values(code: CodeType, root: bool) -> bool:
    """Whether a value other than a module's attribute, or an argument that was given, is compared with None."""
    found = list(dis.get_instructions(code))
    stored = {i.argval for i in found if i.opname.startswith(("STORE_FAST", "DELETE_FAST", "STORE_DEREF"))}
    given = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - stored if root else set()
    for n, instruction in enumerate(found):
        if instruction.opname == "IS_OP":
            before = n - 2  # the constant is between
        elif "JUMP" in instruction.opname and instruction.opname.endswith("NONE"):
            before = n - 1
        else:
            continue
        last = before
        while last > 0 and found[last].opname == "LOAD_ATTR":
            last -= 1
        operand = found[last]
        if not operand.opname.startswith("LOAD_FAST") or not isinstance(operand.argval, str):
            return True
        of_module = last != before and code.co_argcount > 0 and operand.argval == code.co_varnames[0]
        if not of_module and (last != before or operand.argval not in given):
            return True
    return False


def _allowed(value: Any) -> bool:
    """Whether a global of this value is the same in every call."""
    if isinstance(value, ModuleType):
        return value.__name__ in MODULES
    if isinstance(value, FunctionType):
        return value.__name__ not in _BLOCKED and not hasattr(value, "__wrapped__")
    if isinstance(value, BuiltinFunctionType):
        return (
            value.__module__ in ("math", "_operator")
            or allowed.in_torch(value.__module__ or "")
            or _torch_function(value)
        )
    if isinstance(value, type):
        return issubclass(value, (Tensor, nn.Module)) or value.__module__ in ("builtins", "typing", "collections")
    return value is math.inf or getattr(value, "__module__", "") == "typing" or value is builtins


def _torch_function(value: Any) -> bool:
    name = getattr(value, "__name__", "")
    return getattr(torch, name, None) is value and name not in _BLOCKED and not name.startswith("is_")
