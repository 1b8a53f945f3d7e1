"""detectron2: its ResNet backbones, whose convolutions hold their norms."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.spec import BlockSpec

_RESNET = "detectron2.modeling.backbone.resnet"

BLOCKS = {
    f"{_RESNET}.BasicBlock": BlockAdapter(
        "basic_block", BlockSpec.of("conv1 conv2", "conv1.norm conv2.norm", shortcut="shortcut")
    ),
    f"{_RESNET}.BottleneckBlock": BlockAdapter(
        "bottleneck", BlockSpec.of("conv1 conv2 conv3", "conv1.norm conv2.norm conv3.norm", shortcut="shortcut")
    ),
}

REFUSED = {f"{_RESNET}.DeformBottleneckBlock": "a block with a deformable convolution"}


class FusedBasicStem(FusedStem):
    """detectron2's stem, convolution to pool, with the convolution fused."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stem_pairs() is None:
            return self.original("forward")(x)  # type: ignore[no-any-return]
        return F.max_pool2d(self.run_stem(x), 3, 2, 1)


STEMS = {f"{_RESNET}.BasicStem": StemAdapter(BlockSpec.of("conv1", "conv1.norm"), FusedBasicStem, ("forward",))}
