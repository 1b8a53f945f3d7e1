"""3x3 convolutions of stride 1 in float32 on the CPU by Winograd's F(2x2, 3x3), by the compiled library's kernel.

16 multiplications stand for the 36 of the direct sum, with bias, residual and ReLU in the same pass
(csrc/conv_bn_act/winograd_kernel.h). The sums are shorter than direct ones, so the rounding error is of the same size.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops import packed
from resnet_fused.ops.convbn import ConvBN

_CACHE = packed.new_cache()
_MEBIBYTE = 1 << 20


def refused(x: Tensor, conv: ConvBN, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the kernel does not compute ``conv`` of an input like x, of x's shape unless ``shape`` is given; or None."""
    if x.device.type != "cpu":
        return f"its kernels run on the CPU, x is on {x.device}"
    if x.dtype != torch.float32:
        return f"its kernels compute float32, not {x.dtype}"
    return unavailable() or _refused(tuple(x.shape) if shape is None else shape, conv.weight.shape, *conv[7:])


@functools.cache
def unavailable() -> str | None:
    """Why the kernel cannot run in this process, or None."""
    reason = extension.missing()
    if reason is None and not instructions():
        reason = "its kernels need AVX2, which this CPU lacks"
    return reason


def instructions() -> str:
    """The vector instructions that the kernel uses here: "avx512", "avx2", or "" where it cannot run."""
    extension.module()
    return torch.ops.resnet_fused_cpu.instructions()  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4096)
def _refused(
    x: tuple[int, ...],
    weight: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> str | None:
    if tuple(weight[2:]) != (3, 3) or stride != (1, 1) or dilation != (1, 1) or groups != 1:
        return "its kernels compute 3x3 convolutions of stride and dilation 1 in one group"
    if weight[0] % 32 or weight[1] % 16:
        return f"its kernels need channels in multiples of 16 and 32, got {weight[1]} and {weight[0]}"
    height, width = x[2] + 2 * padding[0] - 2, x[3] + 2 * padding[1] - 2
    tiles = x[0] * -(-height // 2) * -(-width // 2)
    # The transformed filters are read once per block of tiles: few tiles pay for that only from a cache near by.
    if tiles < 8 or (tiles < 48 and weight[0] * weight[1] * 64 > _MEBIBYTE):
        return f"{tiles} tiles of 2x2 outputs are too few to pay for reading its larger filters"
    return None


class Convolution:
    """One convolution with its batch norm, bound to its transformed filters; channels_last in and out.

    It is right as long as the tensors of ``conv`` are alive and not written to; it does not keep them.

    Args:
        isa: the instructions to use, "avx512" or "avx2"; "" for the widest.
    """

    def __init__(self, conv: ConvBN, isa: str = "") -> None:
        self._tensors = [None if t is None else weakref.ref(t) for t in conv.tensors()]
        self._geometry, self._channels, self._isa = conv[6:], conv.weight.shape[0], isa
        self._prepared: tuple[Tensor, Tensor] = packed.packed(_CACHE, conv, _prepare)

    def relu(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, *, into_residual: bool = False
    ) -> Tensor:
        """With residual and ReLU, into ``out`` where it is given. ``residual`` is never written to."""
        return self._run(x, residual, True, out)

    def linear(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Without ReLU."""
        return self._run(x, residual, False, out)

    def _run(self, x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None) -> Tensor:
        padding = self._geometry[2]
        if out is None:
            n, _, height, width = x.shape
            size = (n, self._channels, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)
            out = torch.empty(size, memory_format=torch.channels_last)
        if not torch.ops.resnet_fused_cpu.winograd(x, *self._prepared, residual, padding, relu, out, self._isa):
            fields: list[Any] = [None if ref is None else ref() for ref in self._tensors]
            _direct(x, ConvBN._make([*fields, *self._geometry]), residual, relu, out)
        return out


def _direct(x: Tensor, conv: ConvBN, residual: Tensor | None, relu: bool, out: Tensor) -> None:
    """The sum as written: an infinite value, or NaN, would spread over a whole tile by the transforms."""
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
    y = F.batch_norm(y, conv.running_mean, conv.running_var, conv.bn_weight, conv.bn_bias, False, 0.0, conv.eps)
    if residual is not None:
        y += residual
    out.copy_(y.relu_() if relu else y)


def _prepare(conv: ConvBN) -> tuple[Tensor, Tensor]:
    """Batch norm folded into the filters in float64, and the filters transformed: one rounding."""
    scale, bias = packed.affine(conv, torch.float64)
    return torch.ops.resnet_fused_cpu.winograd_filters(conv.weight, scale), bias.float()
