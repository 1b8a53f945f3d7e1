"""Weights in the form that a backend wants (folded, reordered), kept by the rules of TensorCache.

oneDNN and cuDNN need them, since they cannot read batch norm in their epilogue, and so do the kernels for the CPU,
whose filters lie in an order of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.tensor_cache import TensorCache

CACHES: list[TensorCache[Any]] = []


def new_cache() -> TensorCache[Any]:
    """A cache that :func:`drop` and :func:`clear` reach."""
    cache: TensorCache[Any] = TensorCache()
    CACHES.append(cache)
    return cache


def drop(tensors: tuple[Tensor | None, ...]) -> None:
    """Forget what was packed from any of ``tensors``: needed after a write through ``.data``, which leaves no trace."""
    for cache in CACHES:
        cache.drop(tensors)


def clear() -> None:
    """Forget all packed weights."""
    for cache in CACHES:
        cache.clear()


def lasting(conv: ConvBN) -> bool:
    """Whether what is packed from ``conv`` can be kept. Tensors made in inference mode do not tell when they are
    written to: their weights would be packed on every call, at a cost that eager does not have."""
    return not conv.weight.is_inference()


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


def packed(cache: TensorCache[Any], conv: ConvBN, build: Callable[[ConvBN], Any]) -> Any:
    """``build(conv)`` from the cache, made outside of autograd and inference mode so that any later mode can use it."""

    def make() -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return build(conv)

    return cache.get(conv.tensors(), conv[6:], make)
