"""Small ResNets of torchvision's own class, so that stem and blocks are fused, for tests that run many of them."""

from __future__ import annotations

import torch
from torch import nn

from resnet_fused.testing.networks import randomise_norms
from resnet_fused.testing.torchvision_compat import import_torchvision

torchvision = import_torchvision()
tv = torchvision.models.resnet

CLASSES = 48


def projection(inplanes: int, planes: int, stride: int = 1) -> nn.Sequential:
    """The shortcut of a block that changes its shape."""
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def _basic() -> list[nn.Module]:
    return [tv.BasicBlock(32, 32), tv.BasicBlock(32, 64, 2, projection(32, 64, 2))]


def _bottleneck() -> list[nn.Module]:
    return [tv.Bottleneck(32, 32, 1, projection(32, 128)), tv.Bottleneck(128, 32)]


def _narrow() -> list[nn.Module]:
    """Channels that are no multiple of 32: the compiled kernels for the CPU refuse them, oneDNN takes them."""
    return [tv.BasicBlock(16, 16), tv.Bottleneck(16, 8, 2, projection(16, 32, 2))]


def _wide() -> list[nn.Module]:
    """On images of 16 pixels bfloat16 takes Winograd's algorithm as float32 does."""
    return [tv.BasicBlock(64, 64)]


# The stem's channels, whether it pools, and the blocks.
KINDS = {"basic": (32, True, _basic), "bottleneck": (32, True, _bottleneck), "narrow": (16, True, _narrow),
         "wide": (64, False, _wide)}  # fmt: skip


def network(kind: str = "basic", seed: int = 0) -> nn.Module:
    """A ResNet of one or two blocks in eval mode, for images of 8 pixels and more."""
    width, pools, blocks = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tv.ResNet.__new__(tv.ResNet)
        nn.Module.__init__(model)
        model.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        model.bn1, model.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        model.maxpool = nn.MaxPool2d(3, 2, 1) if pools else nn.Identity()
        made = blocks()
        for at in range(4):
            setattr(model, f"layer{at + 1}", nn.Sequential(*made[at : at + 1]))
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        last = made[-1]
        features = (last.conv3 if isinstance(last, tv.Bottleneck) else last.conv2).out_channels
        model.fc = nn.Linear(features, CLASSES)
        return randomise_norms(model, seed).eval()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The residual blocks, fused or not."""
    return [m for m in model.modules() if isinstance(m, (tv.BasicBlock, tv.Bottleneck))]


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def convs_of(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def images(n: int = 2, size: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
