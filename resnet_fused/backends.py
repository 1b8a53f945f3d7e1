"""The backends of this process, and the choice of one for each call.

A backend is a module ``ops/<op>/<backend>.py`` with two functions: ``supports(call)``, which gives the reason why it
cannot take this call or None, and ``run(call)``. It may have ``bind(call)``, which gives what computes calls with the
same weights and shapes (ops/block_cpu.py), and ``launches(call, out, workspace)`` with ``workspace_bytes(call)``: what
writes where it is told (ops/device_plan.py). Modules are imported on first use, so ``import resnet_fused`` needs torch
alone.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch

from resnet_fused import extension
from resnet_fused.registry import REGISTERED, names
from resnet_fused.tuning import lookup

logger = logging.getLogger("resnet_fused")


class Backend(str, enum.Enum):
    """What computes an op; ``backend="auto"`` chooses among these."""

    REFERENCE = "reference"
    ONEDNN = "onednn"
    CPU = "cpu"
    CUDNN = "cudnn"
    TRITON = "triton"
    CUDA = "cuda"

    def __str__(self) -> str:
        return self.value


AUTO = "auto"
NAMES = tuple(b.value for b in Backend)


class Server(Protocol):
    """What computes a call: a backend's module, or such a module with a launch config."""

    @property
    def run(self) -> Callable[[Any], Any]: ...


class BackendError(RuntimeError):
    """A named backend cannot compute this call; the message says why, and which backends can."""


class PerformanceWarning(UserWarning):
    """None of the package's own kernels can run where ``fuse`` was called. Once a process for each kind of device."""


_WARNED: set[str] = set()


def warn_without_kernels(device: torch.device) -> None:
    """Warn the caller of ``fuse`` where ``auto`` has nothing but PyTorch's own operators for models on ``device``."""
    own = {"cpu": (Backend.CPU,), "cuda": (Backend.TRITON, Backend.CUDA)}.get(device.type, ())
    reasons = {str(name): unavailable(name) for name in own}
    if device.type in _WARNED or not own or None in reasons.values():
        return
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    warnings.warn(
        f"fuse: none of the kernels of resnet_fused runs on {device.type} here, PyTorch's operators compute instead "
        f"({text}). To silence this: warnings.simplefilter('ignore', resnet_fused.PerformanceWarning)",
        PerformanceWarning,
        stacklevel=3,
    )
    _WARNED.add(device.type)


def all_names() -> tuple[str, ...]:
    """NAMES, then those that :func:`resnet_fused.register_backend` added."""
    return (*NAMES, *names())


def check_name(backend: str) -> str:
    """Return ``backend`` as a plain string; ValueError when there is no such backend."""
    name = str(backend)
    if name != AUTO and name not in NAMES and name not in names():
        raise ValueError(f"backend: got {backend!r}, need 'auto' or one of {', '.join(map(repr, all_names()))}")
    return name


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot run in this process at all, or None when it can."""
    return None if backend in names() else _unavailable(backend)


@functools.cache
def _unavailable(backend: str) -> str | None:
    match Backend(backend):
        case Backend.REFERENCE:
            return None
        case Backend.ONEDNN:
            if not torch.backends.mkldnn.is_available():
                return "this build of torch has no oneDNN"
            return None
        case Backend.CPU:
            return importlib.import_module("resnet_fused.ops.cpu_convolution").unavailable()  # type: ignore[no-any-return]
        case Backend.CUDNN:
            if not torch.cuda.is_available():
                return "no CUDA device"
            if not torch.backends.cudnn.is_available():
                return "this build of torch has no cuDNN"
            return None
        case Backend.TRITON:
            if importlib.util.find_spec("triton") is None:
                return "the triton package is not installed (pip install triton)"
            if not torch.cuda.is_available() and not interpreting():
                return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
            return None
        case Backend.CUDA:
            if not torch.cuda.is_available():
                return "no CUDA device"
            if torch.version.hip is not None:
                return "its kernels are written for NVIDIA devices"
            return extension.missing(cuda=True)


def available() -> dict[str, str | None]:
    """Every backend, with None where it can run here, else the reason why it cannot."""
    return {name: unavailable(name) for name in all_names()}


def implementation(op: str, backend: str) -> Any:
    """The module that computes ``op`` on ``backend``, or None when that pair does not exist."""
    return REGISTERED.get((op, backend)) or _module(op, backend)


@functools.cache
def _module(op: str, backend: str) -> Any:
    name = f"resnet_fused.ops.{op}.{backend}"
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def refusal(op: str, backend: str, call: Any) -> str | None:
    """Why ``backend`` cannot serve this call of ``op``, or None when it can."""
    missing = unavailable(backend)
    if missing is not None:
        return missing
    module = implementation(op, backend)
    if module is None:
        return f"{backend} has no {op}"
    return module.supports(call)  # type: ignore[no-any-return]


def choose(op: str, call: Any, requested: str, candidates: Sequence[str]) -> Server:
    """Choose the backend that computes this call.

    ``requested`` names a backend, which then serves or raises BackendError, or is ``"auto"``: what the tuning table
    says, else the first of ``candidates`` that supports the call.
    """
    if requested != AUTO:
        reason = refusal(op, check_name(requested), call)
        if reason is not None:
            able = [name for name in all_names() if refusal(op, name, call) is None]
            raise BackendError(
                f"backend={requested!r} cannot run this {op}: {reason}. Use backend='auto' or one of {able}."
            )
        return cast(Server, implementation(op, requested))
    found = lookup.find(op, call)
    served = None if found is None else tuned(op, call, found)
    if served is not None:
        return served
    for name in candidates:
        if refusal(op, name, call) is None:
            _log_choice(op, name, call)
            return cast(Server, implementation(op, name))
    raise BackendError(f"no backend can run this {op}; candidates were {list(candidates)}")


def bind(server: Any, call: Any) -> Callable[[Any], Any]:
    """The function that computes calls like this one."""
    return server.bind(call) if hasattr(server, "bind") else server.run  # type: ignore[no-any-return]


def tuned(op: str, call: Any, found: lookup.Found) -> Server | None:
    """The backend that the tuning table names for this call; None where it is missing, refuses the call, or no
    longer has the config."""
    name, config = found.entry.backend, found.entry.config
    if name not in all_names() or refusal(op, name, call) is not None:
        return None
    if config is not None and name != Backend.REFERENCE and not lookup.aligned(call):
        server: Server | None = implementation(op, name)  # which chooses a config itself
    else:
        if not found.resolved:
            found.server, found.resolved = _configured(op, name, config, call), True
        server = found.server
    if server is not None and _logging():
        _log_choice(op, f"{name}{'' if config is None else f' {config}'} (tuned)", call)
    return server


def _configured(op: str, name: str, config: Any, call: Any) -> Server | None:
    module = implementation(op, name)
    if config is None:
        return cast(Server, module)
    if name == Backend.REFERENCE:
        layouts = importlib.import_module("resnet_fused.tuning.layouts")
        return lookup.Configured(layouts.run, config) if config in (*lookup.LAYOUTS,) else None  # any JSON
    for own in module.configs(call) if hasattr(module, "configs") else ():
        if lookup.plain(own) == config:
            return lookup.Configured(module.run, own)
    return None


@functools.cache
def _logging() -> bool:
    wanted = os.environ.get("RESNET_FUSED_LOG", "0") == "1"
    if wanted and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("resnet_fused: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return wanted


@functools.cache
def _log_once(line: str) -> None:
    logger.info(line)


def _log_choice(op: str, name: str, call: Any) -> None:
    if _logging():
        _log_once(f"{op} {call.describe()} -> {name}")
