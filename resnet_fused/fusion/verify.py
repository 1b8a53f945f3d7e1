"""Comparing a model with its fused form on the user's own input."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from resnet_fused.fusion.api import fuse, unfuse
from resnet_fused.testing.budget import Error, measure


def verify(block: nn.Module, x: Tensor, *, backend: str = "auto") -> Error:
    """Compare ``block`` in eval mode with its fused form, both against a run in float64.

    Args:
        block: a block or a whole model, fused or not, whose output is one tensor. It is not changed.
        x: its input.
        backend: as in ``fuse``.

    Returns:
        The worst element: ``ok`` tells whether the error is at most twice eager's plus one rounding step.

    Raises:
        FusionError: nothing in ``block`` can be fused.
    """
    eager = unfuse(block).eval()
    fused = fuse(eager, backend=backend, strict=True)
    with torch.no_grad():
        return measure(fused(x), eager(x), copy.deepcopy(eager).double()(x.double()))
