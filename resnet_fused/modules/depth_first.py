"""Running a large batch through a whole network a few images at a time, on the CPU.

Block by block, each tensor between two blocks holds the whole batch: too large for the cache, and given back to the
system when it is freed, so that every use pays for its page faults. Depth first, a sub-batch goes from the stem to the
pooled features before the next, in buffers that the heap keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.modules import guards
from resnet_fused.modules.block import FusedBlock, uses_given_statistics
from resnet_fused.ops import workspace

# What one sub-batch may hold at a time: a layer's input, its output and what stands between. That much stays in the
# heap (ops/workspace.py); half as much makes the matrix products of the last stages small, and so slow.
BYTES = 36 << 20

_PER_IMAGE = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity)


def run(function: Callable[[Tensor], Tensor], x: Tensor, stem: nn.Conv2d, layers: Iterable[nn.Module]) -> Tensor:
    """``function(x)``, by sub-batches where that is valid and pays.

    It is valid where no result differs: every image is computed apart from the others (fused blocks with given
    statistics, pooling), no hook would see a part of a batch, and no gradient is recorded.

    Args:
        function: from images ``[N, ...]`` to features ``[N, ...]``.
        stem: the first convolution.
        layers: all modules that ``function`` runs behind the stem.
    """
    if not _may_split(x):
        return function(x)
    workspace.adapt_heap()
    steps = [step for layer in layers for step in _steps(layer)]
    n = x.shape[0]
    parts_needed = -(-n // max(1, BYTES // _bytes_per_image(x, stem, steps)))
    if parts_needed < 2 or guards.watched() is not None or not all(_apart(step, x) for step in steps):
        return function(x)
    return torch.cat([function(part) for part in x.split(-(-n // parts_needed))])


def _may_split(x: Tensor) -> bool:
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not whole and x.device.type == "cpu" and x.dim() == 4 and x.shape[0] > 1


def _bytes_per_image(x: Tensor, stem: nn.Conv2d, steps: Iterable[nn.Module]) -> int:
    """The most that one image holds at a time, borders left out of account."""
    pixels = x.shape[2] * x.shape[3] // _area(stem.stride)
    channels = stem.out_channels
    most = pixels * channels
    for step in steps:
        if isinstance(step, nn.MaxPool2d):
            before, pixels = pixels * channels, pixels // _area(step.stride)
            most = max(most, before + pixels * channels)
        elif isinstance(step, FusedBlock) and (convs := [m for m in step.modules() if isinstance(m, nn.Conv2d)]):
            before, pixels = pixels * channels, pixels // max(_area(conv.stride) for conv in convs)
            channels = max(conv.out_channels for conv in convs)
            most = max(most, before + pixels * (channels + min(conv.out_channels for conv in convs)))
    return max(1, most * x.element_size())


def _area(stride: Any) -> int:
    return max(1, math.prod(guards.pair(stride) or (1, 1)))


def _steps(layer: nn.Module) -> list[nn.Module]:
    """``layer``, or what it runs in turn, at any depth: a Sequential and all that is in it."""
    if type(layer) is not nn.Sequential:
        return [layer]
    return [layer, *(step for child in layer._modules.values() for step in _steps(child))]


def _apart(module: nn.Module, x: Tensor) -> bool:
    """Whether ``module`` computes each image apart and unwatched. A Sequential's children are asked on their own."""
    if isinstance(module, FusedBlock):
        return not guards.touched(module) and uses_given_statistics(module, x)
    own = type(module) is nn.Sequential or (type(module) in _PER_IMAGE and guards.own_forward(type(module)))
    return own and not guards.touched(module)
