"""conv_bn_act for images of few channels, the stem of a network: the Triton kernel, its weights and its launch.

The S·C terms of a filter row lie next to each other in a row of x, so a step of the reduction reads pieces of rows, not
channels of one tap. A piece is SPAN terms long, a multiple of 8. In front of the row's own terms lie LEAD others: so
it starts at a multiple of UNIT elements for every output pixel, and UNIT of them are read at once. What is not the
filter's is set to zero. The stem of a ResNet (7x7, stride 2, 3 channels) has 21 terms in 24, read two at a time.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.ops import packed
from resnet_fused.ops.conv_bn_act.triton_kernels import _affine, _dot, _relu, _swizzle
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.triton_launch import Launch

if TYPE_CHECKING:
    from resnet_fused.ops.conv_bn_act.triton import Operands
    from resnet_fused.ops.conv_bn_act.triton_config import ConvConfig, Problem

_PIECE = 8
_KINDS = tuple(packed.new_kind() for _ in range(_PIECE))  # of padded weights, by their lead


@triton.jit
def conv_window(
    x, weight, residual, out, scale, shift,
    M, K, H, P, Q, x_n, x_h, first, step_q, row, stride_h, pad_h, dil_h,
    R: tl.constexpr, SPAN: tl.constexpr, LEAD: tl.constexpr, TAKE: tl.constexpr, UNIT: tl.constexpr,
    RELU: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Implicit GEMM; its reduction runs over R pieces of SPAN terms. weight is [K, R·SPAN], zero beside its TAKE terms.

    In units of UNIT elements: x's strides x_n and x_h, the length ``row`` of its rows, the ``first`` term of the first
    output pixel of a row, and ``step_q`` from one to the next. Grid: tiles.
    """
    pid_m, pid_n = _swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN), GROUP_M)
    if WIDE:
        pid_m = pid_m.to(tl.int64)
        x_n, x_h = tl.cast(x_n, tl.int64), tl.cast(x_h, tl.int64)
    m = pid_m * BM + tl.arange(0, BM)
    m_ok = m < M
    k = pid_n * BN + tl.arange(0, BN)
    k_ok = k < K
    h0 = m // Q % P * stride_h - pad_h  # [BM]
    e0 = m % Q * (step_q * UNIT) + first * UNIT  # [BM], counted in elements from the row's begin
    x_row = m // Q // P * (x_n * UNIT) + h0 * (x_h * UNIT) + e0

    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(R * SPAN, BK)):
        red = step * BK + tl.arange(0, BK)
        r = red // SPAN
        j = red % SPAN
        own = (j >= LEAD) & (j < LEAD + TAKE)
        h = h0[:, None] + (r * dil_h)[None, :]
        e = e0[:, None] + j[None, :]
        ok = (m_ok[:, None] & (r < R)[None, :]) & ((h >= 0) & (h < H)) & ((e >= 0) & (e < row * UNIT))
        if UNIT == 1:
            ok = ok & own[None, :]
        a = tl.load(x + x_row[:, None] + (r * dil_h * (x_h * UNIT) + j)[None, :], mask=ok, other=0.0)  # [BM, BK]
        if UNIT > 1:  # not by the mask, which is one for UNIT elements; a weight of zero would not stop NaN
            a = tl.where(own[None, :], a, 0.0)
        b = tl.load(
            weight + k[None, :] * (R * SPAN) + red[:, None],
            mask=k_ok[None, :] & (red < R * SPAN)[:, None],
            other=0.0,
        )
        acc = _dot(a, b, acc, PRECISION)

    y = _affine(acc, k, k_ok, scale, shift)
    at = m[:, None] * K + k[None, :]
    ok = m_ok[:, None] & k_ok[None, :]
    if residual is not None:
        y += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        y = _relu(y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


class Window(NamedTuple):
    """How a filter row is read, in elements."""

    unit: int
    lead: int
    take: int
    span: int


def unit(x: Tensor, conv: ConvBN) -> int:
    """How many elements of ``x`` [N, H, W, C] may be read at a time; 0: rows of a filter do not lie in one piece."""
    n, h, w, c = x.shape
    if (w > 1 and x.stride(2) != c) or (c > 1 and x.stride(3) != 1):
        return 0
    strides = [stride for size, stride in zip((n, h), x.stride()[:2], strict=True) if size > 1]
    return math.gcd(conv.stride[1] * c, w * c, _PIECE, *strides)


def window(problem: Problem) -> Window:
    """The pieces of a problem's filter."""
    take = problem.filter[1] * problem.c
    lead = -problem.padding[1] * problem.c % problem.unit
    return Window(problem.unit, lead, take, math.ceil((lead + take) / _PIECE) * _PIECE)


def _pad(conv: ConvBN, lead: int, span: int) -> Tensor:
    rows = conv.weight.permute(0, 2, 3, 1).flatten(2)  # [K, R, S·C]
    padded = rows.new_zeros(rows.shape[0], rows.shape[1], span)
    padded[:, :, lead : lead + rows.shape[2]] = rows
    return padded


def launch(
    conv: ConvBN,
    relu: bool,
    operands: Operands,
    problem: Problem,
    config: ConvConfig,
    wide: bool,
    tiles: int,
    out: Tensor,
) -> Launch:
    """What writes the output ``[N, P, Q, K]``."""
    x, size = operands.x, window(problem)
    weight = packed.packed(_KINDS[size.lead], conv, lambda conv: _pad(conv, size.lead, size.span))
    n, h, w, c = x.shape
    x_n, x_h = (stride if size > 1 else 0 for size, stride in zip((n, h), x.stride()[:2], strict=True))
    args = (
        x, weight, operands.residual, out, operands.scale, operands.shift,
        problem.m, problem.k, h, problem.p, problem.q, x_n // size.unit, x_h // size.unit,
        -(conv.padding[1] * c + size.lead) // size.unit, conv.stride[1] * c // size.unit, w * c // size.unit,
        conv.stride[0], conv.padding[0], conv.dilation[0],
    )  # fmt: skip
    constants = {
        "R": problem.filter[0], "SPAN": size.span, "LEAD": size.lead, "TAKE": size.take, "UNIT": size.unit,
        "RELU": relu, "WIDE": wide, "PRECISION": problem.precision,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "GROUP_M": config.group_m,
        "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(conv_window, (tiles,), args, constants)
