"""Fusing the residual blocks of an existing model, and undoing it."""

from resnet_fused.fusion.adapters import register_adapter
from resnet_fused.fusion.api import FusionError, explain, fuse, fuse_, is_fused, report, unfuse
from resnet_fused.fusion.report import FusionEntry, FusionReport
from resnet_fused.fusion.verify import verify

__all__ = [
    "FusionEntry", "FusionError", "FusionReport", "explain", "fuse", "fuse_", "is_fused", "register_adapter", "report",
    "unfuse", "verify",
]  # fmt: skip
