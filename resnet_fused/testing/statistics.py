"""Batch-norm statistics for models without trained weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FEW = 16  # values of a channel, below which their variance says little


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor, *, perturb: bool = False, seed: int = 0) -> None:
    """Give every batch norm the statistics of what it receives, in one forward pass in eval mode, in place.

    A module counts as batch norm when it has ``running_mean`` and ``running_var`` tensors, so frozen batch norms count.
    Each is set just before its own first run, hence every norm sees what its calibrated predecessors give. A norm of
    few values per channel (of a globally pooled map) gets the statistics of all its channels together: what differs
    between two images of a batch is little, and its inverse would blow up other images, and their rounding, without
    bound.

    Args:
        model: in eval mode.
        x: the input batch, of the model's dtype and device.
        perturb: also draw γ and β at random and move the statistics away from the exact ones, so that a result in
            which any of the four was forgotten is plainly wrong; activations stay of order one.
        seed: of the random draws.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)

    def set_statistics(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if id(norm) in done:
            return
        done.add(id(norm))
        y = inputs[0].float() if inputs[0].dtype in (torch.float16, torch.bfloat16) else inputs[0]
        var, mean = torch.var_mean(y, dim=[d for d in range(y.dim()) if d != 1], correction=0)
        if y.numel() < FEW * y.shape[1]:
            var, mean = (value.expand_as(mean) for value in torch.var_mean(y, correction=0))
        var = torch.where(var > 0, var, 1.0)  # a single pixel, or a dead channel
        if perturb:
            mean = mean + var.sqrt() * draw(mean, -0.3, 0.3)
            var = var * draw(var, 0.6, 1.6)
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
                vector = getattr(norm, name, None)
                if isinstance(vector, Tensor):
                    vector.copy_(draw(vector, low, high))
        norm.running_mean.copy_(mean)  # type: ignore[operator]
        norm.running_var.copy_(var)  # type: ignore[operator]

    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    handles = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
