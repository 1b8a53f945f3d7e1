"""basic_block by oneDNN on the CPU."""

from resnet_fused.ops.block_onednn import run, supports

__all__ = ["run", "supports"]
