"""The strides of a result: those that PyTorch gives the same eager expression."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused.ops.convbn import ConvBN

Eager = Callable[[Tensor, tuple[ConvBN | None, ...], Tensor | None], Tensor]


def like_eager(out: Tensor, eager: Eager, x: Tensor, convs: tuple[ConvBN | None, ...], addend: Tensor | None) -> Tensor:
    """Return ``out`` with the strides that ``eager(x, convs, addend)`` would give, copied only when they differ."""
    return with_strides(out, eager_strides(eager, x, convs, addend))


def eager_strides(eager: Eager, x: Tensor, convs: tuple[ConvBN | None, ...], addend: Tensor | None) -> tuple[int, ...]:
    """The strides of ``eager(x, convs, addend)``.

    ``eager`` is run on fake tensors, once for each distinct set of shapes and strides: no rule is written down here.
    """
    described = tuple(None if c is None else (_describe(c.weight), *c[7:]) for c in convs)
    return _strides(eager, _describe(x), described, None if addend is None else _describe(addend))


def with_strides(out: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``out``, copied only when its strides are others."""
    if out.stride() == strides:
        return out
    return torch.empty_strided(out.shape, strides, dtype=out.dtype, device=out.device).copy_(out)


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


@functools.lru_cache(maxsize=512)
def _strides(eager: Eager, x: Any, convs: Any, addend: Any) -> tuple[int, ...]:
    mode = FakeTensorMode()
    mode.cache_enabled = False  # its cache keeps every shape for ever
    with torch.no_grad(), mode:

        def fake(described: Any) -> Tensor:
            shape, stride, dtype, device = described
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)

        def conv(described: Any) -> ConvBN:
            weight = fake(described[0])
            vector = weight.new_empty(weight.shape[0])  # the vectors' strides decide nothing
            return ConvBN(weight, None, vector, vector, vector, vector, 1e-5, *described[1:])

        result = eager(
            fake(x), tuple(None if c is None else conv(c) for c in convs), None if addend is None else fake(addend)
        )
        return result.stride()
