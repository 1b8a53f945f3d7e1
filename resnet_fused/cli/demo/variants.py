"""The demo's candidates: eager and fused, in both memory formats."""

from __future__ import annotations

import copy
import functools
import math

import torch
from rich.console import Console
from torch import Tensor, nn

import resnet_fused
from resnet_fused.cli.common import steps
from resnet_fused.testing.eager import eager_copy
from resnet_fused.testing.timing import Timing, interleaved

BASELINES = ("eager NCHW", "eager channels_last")


def variants(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Model and input of every candidate: eager and fused, in both layouts."""
    eager, fused = eager_copy(model), resnet_fused.fuse(model)
    last = torch.channels_last

    def turned(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(memory_format=last)  # type: ignore[call-overload, no-any-return]

    return {
        "eager NCHW": (eager, x),
        "eager channels_last": (turned(eager), x.contiguous(memory_format=last)),
        "fused NCHW": (fused, x),
        "fused channels_last": (turned(fused), x.contiguous(memory_format=last)),
    }


def time_variants(
    candidates: dict[str, tuple[nn.Module, Tensor]], repeats: int, out: Console, max_seconds: float = math.inf
) -> dict[str, Timing]:
    """Time each candidate on its own input, in turns."""
    calls = {name: functools.partial(model, image) for name, (model, image) in candidates.items()}
    device = next(iter(candidates.values()))[1].device
    with steps(out, "timing", repeats) as advance:
        return interleaved(calls, device=device, repeats=repeats, max_seconds=max_seconds, progress=advance)
