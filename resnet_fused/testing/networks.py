"""Whole models for tests: norms that are not trivial, and eager's results to compare with."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from resnet_fused.ops import packed
from resnet_fused.testing.budget import Error, measure

M = TypeVar("M", bound=nn.Module)


def randomise_norms(model: M, seed: int = 0) -> M:
    """Give every batch norm of ``model`` statistics and affine parameters away from zero and one, in place."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean") and hasattr(module, "running_var"):
                fill(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
                fill(module.running_var, 0.6, 1.6)  # type: ignore[arg-type]
                fill(module.weight, 0.4, 0.9)  # type: ignore[arg-type]
                fill(module.bias, -0.3, 0.3)  # type: ignore[arg-type]
    return model


def compare(fused: nn.Module, eager: nn.Module, x: Tensor) -> Error:
    """Compare two models on ``x`` without recording gradients: error against float64, budget from ``eager``'s own.

    Eager's error counts in either memory format, as in :func:`resnet_fused.testing.budget.measure`.
    """
    with torch.no_grad(), packed.at_once():
        reference = copy.deepcopy(eager).double()(x.double())
        other = copy.deepcopy(eager).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return measure(fused(x), eager(x), reference, other(x.contiguous(memory_format=torch.channels_last)))
