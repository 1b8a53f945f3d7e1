"""Running a large batch through a whole network a few images at a time, on the CPU.

Block by block, each tensor between two blocks holds the whole batch: too large for the cache, and above 32 MB mapped
afresh by the allocator every time. Depth first, a sub-batch goes from the stem to the pooled features before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from resnet_fused.modules import parts
from resnet_fused.modules.block import FusedBlock

# The stem's output, the largest tensor of a ResNet, for one sub-batch.
BYTES = 28 << 20

_PER_IMAGE = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity)


def run(function: Callable[[Tensor], Tensor], x: Tensor, stem: nn.Conv2d, layers: Iterable[nn.Module]) -> Tensor:
    """``function(x)``, by sub-batches where that is sound and pays.

    It is sound where nobody can tell: every image is computed apart from the others (fused blocks with given
    statistics, pooling), no hook would see a part of a batch, and no gradient is recorded.

    Args:
        function: from images ``[N, ...]`` to features ``[N, ...]``.
        stem: the first convolution; its output tells the size of the largest tensor.
        layers: all modules that ``function`` runs behind the stem.
    """
    size = _images(x, stem)
    if size >= x.shape[0] or not all(_apart(m) for layer in layers for m in _steps(layer)):
        return function(x)
    return torch.cat([function(part) for part in x.split(size)])


def _images(x: Tensor, stem: nn.Conv2d) -> int:
    """How many images to take at a time."""
    n = x.shape[0] if x.dim() == 4 else 0
    if n < 2 or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return n
    pixels = x.shape[2] * x.shape[3] // (stem.stride[0] * stem.stride[1])
    limit = max(1, BYTES // max(1, stem.out_channels * pixels * x.element_size()))
    parts_needed = -(-n // limit)
    return -(-n // parts_needed)


def _steps(layer: nn.Module) -> Iterable[nn.Module]:
    return [layer, *layer] if type(layer) is nn.Sequential else [layer]


def _apart(module: nn.Module) -> bool:
    """Whether ``module`` computes each image apart and unwatched. A Sequential's children are asked on their own."""
    if parts.touched(module) or parts.watched():
        return False
    if isinstance(module, FusedBlock):
        return module.uses_given_statistics()
    return type(module) in _PER_IMAGE or type(module) is nn.Sequential
