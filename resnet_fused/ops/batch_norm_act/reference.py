"""batch_norm_act in eager PyTorch: the oracle, in any dtype and on any device. On the CPU it is also the quickest."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall, wide


def supports(call: BatchNormCall | GradientCall) -> str | None:
    return None


def differentiable(call: BatchNormCall) -> Tensor:
    """The output alone, by operations that PyTorch itself differentiates; the running statistics follow.

    For a momentum that is a number, and vectors of one dtype.
    """
    y = torch.batch_norm(
        call.x, call.weight, call.bias, call.running_mean, call.running_var, call.training, call.momentum or 0.0,
        call.eps, torch.backends.cudnn.enabled,
    )  # fmt: skip
    return _finish(y, call)


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
        return _finish(y, call), x.new_empty(0, dtype=kind), x.new_empty(0, dtype=kind)
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
    grad, kind = call.grad, wide(call.x.dtype)
    if call.output is not None:
        grad = torch.ops.aten.threshold_backward(grad, call.output, 0)
    running = _to(call.running_mean, kind), _to(call.running_var, kind)
    batch = (call.mean, call.rstd) if call.training else (None, None)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        grad, call.x, _to(call.weight, kind), *running, *batch, call.training, call.eps, [call.need_x, True, True]
    )
    return dx, dweight, dbias, grad if call.need_residual else None


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
