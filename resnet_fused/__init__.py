"""Fused residual blocks for PyTorch ResNets: the same numbers, the same state_dict, less time."""

from resnet_fused.backends import Backend, BackendError, PerformanceWarning
from resnet_fused.extension import library_path
from resnet_fused.functional import ConvBN, add_relu, basic_block, bottleneck, conv_bn_act
from resnet_fused.fusion import (
    FusionEntry,
    FusionError,
    FusionReport,
    explain,
    fuse,
    fuse_,
    is_fused,
    register_adapter,
    report,
    unfuse,
    verify,
)
from resnet_fused.modules import (
    FusedBasicBlock,
    FusedBottleneck,
    FusedConvBNReLU,
    FusedModule,
    ResidualBlock,
    ResNet,
    refresh,
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
    warmup,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fused.ops.workspace import clear_workspace
from resnet_fused.registry import register_backend, unregister_backend

__version__ = "0.1.0"

__all__ = [
    "Backend", "BackendError", "ConvBN", "FusedBasicBlock", "FusedBottleneck", "FusedConvBNReLU", "FusedModule",
    "FusionEntry", "FusionError", "FusionReport", "PerformanceWarning", "ResNet", "ResidualBlock", "add_relu",
    "basic_block", "bottleneck", "clear_workspace", "conv_bn_act", "explain", "fuse", "fuse_", "is_fused",
    "library_path", "refresh", "register_adapter", "register_backend", "report", "resnet18", "resnet20", "resnet32",
    "resnet34", "resnet44", "resnet50", "resnet56", "resnet101", "resnet110", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "unfuse", "unregister_backend", "verify", "warmup", "wide_resnet50_2",
    "wide_resnet101_2",
]  # fmt: skip
