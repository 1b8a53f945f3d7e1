"""batch_norm_act in eager PyTorch: the oracle, in any dtype and on any device. On the CPU it is also the quickest."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall, wide

_COLUMN = (1, -1, 1, 1)


def supports(call: BatchNormCall | GradientCall) -> str | None:
    return None


def run(call: BatchNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, 1/√(var + eps)); the running statistics follow, the count of batches is the caller's."""
    x, running_mean, running_var = call.x, call.running_mean, call.running_var
    kind = wide(x.dtype)
    weight, bias = _to(call.weight, kind), _to(call.bias, kind)
    if not call.training:
        assert running_mean is not None and running_var is not None
        y = torch.batch_norm(
            x, weight, bias, running_mean.to(kind), running_var.to(kind), False, 0.0, call.eps, False
        )  # fmt: skip
        mean, rstd = running_mean.to(kind, copy=True), torch.rsqrt(running_var.to(kind) + call.eps)
        return _finish(y, call), mean, rstd
    factor = _factor(call)
    direct = running_mean is not None and running_mean.dtype == kind and isinstance(factor, float)
    if direct:
        assert isinstance(factor, float)
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, factor, call.eps)
    else:
        # Buffers of the batch's own, so that statistics are float32 whatever the dtype of x, γ and the running ones.
        batch_mean, batch_var = x.new_zeros(2, x.shape[1], dtype=kind).unbind()
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, batch_mean, batch_var, True, 1.0, call.eps)
        if running_mean is not None and running_var is not None:
            for running, batch in ((running_mean, batch_mean), (running_var, batch_var)):
                running.copy_(running.to(kind) * (1 - factor) + batch * factor)
    return _finish(y, call), mean, rstd


def apply(call: BatchNormCall, mean: Tensor, rstd: Tensor) -> Tensor:
    """The output again, to the bit, of a call whose statistics are known; no running statistic changes.

    aten normalises by given statistics with another rounding, so with training it computes them again.
    """
    if not call.training:
        return run(call)[0]
    return run(call._replace(running_mean=None, running_var=None, num_batches_tracked=None))[0]


def backward(call: GradientCall) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and residual; differentiable itself."""
    x, mean, rstd = call.x, call.mean, call.rstd
    grad = call.grad
    if call.output is not None:
        grad = torch.ops.aten.threshold_backward(grad, call.output, 0)
    dresidual = grad if call.need_residual else None
    weight = _to(call.weight, mean.dtype)
    if call.training:
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, rstd, True, call.eps, [call.need_x, True, True]
        )
        return dx, dweight, dbias, dresidual
    kind = mean.dtype
    dbias = grad.sum((0, 2, 3), dtype=kind)
    dweight = (grad * (x - mean.view(_COLUMN))).sum((0, 2, 3), dtype=kind) * rstd
    scale = rstd if weight is None else rstd * weight
    dx = (grad * scale.view(_COLUMN)).to(x.dtype) if call.need_x else None
    return dx, dweight, dbias, dresidual


def _finish(y: Tensor, call: BatchNormCall) -> Tensor:
    if call.residual is not None:
        y += call.residual
    return torch.relu_(y) if call.act == "relu" else y


def _factor(call: BatchNormCall) -> float | Tensor:
    """The weight of this batch in the running statistics; a tensor where reading it would wait for the device."""
    count = call.num_batches_tracked
    if call.momentum is not None or count is None:
        return call.momentum or 0.0
    return 1.0 / float(count) if count.device.type == "cpu" else count.to(wide(call.x.dtype)).reciprocal()


def _to(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else vector.to(dtype)
