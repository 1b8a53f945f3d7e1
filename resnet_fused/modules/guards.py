"""When a module's call may be bypassed: one rule for ``fuse``, reports and every call.

A part is computed by fused ops while it is what PyTorch made it: its exact class, no hooks, no function replaced on the
instance or for the class, no attribute that hides a parameter or submodule; and while no mode and no
tracer is active. Otherwise its own module call runs. Functions named for a reason return it, or None.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _nn_module

from resnet_fused.modules.known import FROZEN_NORMS, NORMED_CONVS, PURE, name_of
from resnet_fused.modules.spec import Path

# With the batch's statistics in training mode; SyncBatchNorm's are those of all processes.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

_CLASSES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (nn.Module, ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")),
    (nn.Conv2d, ("forward", "_conv_forward", "__call__", "__getattr__", "__getattribute__")),
    (nn.BatchNorm2d, ("forward", "_check_input_dim", "__call__", "__getattr__", "__getattribute__")),
    (nn.SyncBatchNorm, ("forward", "_check_input_dim", "__call__")),
    (nn.ReLU, ("forward", "__call__")),
    (nn.Sequential, ("forward", "__call__", "__iter__", "__len__")),
    (nn.Identity, ("forward", "__call__")),
)
_FUNCTIONS = ("conv2d", "batch_norm", "relu", "relu_", "max_pool2d")
# What a forward reaches on its way to the kernels: PyTorch's own functions, and where people put others.
_PLACES: tuple[tuple[Any, str], ...] = (
    *((cls, name) for cls, names in _CLASSES for name in names),
    *((owner, name) for owner in (F, torch) for name in _FUNCTIONS),
    (F, "adaptive_avg_pool2d"),
    (torch._C._nn, "adaptive_avg_pool2d"),
    (torch, "flatten"),
)


def _scope(function: Any) -> str:
    """The module that a function was compiled in: its globals tell, which functools.wraps cannot copy."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def _of_torch(function: Any) -> bool:
    built_in = type(function).__name__ in ("builtin_function_or_method", "wrapper_descriptor")
    return built_in or _scope(function).split(".")[0] == "torch"


# As they were when this package was imported; None for one that was replaced before.
_OWN: list[Any] = [f if _of_torch(f := getattr(owner, name)) else None for owner, name in _PLACES]


def _comparisons() -> Any:
    """``getattr(owner, name) is function`` for all of them, as one expression: every call of a block asks."""
    owners = {id(owner): (f"owner{i}", owner) for i, (owner, _) in enumerate(_PLACES)}
    terms = [f"{owners[id(owner)][0]}.{name} is own[{i}]" for i, (owner, name) in enumerate(_PLACES)]
    scope: dict[str, Any] = {**dict(owners.values()), "own": _OWN}
    exec(f"def unchanged():\n    return {' and '.join(terms)}", scope)
    return scope["unchanged"]


_unchanged = _comparisons()


def replaced() -> str | None:
    """Which of PyTorch's functions was replaced."""
    if _unchanged():
        return None
    for i, (owner, name) in enumerate(_PLACES):
        now = getattr(owner, name, None)
        if _OWN[i] is None and _of_torch(now):
            _OWN[i] = now  # what stood there at import time was taken back
        elif now is not _OWN[i] and _scope(now) != "torch.fx._symbolic_trace":  # that one tells by its proxies
            return f"{owner.__name__}.{name} was replaced"
    return None


replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def own_method(cls: type, name: str) -> bool:
    """Whether ``cls`` has the method ``name`` as the source of the class that defines it has it."""
    base = next((base for base in cls.__mro__ if name in vars(base)), None)
    method: Any = None if base is None else vars(base)[name]
    if base is None or getattr(method, "__qualname__", None) != f"{base.__qualname__}.{name}":
        return False
    if method.__code__.co_name != name:
        return False
    home = sys.modules.get(base.__module__)
    if home is not None:
        return method.__globals__ is vars(home)
    init = vars(base).get("__init__", method)  # a class whose module is not there by that name
    return method.__module__ == base.__module__ and method.__globals__ is getattr(init, "__globals__", None)


_SEEN: dict[type, Any] = {}


def own_forward(cls: type[nn.Module]) -> bool:
    """:func:`own_method` of "forward", remembered for the function that it was asked of."""
    forward = cls.forward
    if _SEEN.get(cls) is not forward:
        if not own_method(cls, "forward"):
            return False
        _SEEN[cls] = forward
    return cls.__call__ is nn.Module.__call__


# Entries of an instance that make a call of it another one.
_CALLED = (
    "forward", "_conv_forward", "_check_input_dim", "_call_impl", "_wrapped_call_impl", "_slow_forward",
    "_compiled_call_impl",
)  # fmt: skip


def touched(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward: hooks, or something replaced on the instance."""
    entries = module.__dict__
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):  # fmt: skip
        return True
    for names in (_CALLED, entries["_parameters"], entries["_buffers"]):
        for name in names:  # loops, since torch.compile knows no isdisjoint
            if name in entries:
                return True
    return False


def touched_reason(module: nn.Module, name: str) -> str:
    """The refusal of a module that is :func:`touched`."""
    entries = module.__dict__
    for entry in entries:
        if entry == "forward":
            return f"the forward of {name} was replaced on the instance"
        if entry in _CALLED:
            return f"{name}.{entry} was replaced on the instance"
        if entry in entries["_parameters"] or entry in entries["_buffers"]:
            return f"{name}.{entry} is hidden by an attribute of that name"
    return f"{name} has hooks (weight_norm, spectral_norm and pruning are hooks too)"


_WATCHERS = (
    _nn_module._global_forward_hooks,
    _nn_module._global_forward_pre_hooks,
    _nn_module._global_backward_hooks,
    _nn_module._global_backward_pre_hooks,
)
# PyTorch's own modes, by the packages that their classes are from: PyTorch traces with them; they are no observers.
_MACHINERY = (
    "torch._subclasses", "torch.fx.experimental", "torch._functorch", "torch._export", "torch.export", "torch._dynamo",
    "torch._inductor", "torch._higher_order_ops", "torch._library", "torch.utils._device", "resnet_fused",
)  # fmt: skip


_tracing, _transform = torch._C._get_tracing_state, torch._C._functorch.maybe_current_level
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def _is_machinery(cls: type) -> bool:
    return cls.__module__.startswith(_MACHINERY)


def watched() -> str | None:
    """What would notice a bypassed call of any module: hooks for all modules (profilers and FLOP counters
    have them), modes, function transforms, a tracer that writes down what eager does; or a function of PyTorch's that
    was replaced for its class."""
    reason = replaced()
    if reason is not None:
        return reason
    for hooks in _WATCHERS:
        if hooks:
            return "hooks are registered for all modules"
    if torch.compiler.is_compiling():
        exporting = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
        return "it is written as ONNX, which has no op of ours" if exporting else None
    if _tracing() is not None:
        return "torch.jit.trace is recording it"  # in aten's ops, so that the file needs nothing of ours
    if _dispatch_modes():
        for i in range(_dispatch_modes()):
            mode = type(torch._C._get_dispatch_stack_at(i))
            if not _is_machinery(mode):
                return f"the mode {mode.__name__} is active"
    if _function_modes():
        for i in range(_function_modes()):
            mode = type(torch._C._get_function_stack_at(i))
            if not _is_machinery(mode):
                return f"the mode {mode.__name__} is active"
    if forward_ad._current_level >= 0 or _transform() is not None:
        return "a function transform is active"
    return None


def plain_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor that computes as PyTorch's own: no proxy, no subclass that may do more."""
    cls = type(value)
    if cls is Tensor or cls is nn.Parameter:
        return value.layout is torch.strided
    return (isinstance(value, Tensor) and _is_machinery(cls)) or torch.compiler.is_compiling()


def is_frozen_norm(cls: type) -> bool:
    """Whether ``cls`` is a known FrozenBatchNorm2d."""
    return name_of(cls) in FROZEN_NORMS


def is_plain_conv(conv: nn.Module | None) -> bool:
    """Whether ``conv`` computes nn.Conv2d's convolution, and behind it at most a norm of its own."""
    if type(conv) is nn.Conv2d:
        return True
    known: Any = conv
    return name_of(type(conv)) in NORMED_CONVS and known.activation is None and own_forward(type(known))


def _tensor(module: nn.Module, tensors: dict[str, Any], name: str) -> Any:
    """A parameter or buffer; DataParallel's replicas and functional code have plain attributes instead."""
    found = tensors.get(name)
    return getattr(module, name, None) if found is None else found


def dotted(name: Path | str) -> str:
    return name if isinstance(name, str) else ".".join(name)


def class_name(module: Any) -> str:
    """The class of ``module`` for messages."""
    if module is None:
        return "absent"
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def conv_refusal(conv: Any, keys: Path | str) -> str | None:
    """Why this convolution cannot be part of a fused op."""
    if not isinstance(conv, nn.Conv2d) or not is_plain_conv(conv):
        if hasattr(conv, "parametrizations"):
            return f"{dotted(keys)} is parametrized"
        return f"{dotted(keys)} is {class_name(conv)}, need nn.Conv2d"
    if touched(conv):
        return touched_reason(conv, dotted(keys))
    if conv.padding_mode != "zeros":
        return f"{dotted(keys)} has padding_mode={conv.padding_mode!r}, need 'zeros'"
    weight = _tensor(conv, conv._parameters, "weight")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"{dotted(keys)}.weight is {getattr(weight, 'dtype', weight)}, need a floating-point dtype"
    if not plain_tensor(weight):
        return f"{dotted(keys)}.weight is a tensor of class {type(weight).__name__}"
    if weight.dim() != 4 or not weight.numel():
        return f"{dotted(keys)}.weight has shape {tuple(weight.shape)}, need 4 dimensions and no zero among them"
    if padding_of(conv) is None:
        if conv.padding == "same":
            return f"{dotted(keys)} has padding='same' with an even filter, which pads one side more"
        return f"{dotted(keys)} has padding={conv.padding!r}, need integers, 'same' or 'valid'"
    if pair(conv.stride) is None or pair(conv.dilation) is None or integer(conv.groups) is None:
        return f"{dotted(keys)} has a stride, dilation or groups that are no integers"
    return None


def norm_refusal(norm: Any, keys: Path | str) -> str | None:
    """Why this norm cannot be part of a fused op."""
    if type(norm) not in BATCH_NORMS and not (is_frozen_norm(type(norm)) and own_forward(type(norm))):
        if hasattr(norm, "parametrizations"):
            return f"{dotted(keys)} is parametrized"
        return f"{dotted(keys)} is {class_name(norm)}, need nn.BatchNorm2d, nn.SyncBatchNorm or FrozenBatchNorm2d"
    if touched(norm):
        return touched_reason(norm, dotted(keys))
    if _tensor(norm, norm._buffers, "running_mean") is None or _tensor(norm, norm._buffers, "running_var") is None:
        return f"{dotted(keys)} has no running statistics (track_running_stats=False)"
    return None


def pair_refusal(conv: Any, norm: Any, conv_keys: Path | str, norm_keys: Path | str) -> str | None:
    """Why a convolution and the norm behind it cannot be one op."""
    reason = conv_refusal(conv, conv_keys) or norm_refusal(norm, norm_keys)
    if reason is not None:
        return reason
    if type(conv) is not nn.Conv2d and conv._modules.get("norm", norm) not in (None, norm):
        return f"{dotted(conv_keys)} calls a norm of its own before {dotted(norm_keys)}"
    weight, mean = _tensor(conv, conv._parameters, "weight"), _tensor(norm, norm._buffers, "running_mean")
    if weight.dtype is not mean.dtype and weight.device.type == "cpu":
        # The CPU's kernels take weights that the norm was folded into, which rounds where eager does not.
        return f"{dotted(norm_keys)} is {mean.dtype} behind a convolution in {weight.dtype}"
    if type(norm) not in BATCH_NORMS and torch.is_autocast_enabled(weight.device.type):
        return f"{dotted(norm_keys)} widens to its own dtype under autocast, which the ops do not"
    return None


def relu_refusal(act: Any, keys: Path | str) -> str | None:
    """Why this activation cannot be part of a fused op."""
    if type(act) is not nn.ReLU:
        return f"{dotted(keys)} is {class_name(act)}, need nn.ReLU"
    return touched_reason(act, dotted(keys)) if touched(act) else None


def idle(module: Any) -> bool:
    """Whether ``module`` is an identity."""
    return module is None or (type(module) is nn.Identity and not touched(module))


def pure(module: Any) -> bool:
    """Whether calling ``module`` does nothing but give a new tensor, or its input: so the order of calls does not
    matter, and a call can be repeated."""
    if not isinstance(module, nn.Module) or touched(module) or not own_forward(type(module)):
        return False
    cls: type[nn.Module] = type(module)
    if cls is nn.Sequential:
        return all(pure(child) for child in module._modules.values())
    if cls in BATCH_NORMS:
        return not module.training
    if cls in _PURE or name_of(cls) in PURE or name_of(cls) in FROZEN_NORMS:
        return not getattr(module, "inplace", False)
    return False


_PURE = frozenset({
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Conv2d, nn.GELU, nn.GroupNorm, nn.Hardswish,
    nn.Identity, nn.LeakyReLU, nn.MaxPool2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Upsample,
    nn.ZeroPad2d,
})  # fmt: skip


def integer(value: Any) -> int | None:
    """``value`` as an int, by the rule of conv2d's arguments; None for what is none."""
    if type(value) is int:
        return value
    try:
        return operator.index(value)
    except TypeError:
        return None


def pair(value: Any) -> tuple[int, int] | None:
    """``value`` as (height, width), by the rule of conv2d's arguments: one integer or two, in a tuple, a list or alone.

    None for what conv2d refuses.
    """
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    items = [integer(v) for v in (value if isinstance(value, (tuple, list)) else (value,))]
    if len(items) not in (1, 2) or None in items:
        return None
    return (items[0], items[-1])  # type: ignore[return-value]


def padding_of(conv: Any) -> tuple[int, int] | None:
    """The padding of a convolution as a pair; None where it needs one more row or column at the end."""
    padding = conv.padding
    if not isinstance(padding, str):
        return pair(padding)
    if padding != "same":
        return (0, 0) if padding == "valid" else None
    dilation = pair(conv.dilation)
    if dilation is None:
        return None
    total = [d * (size - 1) for d, size in zip(dilation, conv.weight.shape[2:], strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
