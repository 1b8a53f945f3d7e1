"""Reading a module's own convolutions, norms and activations at run time: what may be computed as one op right now.

A part may be bypassed only when nobody would notice: it has its exact type, no hooks, and its own forward. Everything
else, whenever it came about, runs through the module calls as written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from resnet_fused import backends
from resnet_fused.modules.known import FROZEN_NORMS, NORMED_CONVS, name_of
from resnet_fused.ops.batch_norm_act import api as batch_norm_act
from resnet_fused.ops.batch_norm_act import sync
from resnet_fused.ops.batch_norm_act.call import BatchNormCall
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.residual_block import RECOMPUTE, ConvNorm

# With the batch's statistics in training mode; SyncBatchNorm's are those of all processes.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


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
    if type(norm) in BATCH_NORMS:
        return True
    # Under autocast a FrozenBatchNorm2d widens to its own dtype, which the ops do not.
    return is_frozen_norm(type(norm)) and not torch.is_autocast_enabled(conv.weight.device.type)


def plain_relu(act: nn.Module) -> bool:
    """Whether ``act`` is a plain nn.ReLU that nobody watches."""
    return type(act) is nn.ReLU and not touched(act)


def read(conv: nn.Conv2d, norm: nn.Module) -> ConvBN | None:
    """A bypassable pair as data, or None when its norm is to use the batch's statistics."""
    if type(norm) in BATCH_NORMS and norm.training:
        return None
    return with_statistics(conv, norm)


def with_statistics(conv: nn.Conv2d, norm: nn.Module) -> ConvBN | None:
    """A bypassable pair as data with the norm's running statistics, or None when it has none."""
    weights: dict[str, Any] = conv._parameters
    buffers: dict[str, Any] = norm._buffers
    vectors: dict[str, Any] = norm._parameters if type(norm) in BATCH_NORMS else buffers
    padding = _padding(conv)
    mean, var = buffers["running_mean"], buffers["running_var"]
    if mean is None or var is None:
        return None
    geometry: Any = (_eps(norm), conv.stride, padding, conv.dilation, conv.groups)
    if "weight" in weights and "weight" in vectors:
        return ConvBN(weights["weight"], weights["bias"], vectors["weight"], vectors["bias"], mean, var, *geometry)
    replica: Any = norm  # DataParallel's replicas hold plain attributes
    return ConvBN(conv.weight, conv.bias, replica.weight, replica.bias, mean, var, *geometry)


def step(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: str, residual: Tensor | None, backend: str) -> Tensor:
    """A bypassable pair with its residual and ReLU: one op if it may, else a :func:`batch_statistics_step`."""
    pair = read(conv, norm)
    if pair is None:
        return batch_statistics_step(x, conv, norm, act, residual, backend)
    return conv_bn_act.call_op(x, pair, residual, act, backend)


def batch_statistics_step(
    x: Tensor, conv: nn.Module, norm: nn.Module, act: str, residual: Tensor | None, backend: str
) -> Tensor:
    """A bypassable pair with the batch's statistics: the convolution, then batch norm, residual and ReLU as one op."""
    y: Tensor = nn.Conv2d.forward(conv, x)  # type: ignore[arg-type]
    same = residual is None or residual.shape == y.shape
    backend = training_backend(backend)
    eager = backend == backends.AUTO and y.device.type == "cpu"  # nothing is quicker there
    if eager or asks_others(norm) or y.dim() != 4 or not same:  # unbatched: nn.BatchNorm2d says it
        y = _synchronised(y, norm) if asks_others(norm) else norm(y)
        if residual is not None:
            y = y.add_(residual) if same else y + residual
        return torch.relu_(y) if act == "relu" else y
    if residual is not None:
        residual = residual.to(y.dtype)  # as eager's sum in place
    return batch_norm_act.call_op(norm_call(y, norm, act, residual), backend)


# Where weights are trained, aten copies those that are not channels_last, both forward and backward. From that many
# elements of weight to one of the image this takes longer than what the format saves (bench/NOTES.md).
_COPIED = 4
_SMALL = 20480  # one image up to this size needs no copies: ops/conv_bn_act/unpacked.py


def feature_map(x: Tensor, convs: Iterable[ConvBN], channels_last: bool) -> Tensor:
    """``x``, ``[N, C, H, W]``, in the memory format in which pairs with given statistics compute: channels_last where
    that is wanted and pays. Parameters keep theirs."""
    if not channels_last or x.dim() != 4:
        return x
    if torch.is_grad_enabled() and x.device.type == "cpu" and (x.shape[0] > 1 or x.numel() > _SMALL):
        trained = [c.weight for c in convs if c.weight.requires_grad]
        copied = sum(w.numel() for w in trained if not w.is_contiguous(memory_format=torch.channels_last))
        if copied > _COPIED * x.numel():
            return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


def _eps(norm: Any) -> float:
    fixed = FROZEN_NORMS.get(name_of(type(norm)))
    return norm.eps if fixed is None else fixed


def asks_others(norm: nn.Module) -> bool:
    """Whether ``norm`` takes the statistics of several processes."""
    return type(norm) is nn.SyncBatchNorm and norm.training and sync.processes(norm.process_group) > 1


def _synchronised(x: Tensor, norm: Any) -> Tensor:
    """nn.SyncBatchNorm itself, or what it would do on a CPU, which it refuses."""
    if x.device.type != "cpu" or x.dim() != 4:
        return norm(x)  # type: ignore[no-any-return]
    call = norm_call(x, norm, "none", None)
    if call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    factor = 1.0 / float(call.num_batches_tracked) if call.momentum is None else call.momentum  # type: ignore[arg-type]
    return sync.sync_batch_norm(
        x, call.weight, call.bias, call.running_mean, call.running_var, call.eps, factor, norm.process_group
    )  # fmt: skip


def norm_call(x: Tensor, norm: Any, act: str, residual: Tensor | None) -> BatchNormCall:
    """What a batch norm would do to x at this moment, by nn.BatchNorm2d's own rules."""
    mean, var = norm.running_mean, norm.running_var
    training: bool = (norm.training and type(norm) in BATCH_NORMS) or mean is None
    momentum, count = (norm.momentum, norm.num_batches_tracked) if training else (0.0, None)
    if training and not (norm.training and norm.track_running_stats):
        mean = var = count = None
    if momentum is None and count is None:
        momentum = 0.0
    return BatchNormCall(x, norm.weight, norm.bias, mean, var, count, residual, training, momentum, _eps(norm), act)


def conv_norm(conv: nn.Conv2d, norm: nn.Module) -> ConvNorm | None:
    """A bypassable pair as data, in whichever mode its norm is; None where the norm asks other processes."""
    if asks_others(norm):
        return None
    call = norm_call(conv.weight, norm, "none", None)
    stride: Any = conv.stride
    dilation: Any = conv.dilation
    return ConvNorm(
        conv.weight, conv.bias, call.weight, call.bias, call.running_mean, call.running_var, call.num_batches_tracked,
        call.training, call.momentum, call.eps, stride, _padding(conv), dilation, conv.groups,
    )  # fmt: skip


def check_recompute(recompute: str | None) -> str | None:
    """Return ``recompute``; ValueError when it is not a choice."""
    if recompute is not None and recompute not in RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, need None, {' or '.join(map(repr, RECOMPUTE))}")
    return recompute


def training_backend(backend: str) -> str:
    """``backend`` where it has a batch_norm_act, else "auto": some compute inference alone."""
    return backend if backend in batch_norm_act.BACKENDS else "auto"


def symmetric(conv: nn.Conv2d) -> bool:
    """Whether padding="same" is as much on each side."""
    return _same(conv) is not None


def _padding(conv: nn.Conv2d) -> Any:
    """The padding as a pair."""
    if isinstance(conv.padding, str):
        return (_same(conv) or (0, 0)) if conv.padding == "same" else (0, 0)
    return conv.padding


def _same(conv: nn.Conv2d) -> tuple[int, int] | None:
    """padding="same" as a symmetric pair; None where it needs one more row or column at the end."""
    total = [d * (size - 1) for d, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
