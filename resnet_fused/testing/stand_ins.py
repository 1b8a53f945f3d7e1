"""Small networks with the structure of classes whose packages need not be here: written after their sources.

They have the module paths and names of detectron2's, OpenMMLab's and torchreid's blocks and of the CIFAR repositories'
(classes, attributes, order of calls), so that the adapters take them for those. They prove the adapters' tables against
that structure, not against the packages themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


def _stands_for(module: str) -> Callable[[type], Any]:
    """Give a class, and its methods, the module path of the one that it stands for."""

    def mark(cls: type) -> type:
        cls.__module__ = module
        for value in vars(cls).values():
            if isinstance(value, FunctionType):
                value.__module__ = module
        return cls

    return mark


@_stands_for("detectron2.layers.batch_norm")
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)  # type: ignore[arg-type]


@_stands_for("detectron2.layers.wrappers")
class Conv2d(nn.Conv2d):
    def __init__(self, *sizes: Any, norm: nn.Module | None = None, activation: Any = None) -> None:
        super().__init__(*sizes, bias=False)  # type: ignore[misc]
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


_DETECTRON2 = "detectron2.modeling.backbone.resnet"
Norm = Callable[[int], nn.Module]


def _shortcut(inplanes: int, planes: int, stride: int, norm: Norm) -> nn.Module | None:
    return None if inplanes == planes else Conv2d(inplanes, planes, 1, stride, norm=norm(planes))


@_stands_for(_DETECTRON2)
class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.shortcut = _shortcut(inplanes, planes, stride, norm)
        self.conv1 = Conv2d(inplanes, planes, 3, stride, 1, norm=norm(planes))
        self.conv2 = Conv2d(planes, planes, 3, 1, 1, norm=norm(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class _Bottleneck(nn.Module):
    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, norm: Norm = nn.BatchNorm2d, stride_in_1x1: bool = False
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _shortcut(inplanes, planes, stride, norm)
        self.conv1 = Conv2d(inplanes, planes // 4, 1, first, norm=norm(planes // 4))
        self.conv2 = Conv2d(planes // 4, planes // 4, 3, second, 1, norm=norm(planes // 4))
        self.conv3 = Conv2d(planes // 4, planes, 1, norm=norm(planes))


@_stands_for(_DETECTRON2)
class BottleneckBlock(_Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


@_stands_for(_DETECTRON2)
class DeformBottleneckBlock(_Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = self.conv3(F.relu_(self.conv2(out.roll(1, dims=2))))  # in place of the deformable convolution
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


@_stands_for(_DETECTRON2)
class BasicStem(nn.Module):
    def __init__(self, planes: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, planes, 7, 2, 3, norm=norm(planes))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class _OpenMMLab(nn.Module):
    """The blocks of mmdet and mmpretrain: two or three convolutions, norms found by name."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        *,
        style: str = "pytorch",
        avg_down: bool = False,
        with_cp: bool = False,
        plugin: nn.Module | None = None,
        norm: Norm = nn.BatchNorm2d,
        norm_name: str = "bn",
    ) -> None:
        super().__init__()
        three = type(self).__name__ == "Bottleneck"
        width = planes // 4 if three else planes
        first, second = (1, stride) if three and style == "pytorch" else (stride, 1)
        sizes = [(inplanes, width, 1 if three else 3, first), (width, width, 3, second), (width, planes, 1, 1)]
        for i, (before, after, size, step) in enumerate(sizes if three else sizes[:2], start=1):
            setattr(self, f"norm{i}_name", f"{norm_name}{i}")
            setattr(self, f"conv{i}", nn.Conv2d(before, after, size, step, size // 2, bias=False))
            self.add_module(f"{norm_name}{i}", norm(after))
        self.count = 3 if three else 2
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if avg_down else []
            conv = nn.Conv2d(inplanes, planes, 1, 1 if avg_down else stride, bias=False)
            self.downsample = nn.Sequential(*pool, conv, norm(planes))
        self.with_cp, self.with_plugins, self.plugin = with_cp, plugin is not None, plugin

    def inner(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.count + 1):
            out = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(out))
            if i < self.count:
                out = self.relu(out)
        out = out if self.plugin is None else self.plugin(out)
        drop_path = getattr(self, "drop_path", None)
        out = out if drop_path is None else drop_path(out)
        out += x if self.downsample is None else self.downsample(x)
        return out

    @property
    def norm1(self) -> Any:
        return getattr(self, self.norm1_name)  # type: ignore[call-overload]

    @property
    def norm2(self) -> Any:
        return getattr(self, self.norm2_name)  # type: ignore[call-overload]


def _openmmlab(path: str) -> tuple[Any, Any]:
    """BasicBlock and Bottleneck of the package whose module this is."""

    def forward(self: _OpenMMLab, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            out = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
        else:
            out = self.inner(x)
        return self.relu(out)  # type: ignore[no-any-return]

    made = []
    for name in ("BasicBlock", "Bottleneck"):
        own = FunctionType(forward.__code__, forward.__globals__, "forward", None, forward.__closure__)
        own.__qualname__ = f"{name}.forward"
        members: dict[str, Any] = {"forward": own}
        if name == "Bottleneck":
            members["norm3"] = property(lambda self: getattr(self, self.norm3_name))
        made.append(_stands_for(path)(type(name, (_OpenMMLab,), members)))
    return made[0], made[1]


MMDetBasicBlock, MMDetBottleneck = _openmmlab("mmdet.models.backbones.resnet")
MMPretrainBasicBlock, MMPretrainBottleneck = _openmmlab("mmpretrain.models.backbones.resnet")


class Classic(nn.Module):
    """The block that torchreid and chenyaofo's CIFAR ResNets copied from torchvision: read, not named in a table."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out  # type: ignore[no-any-return]


@_stands_for("torchreid.reid.models.resnet_ibn_a")
class IBN(nn.Module):
    """Instance norm for one half of the channels, batch norm for the other."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.first = planes // 2
        self.IN, self.BN = nn.InstanceNorm2d(self.first, affine=True), nn.BatchNorm2d(planes - self.first)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.IN(x[:, : self.first].contiguous()), self.BN(x[:, self.first :].contiguous())], 1)


class OptionA(nn.Module):
    """akamaster's LambdaLayer: every other pixel, zeros for the new channels."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))


class Cifar(nn.Module):
    """kuangliu's and akamaster's block: functional ReLU, the shortcut an empty Sequential where it does nothing."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, option: str = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inplanes != planes:
            conv = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            projection = nn.Sequential(conv, nn.BatchNorm2d(planes))
            self.shortcut = OptionA(planes - inplanes) if option == "A" else projection

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class PreAct(Cifar):
    """kuangliu's pre-activation block."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(inplanes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)  # type: ignore[no-any-return]


def _net(block: Callable[..., nn.Module], stem: Callable[[int], nn.Module] | None = None, **options: Any) -> nn.Module:
    """A stem, and two stages of two blocks each."""
    first = nn.Conv2d(3, 16, 3, 1, 1) if stem is None else stem(16)
    blocks = [block(16, 16, 1, **options), block(16, 32, 2, **options), block(32, 32, 1, **options)]
    return nn.Sequential(first, *blocks)


# By name, functions that make a network.
STAND_INS: dict[str, Callable[[], nn.Module]] = {
    "detectron2 BasicBlock": lambda: _net(BasicBlock, BasicStem),
    "detectron2 BottleneckBlock, FrozenBN, stride_in_1x1": lambda: _net(
        BottleneckBlock, lambda n: BasicStem(n, FrozenBatchNorm2d), norm=FrozenBatchNorm2d, stride_in_1x1=True
    ),
    "detectron2 DeformBottleneckBlock": lambda: _net(DeformBottleneckBlock),
    "mmdet BasicBlock": lambda: _net(MMDetBasicBlock),
    "mmdet Bottleneck": lambda: _net(MMDetBottleneck),
    "mmdet Bottleneck, caffe, avg_down": lambda: _net(MMDetBottleneck, style="caffe", avg_down=True),
    "mmdet Bottleneck, with_cp": lambda: _net(MMDetBottleneck, with_cp=True),
    "mmdet Bottleneck, plugins": lambda: _net(MMDetBottleneck, plugin=nn.Sigmoid()),
    "mmdet BasicBlock, GN": lambda: _net(MMDetBasicBlock, norm=lambda n: nn.GroupNorm(2, n), norm_name="gn"),
    "mmpretrain BasicBlock": lambda: _net(MMPretrainBasicBlock),
    "mmpretrain Bottleneck": lambda: _net(MMPretrainBottleneck),
    "torchreid, chenyaofo BasicBlock": lambda: _net(Classic),
    "torchreid IBN": lambda: _net(Classic, norm=IBN),
    "kuangliu BasicBlock": lambda: _net(Cifar),
    "akamaster BasicBlock, option A": lambda: _net(Cifar, option="A"),
    "kuangliu PreActBlock": lambda: _net(PreAct),
}
