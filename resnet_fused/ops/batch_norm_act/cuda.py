"""batch_norm_act by this project's CUDA C++ kernels (csrc/batch_norm_act), on CUDA devices.

Forward: statistics; their merge, which also moves the running ones; normalisation, residual and ReLU. Backward: sums,
their merge, the gradients. Partial results are merged in a fixed order: no atomics, the same bits every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall, dense_format, written
from resnet_fused.ops.convbn import short_dtype

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OPS = torch.ops.resnet_fused_cuda


def supports(call: BatchNormCall | GradientCall) -> str | None:
    """Why these kernels cannot compute this call, or None when they can."""
    x = call.x
    if x.device.type != "cuda":
        return f"its kernels run on CUDA devices, x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"its kernels compute float16, bfloat16 and float32, not {short_dtype(x.dtype)}"
    return None


def run(call: BatchNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, 1/√(var + eps)), statistics in float32; the running ones follow."""
    if not call.training:
        empty = call.x.new_empty(0, dtype=torch.float32)
        return apply(call, empty, empty), empty, empty.clone()
    extension.module()
    # The kernels write vectors whose elements are adjacent; any other follows through a copy.
    running = [None if v is None else v.contiguous() for v in (call.running_mean, call.running_var)]
    batches = call.num_batches_tracked if call.momentum is None else None
    output, mean, rstd = _OPS.batch_norm_act(
        call.x, call.weight, call.bias, *running, None if batches is None else batches.long(), call.residual,
        float(call.momentum or 0.0), call.eps, call.act == "relu",
    )  # fmt: skip
    for vector, followed in zip((call.running_mean, call.running_var), running, strict=True):
        if vector is not None and followed is not None and followed is not vector:
            vector.copy_(followed)
    written(call.running_mean, call.running_var)
    return output, mean, rstd


def apply(call: BatchNormCall, mean: Tensor, rstd: Tensor) -> Tensor:
    """The output for known statistics: the same bits as in ``run``."""
    extension.module()
    given = (mean, rstd) if call.training else (call.running_mean, call.running_var)
    return _OPS.batch_norm_act_apply(  # type: ignore[no-any-return]
        call.x, call.weight, call.bias, *given, call.residual, call.training, call.eps, call.act == "relu"
    )


def backward(call: GradientCall) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and residual."""
    extension.module()
    x = call.x.contiguous(memory_format=dense_format(call.x))
    given = (call.mean, call.rstd) if call.training else (call.running_mean, call.running_var)
    dweight, dbias, dx, dresidual = _OPS.batch_norm_act_backward(
        call.grad, x, call.weight, *given, call.output, call.training, call.eps, call.need_x, call.need_residual
    )
    return dx, dweight, dbias, dresidual
