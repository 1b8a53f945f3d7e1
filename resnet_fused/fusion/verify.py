"""Compare a model with its fused form on the user's own input."""

from __future__ import annotations

from torch import Tensor, nn

from resnet_fused.fusion.api import fuse, unfuse
from resnet_fused.testing.budget import Error
from resnet_fused.testing.eager import eager_copy
from resnet_fused.testing.networks import compare


def verify(block: nn.Module, x: Tensor, *, backend: str = "auto") -> Error:
    """Compare ``block`` in eval mode with its fused form, both against a run in float64.

    Args:
        block: a block or a whole model, fused or not, whose output is one tensor. It is not changed.
        x: its input, ``[N, C, H, W]``.
        backend: as in ``fuse``.

    Returns:
        The worst element: ``ok`` tells whether the error is at most twice eager's plus one rounding step.

    Raises:
        FusionError: nothing in ``block`` can be fused, or some block in it is left alone.
    """
    fused = fuse(unfuse(block).eval(), backend=backend, strict=True)
    return compare(fused, eager_copy(block).eval(), x)
