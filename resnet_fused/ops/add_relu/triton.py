"""add_relu by Triton: one pass over memory, on CUDA devices."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.convbn import short_dtype

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 2048  # with 4 warps two 16-byte accesses per thread in half precision, four in single


@triton.jit
def add_relu_kernel(a, b, out, count, BLOCK: tl.constexpr):
    """relu(a + b) of ``count`` adjacent elements, summed in float32, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    y = tl.load(a + at, mask=ok).to(tl.float32) + tl.load(b + at, mask=ok).to(tl.float32)
    y = tl.where(y < 0, 0.0, y)  # a comparison with NaN is false: NaN stays
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


def supports(call: AddReLUCall) -> str | None:
    """Why Triton cannot compute this call, or None when it can."""
    a = call.a
    if a.dtype not in _DTYPES:
        return f"Triton computes float16, bfloat16 and float32, not {short_dtype(a.dtype)}"
    if a.device.type == "cuda":
        return None if torch.version.hip is None else "its kernels are written for NVIDIA devices"
    if a.device.type != "cpu" or not backends.interpreting():
        return f"a is on {a.device}, Triton needs a CUDA device"
    return None


def run(call: AddReLUCall) -> Tensor:
    """Compute the call; the result has the strides of ``a + b``."""
    a, b = call
    strides = _strides(a.shape, a.stride(), b.stride(), a.dtype)
    out = torch.empty_strided(a.shape, strides, dtype=a.dtype, device=a.device)
    a, b = _laid_out(a, strides), _laid_out(b, strides)
    count = out.numel()
    if count:
        with torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext():
            add_relu_kernel[(triton.cdiv(count, _BLOCK),)](
                a, b, out, count, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
            )
    return out


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, or a copy of it, with these strides, which leave no gaps."""
    same = all(size == 1 or s == t for size, s, t in zip(tensor.shape, tensor.stride(), strides, strict=True))
    if same:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@functools.lru_cache(maxsize=4096)
def _strides(shape: torch.Size, a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The strides that aten gives ``a + b``: always those of a permuted dense tensor. Asked of the meta device."""
    left = torch.empty_strided(shape, a, dtype=dtype, device="meta")
    right = torch.empty_strided(shape, b, dtype=dtype, device="meta")
    return (left + right).stride()
