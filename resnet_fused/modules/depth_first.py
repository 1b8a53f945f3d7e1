"""Running a large batch through a whole network a few images at a time, on the CPU.

Block by block, each tensor between two blocks holds the whole batch: too large for the cache, and given back to the
system when it is freed, so that every use pays for its page faults. Depth first, a sub-batch goes from the stem to the
pooled features before the next, in buffers that the heap keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from resnet_fused.modules import parts
from resnet_fused.modules.block import FusedBlock
from resnet_fused.ops import workspace

# What one sub-batch may hold at a time: a layer's input, its output and what stands between. That much stays in the
# heap (ops/workspace.py); half as much makes the matrix products of the last stages small, and so slow.
BYTES = 36 << 20

_PER_IMAGE = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity)


def run(function: Callable[[Tensor], Tensor], x: Tensor, stem: nn.Conv2d, layers: Iterable[nn.Module]) -> Tensor:
    """``function(x)``, by sub-batches where that is sound and pays.

    It is sound where nobody can tell: every image is computed apart from the others (fused blocks with given
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
    if parts_needed < 2 or not all(map(_apart, steps)):
        return function(x)
    return torch.cat([function(part) for part in x.split(-(-n // parts_needed))])


def _may_split(x: Tensor) -> bool:
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not whole and x.device.type == "cpu" and x.dim() == 4 and x.shape[0] > 1


def _bytes_per_image(x: Tensor, stem: nn.Conv2d, steps: Iterable[nn.Module]) -> int:
    """The most that one image holds at a time, borders left out of account."""
    pixels = x.shape[2] * x.shape[3] // (stem.stride[0] * stem.stride[1])
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


def _area(stride: int | tuple[int, ...]) -> int:
    return stride * stride if isinstance(stride, int) else math.prod(stride)


def _steps(layer: nn.Module) -> Iterable[nn.Module]:
    return [layer, *layer] if type(layer) is nn.Sequential else [layer]


def _apart(module: nn.Module) -> bool:
    """Whether ``module`` computes each image apart and unwatched. A Sequential's children are asked on their own."""
    if parts.touched(module) or parts.watched():
        return False
    if isinstance(module, FusedBlock):
        return module.uses_given_statistics()
    return type(module) in _PER_IMAGE or type(module) is nn.Sequential
