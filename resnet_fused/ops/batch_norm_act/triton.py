"""batch_norm_act by Triton, on CUDA devices.

Forward: partial statistics; their merge, which also moves the running statistics; normalisation, residual and ReLU.
Backward: partial sums, the gradients. Partial results are merged in a fixed order: no atomics, the same bits every run.
Launch choices are fixed, never tuned by trial: a trial would move the running statistics.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall, dense_format, empty_output, written
from resnet_fused.ops.convbn import short_dtype

_FUSION = {"enable_fp_fusion": True}  # the default of Triton changes
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class NormConfig:
    """A tile of block_m pixels (of all images) by block_c channels. Unmeasured: 16-byte accesses, 32 values each."""

    block_m: int
    block_c: int
    warps: int = 4

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_c}-w{self.warps}"


CHANNELS_LAST = (NormConfig(64, 64), NormConfig(256, 16))  # many channels, few
CONTIGUOUS = NormConfig(2048, 1)  # the pixels of one channel are adjacent
MERGE = NormConfig(128, 16)  # splits and channels: there are at most 4 splits to a multiprocessor, 528 on an H100
_PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _at(m, c, C, HW, CHANNELS_LAST: tl.constexpr):
    """Offsets [M, C] of pixel m (counted through all images) and channel c."""
    if CHANNELS_LAST:
        return m.to(tl.int64)[:, None] * C + c[None, :]
    return (m // HW).to(tl.int64)[:, None] * C * HW + c.to(tl.int64)[None, :] * HW + (m % HW)[:, None]


@triton.jit
def statistics_kernel(
    x, partial, M, C, HW, rows, splits,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of ``rows`` pixels, into partial [2, splits, C]: two-pass tiles, Chan's merge."""
    split = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    start = split.to(tl.int64 if WIDE else tl.int32) * rows
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    count = 0.0
    for step in range(0, rows, BM):
        m = start + step + tl.arange(0, BM)
        ok = (m < M)[:, None] & (c < C)[None, :]
        v = tl.load(x + _at(m, c, C, HW, CHANNELS_LAST), mask=ok, other=0.0).to(tl.float32)
        n = tl.minimum(tl.maximum(M - start - step, 0), BM).to(tl.float32)
        tile_mean = tl.sum(v, 0) / tl.maximum(n, 1.0)
        d = tl.where(ok, v - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = n / tl.maximum(count + n, 1.0)
        mean += tl.where(n > 0, delta * share, 0.0)
        squares += tl.sum(d * d, 0) + tl.where(n > 0, delta * delta * count * share, 0.0)
        count += n
    at = split.to(tl.int64) * C + c
    tl.store(partial + at, mean, mask=c < C)
    tl.store(partial + tl.cast(splits, tl.int64) * C + at, squares, mask=c < C)


@triton.jit
def merge_kernel(
    partial, mean_out, rstd_out, running_mean, running_var, batches, M, C, rows, splits, momentum, eps,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the partial statistics; move the running ones by ``momentum``, or by 1/batches where that is given.

    BS splits at a time: their mean, then their deviations about it, then Chan's merge with what came before.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < C
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    count = 0.0
    for start in range(0, splits, BS):
        split = (start + tl.arange(0, BS)).to(tl.int64)
        here = (split < splits)[:, None] & ok[None, :]
        at = partial + split[:, None] * C + c[None, :]
        means = tl.load(at, mask=here, other=0.0)  # [BS, BC]
        within = tl.load(at + tl.cast(splits, tl.int64) * C, mask=here, other=0.0)
        n = tl.minimum(tl.maximum(M - split * rows, 0), rows).to(tl.float32)  # pixels of a split: the last has fewer
        total = tl.sum(n, 0)
        block_mean = tl.sum(means * n[:, None], 0) / total
        d = tl.where(here, means - block_mean[None, :], 0.0)
        delta = block_mean - mean
        share = total / (count + total)
        mean += delta * share
        squares += tl.sum(within + d * d * n[:, None], 0) + delta * delta * count * share
        count += total
    tl.store(mean_out + c, mean, mask=ok)
    tl.store(rstd_out + c, 1.0 / tl.sqrt_rn(squares / count + eps), mask=ok)
    if running_mean is not None:
        factor = momentum
        if batches is not None:
            factor = 1.0 / tl.load(batches).to(tl.float32)
        old = tl.load(running_mean + c, mask=ok, other=0.0).to(tl.float32)
        new = (1.0 - factor) * old + factor * mean
        tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=ok)
        old = tl.load(running_var + c, mask=ok, other=0.0).to(tl.float32)
        new = (1.0 - factor) * old + factor * (squares / (count - 1.0))
        tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=ok)


@triton.jit
def _vector(pointer, c, C, other):
    return tl.load(pointer + c, mask=c < C, other=other).to(tl.float32)[None, :]


@triton.jit
def apply_kernel(
    x, mean, rstd, weight, bias, residual, out, M, C, HW,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = act((x − mean)·rstd·weight + bias + residual), in float32, rounded once."""
    m = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = (m < M)[:, None] & (c < C)[None, :]
    at = _at(m, c, C, HW, CHANNELS_LAST)
    y = (tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - _vector(mean, c, C, 0.0)) * _vector(rstd, c, C, 0.0)
    if weight is not None:
        y *= _vector(weight, c, C, 0.0)
    if bias is not None:
        y += _vector(bias, c, C, 0.0)
    if residual is not None:
        y += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # a comparison with NaN is false: NaN stays
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _masked(grad, output, at, ok):
    g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    if output is not None:
        g = tl.where(tl.load(output + at, mask=ok, other=0.0).to(tl.float32) <= 0, 0.0, g)
    return g


@triton.jit
def sums_kernel(
    grad, x, mean, rstd, output, partial, M, C, HW, rows, splits,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g·(x − mean)·rstd over ``rows`` pixels, into partial [2, splits, C]."""
    split = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    start = split.to(tl.int64 if WIDE else tl.int32) * rows
    mu, scale = _vector(mean, c, C, 0.0), _vector(rstd, c, C, 0.0)
    plain = tl.zeros((BC,), tl.float32)
    weighted = tl.zeros((BC,), tl.float32)
    for step in range(0, rows, BM):
        m = start + step + tl.arange(0, BM)
        ok = (m < M)[:, None] & (c < C)[None, :]
        at = _at(m, c, C, HW, CHANNELS_LAST)
        g = _masked(grad, output, at, ok)
        deviation = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - mu
        plain += tl.sum(g, 0)
        weighted += tl.sum(tl.where(ok, g * (deviation * scale), 0.0), 0)
    at = split.to(tl.int64) * C + c
    tl.store(partial + at, plain, mask=c < C)
    tl.store(partial + tl.cast(splits, tl.int64) * C + at, weighted, mask=c < C)


@triton.jit
def gradient_kernel(
    grad, x, mean, rstd, weight, output, sums, dx, dresidual, M, C, HW,
    TRAINING: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx = (g − (Σg + x̂·Σg·x̂)/M)·rstd·weight, with given statistics g·rstd·weight; dresidual = g."""
    m = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = (m < M)[:, None] & (c < C)[None, :]
    at = _at(m, c, C, HW, CHANNELS_LAST)
    g = _masked(grad, output, at, ok)
    if dresidual is not None:
        tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=ok)
    if dx is not None:
        scale = _vector(rstd, c, C, 0.0)
        if TRAINING:
            normal = (tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - _vector(mean, c, C, 0.0)) * scale
            g -= (_vector(sums, c, C, 0.0) + normal * _vector(sums + C, c, C, 0.0)) / M
        if weight is not None:
            scale *= _vector(weight, c, C, 0.0)
        tl.store(dx + at, (g * scale).to(dx.dtype.element_ty), mask=ok)


def supports(call: BatchNormCall | GradientCall) -> str | None:
    """Why Triton cannot compute this call, or None when it can."""
    x = call.x
    if x.dtype not in _DTYPES:
        return f"Triton computes float16, bfloat16 and float32, not {short_dtype(x.dtype)}"
    if x.device.type == "cuda":
        return None if torch.version.hip is None else "its kernels are written for NVIDIA devices"
    if x.device.type != "cpu" or not backends.interpreting():
        return f"x is on {x.device}, Triton needs a CUDA device"
    return None


def run(call: BatchNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, 1/√(var + eps)), statistics in float32; the running ones follow."""
    x = call.x
    with _on(x):
        if not call.training:
            empty = x.new_empty(0, dtype=torch.float32)
            return apply(call, empty, empty), empty, empty.clone()
        plan = _Plan(x)
        mean, rstd = (torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
        partial = plan.partial()
        statistics_kernel[plan.reduction](x, partial, *plan.sizes, plan.rows, plan.splits, **plan.constants)
        batches = call.num_batches_tracked if call.momentum is None else None
        merge_kernel[(triton.cdiv(x.shape[1], MERGE.block_c),)](
            partial, mean, rstd, call.running_mean, call.running_var, batches, plan.sizes[0], x.shape[1],
            plan.rows, plan.splits, float(call.momentum or 0.0), call.eps,
            BS=MERGE.block_m, BC=MERGE.block_c, num_warps=MERGE.warps, **_FUSION,
        )  # fmt: skip
        written(call.running_mean, call.running_var)
        return apply(call, mean, rstd), mean, rstd


def apply(call: BatchNormCall, mean: Tensor, rstd: Tensor) -> Tensor:
    """The output for known statistics: the same bits as in ``run``."""
    x = call.x
    with _on(x):
        plan = _Plan(x)
        if not call.training:
            mean, rstd = _given(call)
        out = empty_output(x)
        apply_kernel[plan.tiles](
            x, mean, rstd, call.weight, call.bias, plan.laid_out(call.residual), out, *plan.sizes,
            RELU=call.act == "relu", **plan.constants,
        )  # fmt: skip
    return out


def backward(call: GradientCall) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and residual."""
    x = call.x.contiguous(memory_format=dense_format(call.x))
    with _on(x):
        plan = _Plan(x)
        mean, rstd = (call.mean, call.rstd) if call.training else _given(call)
        grad, output = plan.laid_out(call.grad), plan.laid_out(call.output)
        partial = plan.partial()
        sums_kernel[plan.reduction](
            grad, x, mean, rstd, output, partial, *plan.sizes, plan.rows, plan.splits,
            **plan.constants,
        )  # fmt: skip
        sums = partial.sum(1)  # [2, C], in a fixed order
        dx = empty_output(x) if call.need_x else None
        dresidual = empty_output(x) if call.need_residual else None
        if call.need_x or call.need_residual:
            gradient_kernel[plan.tiles](
                grad, x, mean, rstd, call.weight, output, sums, dx, dresidual, *plan.sizes,
                TRAINING=call.training, **plan.constants,
            )  # fmt: skip
    return dx, sums[1].clone(), sums[0].clone(), dresidual


def _given(call: BatchNormCall | GradientCall) -> tuple[Tensor, Tensor]:
    """The running mean and 1/√(running var + eps), in float32."""
    assert call.running_mean is not None and call.running_var is not None
    return call.running_mean.float(), torch.rsqrt(call.running_var.float() + call.eps)


class _Plan:
    """How a dense x is cut: tiles for the elementwise kernels, strips of ``rows`` pixels for the reductions."""

    def __init__(self, x: Tensor) -> None:
        n, channels, height, width = x.shape
        self.x, self.format = x, dense_format(x)
        channels_last = self.format is torch.channels_last
        self.config = config = pick(channels, channels_last)
        pixels = n * height * width
        self.sizes = (pixels, channels, height * width)
        columns = triton.cdiv(channels, config.block_c)
        wanted = max(1, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(x.device) // columns)
        tiles = triton.cdiv(pixels, config.block_m)
        self.rows = triton.cdiv(tiles, min(tiles, wanted)) * config.block_m
        self.splits = triton.cdiv(pixels, self.rows)
        self.reduction = (columns, self.splits)
        self.tiles = (tiles, columns)
        wide = pixels + self.rows + config.block_m >= 2**31
        self.constants: dict[str, Any] = {"CHANNELS_LAST": channels_last, "WIDE": wide}
        self.constants |= {"BM": config.block_m, "BC": config.block_c, "num_warps": config.warps, **_FUSION}

    def partial(self) -> Tensor:
        return torch.empty(2, self.splits, self.sizes[1], dtype=torch.float32, device=self.x.device)

    def laid_out(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.contiguous(memory_format=self.format)


def pick(channels: int, channels_last: bool) -> NormConfig:
    """The launch choice for so many channels."""
    return CHANNELS_LAST[channels < 32] if channels_last else CONTIGUOUS


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
