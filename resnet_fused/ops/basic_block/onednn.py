"""basic_block by oneDNN on the CPU."""

from resnet_fused.ops.block_cpu import run_onednn as run
from resnet_fused.ops.block_cpu import supports_onednn as supports

__all__ = ["run", "supports"]
