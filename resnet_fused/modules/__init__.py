"""Modules that run as fused ops: blocks, the convolution with its norm, and ResNets made of them."""

from resnet_fused.modules.base import FusedModule, refresh
from resnet_fused.modules.blocks import FusedBasicBlock, FusedBottleneck, ResidualBlock
from resnet_fused.modules.conv_bn_relu import FusedConvBNReLU
from resnet_fused.modules.resnet import (
    ResNet,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fused.modules.warmup import warmup

__all__ = [
    "FusedBasicBlock", "FusedBottleneck", "FusedConvBNReLU", "FusedModule", "ResNet", "ResidualBlock", "refresh",
    "resnet18", "resnet20", "resnet32", "resnet34", "resnet44", "resnet50", "resnet56", "resnet101", "resnet110",
    "resnet152", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "warmup", "wide_resnet50_2",
    "wide_resnet101_2",
]  # fmt: skip
