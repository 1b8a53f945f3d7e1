"""The operator library: how an op of ours is registered with PyTorch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from resnet_fused.ops import packed
from resnet_fused.ops.tensor_cache import CACHE

LIBRARY = torch.library.Library("resnet_fused", "DEF")

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_FAKES: dict[str, Callable[..., Any]] = {}
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(name: str, schema: str) -> Any:
    """Declare ``resnet_fused::name`` and return its overload.

    Where the compiled library was loaded before this package the op is there, with the library's kernels; the rules for
    fake tensors, autograd and autocast are then added to it.

    Raises:
        RuntimeError: the op that is there has another schema.
    """
    existing = getattr(torch.ops.resnet_fused, name, None)
    if existing is None:
        LIBRARY.define(f"{name}{schema}", tags=_TAGS)
    elif existing.default._schema != torch._C.parse_schema(f"resnet_fused::{name}{schema}"):
        raise RuntimeError(
            f"the compiled library in this process has another resnet_fused::{name}: it was built from another "
            f"version of this package; build it anew"
        )
    return getattr(torch.ops.resnet_fused, name).default


def implement(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the kernel for every device, and the kernel for fake tensors."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=LIBRARY)
    _FAKES[name] = fake


def _keys(*names: str) -> int:
    keys = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return functools.reduce(operator.or_, (key.raw_repr() for key in keys))


# What a tensor says to the dispatcher where nothing but its kernel is to be called; autograd's part in that is over
# once no gradient is recorded.
_PLAIN_KEYS = _keys("CPU", "CUDA", "BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA")
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


def goes_straight(x: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher, asked to call an op of ours for CPU tensors, would call its kernel and do nothing else.

    Then the kernel may be called in its place, which saves the way there and back (bench/NOTES.md).
    """
    return unobserved(x) and x.device.type == "cpu" and _PLAIN_TYPES.issuperset(map(type, tensors))


def unobserved(x: Tensor) -> bool:
    """Whether nothing stands between a call with ``x`` and the kernels: no recorded gradients, autocast, modes and
    subclasses, function transforms, tracing, compilation, nor the profiler, which shows ops by their names."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return False
    if torch.autograd._profiler_enabled() or torch._C._len_torch_function_stack():  # type: ignore[attr-defined]
        return False
    keys = torch._C._dispatch_keys(x) | torch._C._dispatch_tls_local_include_set()
    keys = keys - torch._C._dispatch_tls_local_exclude_set()
    return not keys.raw_repr() & ~_PLAIN_KEYS


def transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work: aten's own operations have rules for all of them."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def records(args: Iterable[Any]) -> bool:
    """Whether a gradient is recorded through a call with these arguments. Those on a GPU that get one are likely to be
    written soon, in ways that PyTorch does not count: what was derived from them is dropped."""
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad] if torch.is_grad_enabled() else []
    packed.drop(a for a in wanted if a.device.type != "cpu")
    return bool(wanted)


def eager_form(op: Any) -> Callable[..., Any]:
    """The function of aten operations that ``op``, an overload of ours, stands for; for meta and fake tensors."""
    return _FAKES[op._schema.name.removeprefix("resnet_fused::")]


def implement_autocast(name: str, rule: Callable[..., Any]) -> None:
    """Register ``rule(cast, device_type, *args)``; ``cast`` brings one tensor to the autocast dtype.

    The rule runs with autocast off, so it may call ops freely.
    """
    for device_type, key in _AUTOCAST_KEYS.items():
        LIBRARY.impl(name, _autocast_kernel(rule, device_type, key), key)


def _autocast_kernel(rule: Callable[..., Any], device_type: str, key: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor: Tensor | None) -> Tensor | None:
            # What aten casts under autocast: floating tensors of this device, float64 excepted.
            if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
                return tensor
            return tensor.to(dtype) if tensor.device.type == device_type else tensor

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return rule(cast, *args)

    return kernel


_CASTS = CACHE  # with all else that is derived from weights
_CAST = packed.new_kind()


def cast_parameter(cast: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """``cast(weight)``, remembered where no gradient is recorded, so that what is packed from it is found again."""
    dtype = torch.get_autocast_dtype(weight.device.type)
    recording = weight.requires_grad and torch.is_grad_enabled()
    if recording or weight.dtype == dtype or transformed() or type(weight) not in (Tensor, torch.nn.Parameter):
        return cast(weight)
    kept = _CASTS.find(_CAST, (weight,), dtype)
    if kept is None and packed.settled((weight,)):
        kept = _CASTS.get(_CAST, (weight,), dtype, lambda: packed.outside_of_modes(cast, weight))
    return cast(weight) if kept is None else kept
