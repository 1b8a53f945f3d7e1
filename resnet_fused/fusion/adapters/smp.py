"""segmentation_models_pytorch: its ResNet encoders, whose blocks are torchvision's, and its SENets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.fusion.adapters.timm import SENET_BOTTLENECK
from resnet_fused.modules.conv_bn_relu import FusedStem, only
from resnet_fused.modules.resnet import STEM

BLOCKS = {"segmentation_models_pytorch.encoders._senet.Bottleneck": BlockAdapter("bottleneck", SENET_BOTTLENECK)}


class FusedEncoder(FusedStem):
    """The ResNet encoder with its stem as one op: it gives the features of each stage."""

    _depth: int
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        x = only(args, kwargs)
        if self._rf_stem_pairs(x) is None:
            return self._rf_original("forward")(*args, **kwargs)  # type: ignore[no-any-return]
        features = [x, self._rf_run_stem(x)]
        stages = [[self.maxpool, self.layer1], [self.layer2], [self.layer3], [self.layer4]]
        for stage in stages[: self._depth - 1]:
            hidden = features[-1]
            for layer in stage:
                hidden = layer(hidden)
            features.append(hidden)
        return features


STEMS = {
    "segmentation_models_pytorch.encoders.resnet.ResNetEncoder": StemAdapter(STEM, FusedEncoder, ("forward",)),
}
