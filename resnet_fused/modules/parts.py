"""A module's own convolutions and norms as what the ops take, read at run time.

``guards`` decides what may be computed so at this call. Everything else runs through the module
calls as written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.modules import guards
from resnet_fused.modules.guards import BATCH_NORMS
from resnet_fused.modules.known import FROZEN_NORMS, name_of
from resnet_fused.ops import packed
from resnet_fused.ops.batch_norm_act import api as batch_norm_act
from resnet_fused.ops.batch_norm_act import sync
from resnet_fused.ops.batch_norm_act.call import BatchNormCall
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.residual_block import RECOMPUTE, ConvNorm

touched, watched, is_frozen_norm = guards.touched, guards.watched, guards.is_frozen_norm


def bypassable(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether the pair is a plain Conv2d and batch norm without hooks."""
    return guards.pair_refusal(conv, norm, "", "") is None


def plain_relu(act: nn.Module) -> bool:
    """Whether ``act`` is a plain nn.ReLU without hooks."""
    return guards.relu_refusal(act, "") is None


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
    geometry: Any = (_eps(norm), *_geometry(conv))
    if "weight" in weights and "weight" in vectors and "running_mean" in buffers:
        mean, var = buffers["running_mean"], buffers["running_var"]
        if mean is None or var is None:
            return None
        return ConvBN(weights["weight"], weights["bias"], vectors["weight"], vectors["bias"], mean, var, *geometry)
    replica: Any = norm  # DataParallel's replicas hold plain attributes
    mean, var = replica.running_mean, replica.running_var
    if mean is None or var is None:
        return None
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


_SMALL = 20480


def feature_map(x: Tensor, convs: Iterable[ConvBN], channels_last: bool) -> Tensor:
    """``x``, ``[N, C, H, W]``, in the memory format in which pairs with given statistics compute: channels_last where
    that is wanted, but while weights are trained on a CPU.

    There aten would copy each weight that is not channels_last, forward and backward, which takes what the format
    saves, but of one small image (ops/conv_bn_act/unpacked.py).
    """
    if not channels_last or x.dim() != 4:
        return x
    recorded = torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if recorded and (x.shape[0] > 1 or x.numel() > _SMALL):
        trained = [t for conv in convs if conv.weight.requires_grad for t in (conv.weight, conv.running_var)]
        if trained and not packed.settled(trained):  # a key of its own, so that the ops ask anew
            return x
    return x.contiguous(memory_format=torch.channels_last)


def _eps(norm: Any) -> float:
    fixed = FROZEN_NORMS.get(name_of(type(norm)))
    return float(norm.eps) if fixed is None else fixed


def _geometry(conv: nn.Conv2d) -> Any:
    """Stride, padding and dilation as pairs, and groups, however they were set: integers, lists, NumPy's integers."""
    return guards.pair(conv.stride), guards.padding_of(conv), guards.pair(conv.dilation), guards.integer(conv.groups)


def output_shape(shape: tuple[int, ...], conv: nn.Conv2d) -> tuple[int, ...] | None:
    """The shape of a bypassable convolution's output; None where it does not take an input of this shape."""
    stride, padding, dilation, groups = _geometry(conv)
    out, per_group, *size = conv.weight.shape
    if len(shape) != 4 or shape[1] != per_group * groups:
        return None
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape[2:], size, stride, padding, dilation, strict=True)
    ]
    return None if min(spatial) < 1 else (shape[0], out, *spatial)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a convolution's output: autocast narrows it, float64 excepted."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


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
    """The call that a batch norm would make for x, by nn.BatchNorm2d's own rules."""
    mean, var = norm.running_mean, norm.running_var
    training: bool = (norm.training and type(norm) in BATCH_NORMS) or mean is None
    momentum, count = (norm.momentum, norm.num_batches_tracked) if training else (0.0, None)
    if training and not (norm.training and norm.track_running_stats):
        mean = var = count = None
    if momentum is None and count is None:
        momentum = 0.0
    return BatchNormCall(x, norm.weight, norm.bias, mean, var, count, residual, training, momentum, _eps(norm), act)


def conv_norm(conv: nn.Conv2d, norm: nn.Module) -> ConvNorm | None:
    """A bypassable pair as data, in whichever mode its norm is; None where the norm uses other processes."""
    if asks_others(norm):
        return None
    call = norm_call(conv.weight, norm, "none", None)
    return ConvNorm(
        conv.weight, conv.bias, call.weight, call.bias, call.running_mean, call.running_var, call.num_batches_tracked,
        call.training, call.momentum, call.eps, *_geometry(conv),
    )  # fmt: skip


def check_recompute(recompute: str | None) -> str | None:
    """Return ``recompute``; ValueError when it is not a choice."""
    if recompute is not None and recompute not in RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, need None, {' or '.join(map(repr, RECOMPUTE))}")
    return recompute


def training_backend(backend: str) -> str:
    """``backend`` where it has a batch_norm_act, else "auto": some compute inference alone."""
    return backend if backend in batch_norm_act.BACKENDS else "auto"
