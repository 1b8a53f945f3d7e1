"""Batch norm with the statistics of all processes, where nn.SyncBatchNorm has no kernel: on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.ops.batch_norm_act.call import wide

_PIXELS = (0, 2, 3)


def processes(group: Any) -> int:
    """How many processes share statistics; ``group`` None is all of them."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    eps: float, factor: float, group: Any,
) -> Tensor:  # fmt: skip
    """Normalise ``[N, C, H, W]`` by mean and variance over all processes' images; running ones follow by ``factor``.

    Gradients of weight and bias are those of this process alone, as of every other parameter: averaging them is what
    wraps the model's task. Processes may have different numbers of images, or none.
    """
    out: Tensor = _Sync.apply(x, weight, bias, running_mean, running_var, eps, factor, group)  # type: ignore[no-untyped-call]
    return out


class _Sync(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, eps: float, factor: float, group: Any,
    ) -> Tensor:  # fmt: skip
        kind, channels = wide(x.dtype), x.shape[1]
        own = x.new_full((1,), x.numel() // channels, dtype=kind)
        if x.numel():
            squares, mean = torch.var_mean(x.to(kind), _PIXELS, correction=0)
            squares = squares * own
        else:
            squares, mean = x.new_zeros(2, channels, dtype=kind).unbind()
        rows = [torch.empty(2 * channels + 1, dtype=kind, device=x.device) for _ in range(processes(group))]
        dist.all_gather(rows, torch.cat([mean, squares, own]), group=group)
        means, deviations, counts = torch.stack(rows).split([channels, channels, 1], 1)
        count = counts.sum()
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        mean = (means * counts).sum(0) / count
        var = (deviations.sum(0) + ((means - mean).square() * counts).sum(0)) / count  # Chan's merge
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), factor)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), factor)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.dtypes = [None if vector is None else vector.dtype for vector in (weight, bias)]
        gamma, beta = (None if vector is None else vector.to(kind) for vector in (weight, bias))
        return torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, var, count = ctx.saved_tensors
        column = (1, -1, 1, 1)
        rstd = torch.rsqrt(var + ctx.eps).view(column)
        grad = grads[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(column)) * rstd
        dweight, dbias = (grad * normal).sum(_PIXELS), grad.sum(_PIXELS)
        sums = torch.stack([dweight, dbias])
        dist.all_reduce(sums, group=ctx.group)
        weighted, plain = (sums / count).view(2, *column).unbind()
        scale = rstd if weight is None else rstd * weight.to(mean.dtype).view(column)
        dx = (grad - plain - normal * weighted) * scale
        return (
            dx.to(x.dtype) if ctx.needs_input_grad[0] else None,
            dweight.to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None,
            dbias.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None,
            *[None] * 5,
        )  # fmt: skip
