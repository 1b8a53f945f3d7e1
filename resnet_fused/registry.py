"""Backends that users register: kernels of their own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPS = ("conv_bn_act", "add_relu", "basic_block", "bottleneck")
_TAKEN = ("auto", "chain", "reference", "onednn", "cpu", "cudnn", "triton", "cuda")

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Registered:
    """A registered backend for one op: ``supports(call)`` and ``run(call)``, as a backend's module has them."""

    run: Kernel
    supports: Callable[[Any], str | None]


@dataclass(frozen=True)
class Configurable(Registered):
    """The same with launch configs; ``run`` takes one as its second argument."""

    configs: Callable[[Any], Sequence[Any]]


REGISTERED: dict[tuple[str, str], Registered] = {}
LOADED: dict[str, str] = {}  # modules that load() imported, and digests of their files
_names: list[str] = []


def names() -> list[str]:
    """Names of the registered backends, in the order of registration."""
    return _names


def register_backend(
    name: str,
    op: str = "conv_bn_act",
    *,
    supports: Callable[[Any], str | None] | None = None,
    configs: Callable[[Any], Sequence[Any]] | None = None,
) -> Callable[[Kernel], Kernel]:
    """Make a function of yours a backend: ``backend=name`` then calls it, benchmarks gate, time and draw it, and
    ``resnet-fused tune`` measures it. ``backend="auto"`` takes it where a tuning table says that it is the fastest.

    ::

        @resnet_fused.register_backend("mine", supports=lambda call: None if call.conv.groups == 1 else "groups")
        def conv_bn_act(call):
            conv = call.conv        # weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, stride, …
            return my_kernel(call.x, conv.weight, ..., call.residual, relu=call.act == "relu")

    Args:
        name: letters, digits and underscores; not one of ours. One name may serve several ops.
        op: "conv_bn_act" (the function gets a ``ConvBNActCall``), "add_relu" (``AddReLUCall``), "basic_block" or
            "bottleneck" (``BlockCall``). The call has been checked; the result needs its shape and dtype, and for
            add_relu the strides of ``a + b``.
        supports: why a call cannot be served, or None; by default every call can.
        configs: launch configs for a call (strings, numbers, or tuples of them), tried by the tuner; the function
            then takes one, or None for its own choice, as its second argument.

    Registering the same pair again replaces it.

    Raises:
        ValueError: the name is taken or is no name, or there is no such op.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in _TAKEN:
        raise ValueError(f"name: got {name!r}, need letters, digits and underscores, and none of {', '.join(_TAKEN)}")
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, need one of {OPS}")
    accepts = supports or (lambda call: None)

    def decorate(kernel: Kernel) -> Kernel:
        REGISTERED[op, name] = (
            Registered(kernel, accepts) if configs is None else Configurable(kernel, accepts, configs)
        )
        if name not in _names:
            _names.append(name)
        _choose_anew()
        return kernel

    return decorate


def unregister_backend(name: str) -> None:
    """Forget the backend ``name``, of every op.

    Raises:
        ValueError: no backend of this name is registered.
    """
    if name not in _names:
        raise ValueError(f"name: got {name!r}, need one of {_names}")
    _names.remove(name)
    for pair in [pair for pair in REGISTERED if pair[1] == name]:
        del REGISTERED[pair]
    _choose_anew()


def load(spec: str) -> None:
    """Import a module that registers backends: ``package.module``, or the path of a file that ends in ``.py``.

    A module is looked for in the working directory too; a file may import its neighbours.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: whatever the module raises.
    """
    path = Path(spec).resolve() if spec.endswith(".py") else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    folder = os.getcwd() if path is None else str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    if path is None:
        origin = importlib.import_module(spec).__file__
        path, name = Path(origin) if origin else None, spec
    else:
        name = path.stem
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(name, module)  # where Triton, say, looks for a kernel's globals
        found.loader.exec_module(module)
    LOADED[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path else ""


def _choose_anew() -> None:
    from resnet_fused.tuning import lookup

    lookup.forget()
