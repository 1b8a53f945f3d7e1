"""One call of a max pool, as the backends receive it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PoolCall(NamedTuple):
    """``F.max_pool2d(x, kernel, stride, padding, dilation)``; x is a channels_last ``[N, C, H, W]``."""

    x: Tensor
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def eager(self) -> Tensor:
        """By aten."""
        return torch.max_pool2d(*self)

    def output_size(self) -> tuple[int, int]:
        """(P, Q)."""
        return pool_size(self.x.shape[2:], *self[1:])


def pool_size(
    size: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """(P, Q) for images of this (height, width), rounded down."""
    p, q = (
        (n + 2 * pad - dil * (k - 1) - 1) // step + 1
        for n, k, step, pad, dil in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return p, q
