"""bottleneck by oneDNN on the CPU."""

from resnet_fused.ops.block_cpu import bind_onednn as bind
from resnet_fused.ops.block_cpu import supports_onednn as supports

__all__ = ["bind", "supports"]
