"""The op resnet_fused::bottleneck: three convolutions (1x1, 3x3, 1x1 in a ResNet) and the shortcut, as one call."""

from resnet_fused.ops import block

call_op = block.register("bottleneck", depth=3)
