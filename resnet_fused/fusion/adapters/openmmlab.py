"""OpenMMLab (mmdet, mmpretrain, mmseg, mmpose): pytorch and caffe styles. Their stems stay eager."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fused.fusion.adapters.table import BlockAdapter
from resnet_fused.modules.spec import BlockSpec, extended, find

_PACKAGES = ("mmdet", "mmpretrain", "mmcls", "mmseg", "mmpose")


def _refusal(block: nn.Module) -> str | None:
    """Why this block computes something else, or None."""
    instance: Any = block
    if getattr(instance, "with_cp", False):
        return "it recomputes its activations (with_cp=True)"
    if getattr(instance, "with_plugins", False):
        return "it has plugins"
    for i in (1, 2, 3):  # the norms' names follow their configuration
        norm = getattr(instance, f"norm{i}", None)
        if norm is not find(block, (f"bn{i}",)):
            return f"norm{i} is a {type(norm).__name__}, need nn.BatchNorm2d under the name bn{i}"
    return None


_BASIC = extended(BlockSpec.of("conv1 conv2", "bn1 bn2", "relu", "downsample"), extras=("", "drop_path"), adds="+=")
_BOTTLENECK = extended(
    BlockSpec.of("conv1 conv2 conv3", "bn1 bn2 bn3", "relu", "downsample"), extras=("", "", "drop_path"), adds="+="
)

BLOCKS = {
    f"{package}.models.backbones.resnet.{name}": adapter
    for package in _PACKAGES
    for name, adapter in {
        "BasicBlock": BlockAdapter("basic_block", _BASIC, _refusal),
        "Bottleneck": BlockAdapter("bottleneck", _BOTTLENECK, _refusal),
    }.items()
}
