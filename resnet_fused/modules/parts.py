"""Reading a module's own convolutions, norms and activations at run time: what may be computed as one op right now.

A part may be bypassed only when nobody would notice: it has its exact type, no hooks, and its own forward. Everything
else, whenever it came about, runs through the module calls as written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from resnet_fused.modules.known import FROZEN_NORMS, NORMED_CONVS, name_of
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.convbn import ConvBN


def is_frozen_norm(cls: type) -> bool:
    """Whether ``cls`` is a FrozenBatchNorm2d that we know."""
    return name_of(cls) in FROZEN_NORMS


def is_plain_conv(conv: nn.Module | None) -> bool:
    """Whether ``conv`` computes nn.Conv2d's convolution, and behind it at most a norm of its own."""
    if type(conv) is nn.Conv2d:
        return True
    known: Any = conv
    return name_of(type(conv)) in NORMED_CONVS and known.activation is None


def touched(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward: hooks, or a forward replaced on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def watched() -> bool:
    """Whether no call is to be bypassed: with hooks for all modules (profilers and FLOP counters have them), and while
    a model is written as ONNX, which knows no op of ours."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return bool(
        (exporting and torch.onnx.is_in_onnx_export())
        or _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    )


def bypassable(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether the pair is a plain Conv2d and batch norm that nobody watches."""
    if not isinstance(conv, nn.Conv2d) or not is_plain_conv(conv) or touched(conv) or norm is None or touched(norm):
        return False
    if type(conv) is not nn.Conv2d and conv._modules.get("norm", norm) not in (None, norm):
        return False  # it calls a norm of its own before this one
    if conv.padding_mode != "zeros" or (conv.padding == "same" and _same(conv) is None):
        return False
    if type(norm) is nn.BatchNorm2d:
        return True
    # Under autocast a FrozenBatchNorm2d widens to its own dtype, which the ops do not.
    return is_frozen_norm(type(norm)) and not torch.is_autocast_enabled(conv.weight.device.type)


def plain_relu(act: nn.Module) -> bool:
    """Whether ``act`` is a plain nn.ReLU that nobody watches."""
    return type(act) is nn.ReLU and not touched(act)


def read(conv: nn.Conv2d, norm: nn.Module) -> ConvBN | None:
    """A bypassable pair as data, or None when its norm is to use the batch's statistics."""
    if type(norm) is nn.BatchNorm2d and norm.training:
        return None
    return with_statistics(conv, norm)


def with_statistics(conv: nn.Conv2d, norm: nn.Module) -> ConvBN | None:
    """A bypassable pair as data with the norm's running statistics, or None when it has none."""
    weights: dict[str, Any] = conv._parameters
    buffers: dict[str, Any] = norm._buffers
    vectors: dict[str, Any] = norm._parameters if type(norm) is nn.BatchNorm2d else buffers
    padding: Any = conv.padding
    if isinstance(padding, str):
        padding = (_same(conv) or (0, 0)) if padding == "same" else (0, 0)
    mean, var = buffers["running_mean"], buffers["running_var"]
    if mean is None or var is None:
        return None
    fixed = FROZEN_NORMS.get(name_of(type(norm)))
    eps: Any = norm.eps if fixed is None else fixed
    geometry: Any = (eps, conv.stride, padding, conv.dilation, conv.groups)
    if "weight" in weights and "weight" in vectors:
        return ConvBN(weights["weight"], weights["bias"], vectors["weight"], vectors["bias"], mean, var, *geometry)
    replica: Any = norm  # DataParallel's replicas hold plain attributes
    return ConvBN(conv.weight, conv.bias, replica.weight, replica.bias, mean, var, *geometry)


def step(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: str, residual: Tensor | None, backend: str) -> Tensor:
    """A bypassable pair with its residual and ReLU: one op if it may, else a :func:`batch_statistics_step`."""
    pair = read(conv, norm)
    if pair is None:
        return batch_statistics_step(x, conv, norm, act, residual)
    return conv_bn_act.call_op(x, pair, residual, act, backend)


def batch_statistics_step(x: Tensor, conv: nn.Module, norm: nn.Module, act: str, residual: Tensor | None) -> Tensor:
    """A bypassable pair in training mode: convolution, batch norm with the batch's statistics, residual, ReLU."""
    y: Tensor = norm(nn.Conv2d.forward(conv, x))  # type: ignore[arg-type]
    if residual is not None:
        y += residual
    return torch.relu_(y) if act == "relu" else y


def symmetric(conv: nn.Conv2d) -> bool:
    """Whether padding="same" is as much on each side."""
    return _same(conv) is not None


def _same(conv: nn.Conv2d) -> tuple[int, int] | None:
    """padding="same" as a symmetric pair; None where it needs one more row or column at the end."""
    total = [d * (size - 1) for d, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
