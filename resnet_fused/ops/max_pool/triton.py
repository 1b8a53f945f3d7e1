"""The max pool behind a stem by Triton: one pass over memory, without the indices that aten writes for a gradient."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops.convbn import short_dtype
from resnet_fused.ops.max_pool.types import PoolCall
from resnet_fused.ops.triton_launch import Launch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ELEMENTS = 2048  # of a program's tile


@triton.jit
def max_pool_kernel(
    x, out, M, C, H, W, P, Q, x_n, x_h, x_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile of BM output pixels by BC channels. Grid: (tiles of M = N·P·Q pixels, tiles of C)."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_ok, c_ok = m < M, c < C
    h0 = m // Q % P * stride_h - pad_h
    w0 = m % Q * stride_w - pad_w
    first = m // Q // P * x_n
    most = tl.full((BM, BC), float("-inf"), tl.float32)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            h, w = h0 + r * dil_h, w0 + s * dil_w
            ok = (m_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & c_ok[None, :]
            value = tl.load(x + (first + h * x_h + w * x_w)[:, None] + c[None, :], mask=ok, other=float("-inf"))
            value = value.to(tl.float32)
            most = tl.where((value > most) | (value != value), value, most)  # NaN is the most, as aten has it
    tl.store(out + m[:, None] * C + c[None, :], most.to(out.dtype.element_ty), mask=m_ok[:, None] & c_ok[None, :])


def supports(call: PoolCall) -> str | None:
    """Why Triton cannot compute this call, or None when it can."""
    x = call.x
    if x.dtype not in _DTYPES:
        return f"Triton computes float16, bfloat16 and float32, not {short_dtype(x.dtype)}"
    if x.device.type == "cuda":
        return None if torch.version.hip is None else "its kernels are written for NVIDIA devices"
    if x.device.type != "cpu" or not backends.interpreting():
        return f"x is on {x.device}, Triton needs a CUDA device"
    return None


def launches(call: PoolCall, out: Tensor, workspace: Tensor | None = None) -> list[Launch]:
    """The launch that writes ``out``, a channels_last ``[N, C, P, Q]``."""
    x = call.x.permute(0, 2, 3, 1)
    n, h, w, c = x.shape
    p, q = call.output_size()
    channels = min(64, triton.next_power_of_2(c))
    pixels = _ELEMENTS // channels
    args = (
        x, out.permute(0, 2, 3, 1), n * p * q, c, h, w, p, q, *x.stride()[:3],
        *call.stride, *call.padding, *call.dilation,
    )  # fmt: skip
    constants = {"R": call.kernel[0], "S": call.kernel[1], "BM": pixels, "BC": channels, "num_warps": 4}
    return [Launch(max_pool_kernel, (math.ceil(n * p * q / pixels), math.ceil(c / channels)), args, constants)]


def workspace_bytes(call: PoolCall) -> int:
    """Nothing beside the output."""
    return 0
