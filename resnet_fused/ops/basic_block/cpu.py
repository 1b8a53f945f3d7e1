"""basic_block by this project's C++ kernels for the CPU, with oneDNN for the convolutions that they do not take."""

from resnet_fused.ops.block_cpu import bind_cpu as bind
from resnet_fused.ops.block_cpu import supports_cpu as supports

__all__ = ["bind", "supports"]
