"""The op resnet_fused::basic_block: two convolutions (3x3, 3x3 in a ResNet) and the shortcut, as one call."""

from resnet_fused.ops import block

call_op = block.register("basic_block", depth=2)
