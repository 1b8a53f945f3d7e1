"""Families of one line each: MONAI in two dimensions, and refused relatives.

torchreid, chenyaofo's, kuangliu's and akamaster's CIFAR ResNets need no table: their forward is read (``source.py``).
"""

from __future__ import annotations

from resnet_fused.fusion.adapters.table import BlockAdapter
from resnet_fused.modules.spec import BlockSpec, extended

BLOCKS = {
    "monai.networks.nets.resnet.ResNetBlock": BlockAdapter(
        "basic_block", extended(BlockSpec.of("conv1 conv2", "bn1 bn2", "act", "downsample"), adds="+=")
    ),
    "monai.networks.nets.resnet.ResNetBottleneck": BlockAdapter(
        "bottleneck", extended(BlockSpec.of("conv1 conv2 conv3", "bn1 bn2 bn3", "act", "downsample"), adds="+=")
    ),
}
