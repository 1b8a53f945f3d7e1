"""bottleneck by this project's C++ kernels for the CPU, the whole block in one call."""

from resnet_fused.ops.block_cpu import bind_cpu as bind
from resnet_fused.ops.block_cpu import supports_cpu as supports

__all__ = ["bind", "supports"]
