"""open_clip: the ResNets of CLIP, with average pools where others have strides."""

from __future__ import annotations

from torch import Tensor, nn

from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.spec import BlockSpec, extended

BLOCKS = {
    "open_clip.modified_resnet.Bottleneck": BlockAdapter(
        "bottleneck",
        extended(
            BlockSpec.of("conv1 conv2 conv3", "bn1 bn2 bn3", "act1 act2 act3", "downsample"),
            extras=("", "avgpool", ""),
            adds="+=",
        ),
    ),
}


class FusedModifiedResNet(FusedStem):
    """CLIP's ResNet with its stem of three convolutions fused."""

    avgpool: nn.Module

    def stem(self, x: Tensor) -> Tensor:
        if self._rf_stem_pairs(x) is None:
            return self._rf_original("stem")(x)  # type: ignore[no-any-return]
        return self.avgpool(self._rf_run_stem(x))  # type: ignore[no-any-return]


STEMS = {
    "open_clip.modified_resnet.ModifiedResNet": StemAdapter(
        BlockSpec.of("conv1 conv2 conv3", "bn1 bn2 bn3", "act1 act2 act3"), FusedModifiedResNet, ("forward", "stem")
    ),
}
