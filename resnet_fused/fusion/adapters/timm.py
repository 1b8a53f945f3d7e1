"""timm: its resnet family (ResNet, ResNeXt, SE, ECA, RS, aa, d …) and its older senets."""

from __future__ import annotations

from torch import Tensor, nn

from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.spec import BlockSpec, extended

BASIC = extended(
    BlockSpec.of("conv1 conv2", "bn1 bn2", "act1 act2", "downsample", "drop_block"),
    extras=("aa", "se drop_path"),
    adds="+=",
)
BOTTLENECK = extended(
    BlockSpec.of("conv1 conv2 conv3", "bn1 bn2 bn3", "act1 act2 act3", "downsample", "drop_block"),
    extras=("", "aa", "se drop_path"),
    adds="+=",
)
SENET_BOTTLENECK = extended(
    BlockSpec.of("conv1 conv2 conv3", "bn1 bn2 bn3", "relu", "downsample"), extras=("", "", "se_module"), adds="+"
)  # fmt: skip

BLOCKS = {
    "timm.models.resnet.BasicBlock": BlockAdapter("basic_block", BASIC),
    "timm.models.resnet.Bottleneck": BlockAdapter("bottleneck", BOTTLENECK),
    "timm.models.senet.Bottleneck": BlockAdapter("bottleneck", SENET_BOTTLENECK),
}

REFUSED = {
    "timm.models.senet.SEResNetBlock": "it applies ReLU before its squeeze-excitation",
    "timm.models.res2net.Bottle2neck": "a Res2Net block, which splits the channels of its second convolution",
    "timm.models.resnest.ResNestBottleneck": "a ResNeSt block, with split attention",
    "timm.models.sknet.SelectiveKernelBasic": "a selective-kernel block, whose first convolution attends to two",
    "timm.models.sknet.SelectiveKernelBottleneck": "a selective-kernel block, whose second convolution attends to two",
    "timm.models.resnetv2.PreActBasic": "a pre-activation block: norm and activation stand before a convolution",
    "timm.models.resnetv2.PreActBottleneck": "a pre-activation block: norm and activation stand before a convolution",
    "timm.models.resnetv2.Bottleneck": "a ResNetV2 block, whose norms contain the activation",
}


class FusedResNet(FusedStem):
    """timm's ResNet with its stem fused."""

    grad_checkpointing: bool
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def forward_features(self, x: Tensor) -> Tensor:
        if self._rf_stem_pairs(x) is None or self.grad_checkpointing:
            return self._rf_original("forward_features")(x)  # type: ignore[no-any-return]
        x = self._rf_run_stem(x)
        for layer in (self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x


_METHODS = ("forward", "forward_features")
_STEM = StemAdapter(BlockSpec.of("conv1", "bn1", "act1"), FusedResNet, _METHODS)
_DEEP_STEM = StemAdapter(
    extended(
        BlockSpec.of("conv1.0 conv1.3 conv1.6", "conv1.1 conv1.4 bn1", "conv1.2 conv1.5 act1"),
        containers=(("conv1", 7),),
    ),
    FusedResNet,
    _METHODS,
)


def _stem(model: nn.Module) -> StemAdapter:
    return _DEEP_STEM if isinstance(model._modules.get("conv1"), nn.Sequential) else _STEM


STEMS = {"timm.models.resnet.ResNet": _stem}
