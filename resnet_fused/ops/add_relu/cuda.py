"""add_relu by this project's CUDA C++ kernels (csrc/add_relu): one pass over memory, any strides, on CUDA devices."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.convbn import short_dtype

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(call: AddReLUCall) -> str | None:
    """Why these kernels cannot compute this call, or None when they can."""
    a, b = call
    if a.device.type != "cuda":
        return f"its kernels run on CUDA devices, a is on {a.device}"
    if a.dtype not in _DTYPES:
        return f"its kernels compute float16, bfloat16 and float32, not {short_dtype(a.dtype)}"
    if a.dim() > 5 and not (a.is_contiguous() and b.is_contiguous()):
        return "more than 5 dimensions that are not contiguous"
    return None


def run(call: AddReLUCall) -> Tensor:
    """Compute the call; the result has the strides of ``a + b``."""
    extension.module()
    return torch.ops.resnet_fused_cuda.add_relu(call.a, call.b)  # type: ignore[no-any-return]


def run_(call: AddReLUCall) -> Tensor:
    """Write the result over ``a`` and return it."""
    extension.module()
    return torch.ops.resnet_fused_cuda.add_relu_(call.a, call.b)  # type: ignore[no-any-return]


def backward(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of the sum: ``grad`` where ``output`` is not ≤ 0, as aten's threshold_backward gives it."""
    extension.module()
    return torch.ops.resnet_fused_cuda.relu_backward(grad, output)  # type: ignore[no-any-return]
