"""Weights in the form that a backend wants (folded, reordered, cast), kept by the rules of TensorCache.

oneDNN and cuDNN need them, since they cannot read batch norm in their epilogue, and so do the kernels for the CPU,
whose filters lie in an order of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.tensor_cache import CACHE, Tensors

_at_once = 0


def new_kind() -> Hashable:
    """A tag that separates the values of one maker from those of another in the cache."""
    return object()


_NHWC = new_kind()


def drop(tensors: Iterable[Tensor | None]) -> None:
    """Forget what was derived from any of ``tensors``."""
    CACHE.drop(tensors)


def clear() -> None:
    """Forget everything that was derived from weights."""
    CACHE.clear()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Pack weights at their first call, instead of waiting until they are seen again."""
    global _at_once
    _at_once += 1
    try:
        yield
    finally:
        _at_once -= 1


def settled(tensors: Tensors, asker: Hashable = None) -> bool:
    """Whether to pack what ``backend="auto"`` computes with: once these weights were seen to stay from one call to the
    next. Packing weights that are new at each call would cost more than it saves.

    Deterministic algorithms pack at once: an answer must not depend on the calls before it.
    """
    return _at_once > 0 or torch.are_deterministic_algorithms_enabled() or CACHE.settled(tensors, asker)


def fold(conv: ConvBN) -> tuple[Tensor, Tensor]:
    """Batch norm folded into the convolution: a weight in its own dtype and a float32 bias, folded in float32.

    Equivalent to (in eval mode)::

        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, bn)
        fused.weight, fused.bias
    """
    scale, bias = affine(conv, torch.float32)
    return (conv.weight.float() * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype), bias


def affine(conv: ConvBN, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What batch norm and the convolution's bias do to the convolution's result: times the first, plus the second."""
    scale = torch.rsqrt(conv.running_var.to(dtype) + conv.eps)
    if conv.bn_weight is not None:
        scale = scale * conv.bn_weight.to(dtype)
    offset = -conv.running_mean.to(dtype)
    if conv.bias is not None:
        offset = offset + conv.bias.to(dtype)
    bias = offset * scale
    if conv.bn_bias is not None:
        bias = bias + conv.bn_bias.to(dtype)
    return scale, bias


def packed(kind: Hashable, conv: ConvBN, build: Callable[[ConvBN], Any]) -> Any:
    """``build(conv)`` from the cache, made so that any later mode can use it."""
    return CACHE.get(kind, conv.tensors(), conv[6:], lambda: outside_of_modes(build, conv))


def nhwc_weight(conv: ConvBN) -> Tensor:
    """The weight as ``[K, R, S, C/groups]`` without gaps: where it lies, or a copy that is kept."""
    weight = conv.weight.permute(0, 2, 3, 1)
    if weight.is_contiguous():
        return weight
    laid_out: Tensor = packed(_NHWC, conv, lambda conv: conv.weight.permute(0, 2, 3, 1).contiguous())
    return laid_out


def outside_of_modes(build: Callable[..., Any], *args: Any) -> Any:
    """``build(*args)`` outside of autograd and of inference mode, whose tensors no call with gradients may use."""
    with torch.inference_mode(False), torch.no_grad():
        return build(*args)
