"""detectron2: its ResNet backbones, whose convolutions hold their norms."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.modules.conv_bn_relu import FusedStem, only
from resnet_fused.modules.spec import BlockSpec, extended

_RESNET = "detectron2.modeling.backbone.resnet"

BLOCKS = {
    f"{_RESNET}.BasicBlock": BlockAdapter(
        "basic_block", extended(BlockSpec.of("conv1 conv2", "conv1.norm conv2.norm", shortcut="shortcut"), adds="+=")
    ),
    f"{_RESNET}.BottleneckBlock": BlockAdapter(
        "bottleneck",
        extended(BlockSpec.of("conv1 conv2 conv3", "conv1.norm conv2.norm conv3.norm", shortcut="shortcut"), adds="+="),
    ),
}

REFUSED = {f"{_RESNET}.DeformBottleneckBlock": "a block with a deformable convolution"}


class FusedBasicStem(FusedStem):
    """detectron2's stem, convolution to pool, with the convolution fused."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only(args, kwargs)
        if self._rf_stem_pairs(x) is None:
            return self._rf_original("forward")(*args, **kwargs)  # type: ignore[no-any-return]
        return F.max_pool2d(self._rf_run_stem(x), 3, 2, 1)


STEMS = {f"{_RESNET}.BasicStem": StemAdapter(BlockSpec.of("conv1", "conv1.norm"), FusedBasicStem, ("forward",))}
