"""ResNets of fused blocks, with torchvision's options, initialisation and state_dict keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from resnet_fused.modules.blocks import FusedBasicBlock, FusedBottleneck, Norm, conv1x1
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.spec import BlockSpec, FusedState

STEM = BlockSpec.of("conv1", "bn1", "relu")


class ResNet(FusedStem):
    """A ResNet of any residual blocks.

    Args:
        block: makes a block from ``(inplanes, planes, stride, downsample)``; ``groups``, ``base_width``, ``dilation``
            and ``norm_layer`` follow by keyword where they are not the defaults. Its attribute ``expansion`` is the
            ratio of channels out to ``planes``.
        layers: number of blocks of each stage.
        num_classes: outputs of the classifier.
        zero_init_residual: start with each block's last norm at zero.
        groups, width_per_group: of the blocks.
        replace_stride_with_dilation: for each stage but the first, whether to dilate in place of striding.
        norm_layer: makes a norm from a number of channels; nn.BatchNorm2d when None.
        planes: ``planes`` of each stage; the stem has as many channels as the first.
        small_images: a 3×3 stem without stride or pooling, for images such as CIFAR's.

    Input ``[N, 3, H, W]`` of any size, output ``[N, num_classes]``.

    Raises:
        ValueError: ``replace_stride_with_dilation`` or ``planes`` has not one entry per stage as above.
    """

    _rf_whole = True

    def __init__(
        self,
        block: Callable[..., nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
        *,
        planes: Sequence[int] = (64, 128, 256, 512),
        small_images: bool = False,
    ) -> None:
        super().__init__()
        dilate = [False] * (len(layers) - 1) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != len(layers) - 1:
            raise ValueError(
                f"replace_stride_with_dilation: got {replace_stride_with_dilation}, need {len(layers) - 1} entries, "
                "one for each stage but the first"
            )
        planes = planes[: len(layers)]
        if len(planes) != len(layers):
            raise ValueError(f"planes: got {len(planes)} entries, need {len(layers)}, one for each stage in layers")
        self._rf_state = FusedState(STEM)
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = planes[0]
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        size, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(3, self.inplanes, size, stride, size // 2, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        self.stages = tuple(f"layer{i}" for i in range(1, len(layers) + 1))
        for i, name in enumerate(self.stages):
            stage = self._stage(block, planes[i], layers[i], *((1, False) if i == 0 else (2, dilate[i - 1])))
            self.add_module(name, stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._initialise(zero_init_residual)

    def _stage(self, block: Any, planes: int, blocks: int, stride: int, dilate: bool) -> nn.Sequential:
        expansion, before = getattr(block, "expansion", 1), self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != planes * expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * expansion, stride), self._norm_layer(planes * expansion)
            )
        stage = [block(self.inplanes, planes, stride, downsample, **self._options(before))]
        self.inplanes = planes * expansion
        stage += [block(self.inplanes, planes, **self._options(self.dilation)) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def _options(self, dilation: int) -> dict[str, Any]:
        """The block's constructor arguments beyond the four that every residual block takes."""
        given = {"groups": self.groups, "base_width": self.base_width, "dilation": dilation}
        default = {"groups": 1, "base_width": 64, "dilation": 1}
        options: dict[str, Any] = {name: value for name, value in given.items() if value != default[name]}
        if self._norm_layer is not nn.BatchNorm2d:
            options["norm_layer"] = self._norm_layer
        return options

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if not zero_init_residual:
            return
        for m in self.modules():
            last = getattr(m, "bn3", None) if isinstance(m, FusedBottleneck) else None
            last = getattr(m, "bn2", None) if isinstance(m, FusedBasicBlock) else last
            if last is not None and last.weight is not None:
                nn.init.constant_(last.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        features = self._rf_planned(x, ("maxpool", *self.stages, "avgpool"))
        if features is None:
            stages: Any = [self._modules[name] for name in self.stages]
            features = self._rf_run_features(x, [self.maxpool, *stages, self.avgpool])
        return self.fc(features)  # type: ignore[no-any-return]


def resnet18(**options: Any) -> ResNet:
    """ResNet-18; ``options`` are those of :class:`ResNet`, here and below."""
    return ResNet(FusedBasicBlock, [2, 2, 2, 2], **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34."""
    return ResNet(FusedBasicBlock, [3, 4, 6, 3], **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50, v1.5."""
    return ResNet(FusedBottleneck, [3, 4, 6, 3], **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101, v1.5."""
    return ResNet(FusedBottleneck, [3, 4, 23, 3], **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152, v1.5."""
    return ResNet(FusedBottleneck, [3, 8, 36, 3], **options)


def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50 with 32 groups of width 4."""
    return resnet50(**{"groups": 32, "width_per_group": 4, **options})


def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101 with 32 groups of width 8."""
    return resnet101(**{"groups": 32, "width_per_group": 8, **options})


def resnext101_64x4d(**options: Any) -> ResNet:
    """ResNeXt-101 with 64 groups of width 4."""
    return resnet101(**{"groups": 64, "width_per_group": 4, **options})


def wide_resnet50_2(**options: Any) -> ResNet:
    """Wide ResNet-50-2: twice the channels inside each bottleneck."""
    return resnet50(**{"width_per_group": 128, **options})


def wide_resnet101_2(**options: Any) -> ResNet:
    """Wide ResNet-101-2: twice the channels inside each bottleneck."""
    return resnet101(**{"width_per_group": 128, **options})


def _cifar(blocks: int, options: dict[str, Any]) -> ResNet:
    defaults = {"num_classes": 10, "planes": (16, 32, 64), "small_images": True}
    return ResNet(FusedBasicBlock, [blocks] * 3, **{**defaults, **options})


def resnet20(**options: Any) -> ResNet:
    """ResNet-20 for CIFAR: three stages of 16, 32 and 64 channels, ten classes; so are those below."""
    return _cifar(3, options)


def resnet32(**options: Any) -> ResNet:
    """ResNet-32 for CIFAR."""
    return _cifar(5, options)


def resnet44(**options: Any) -> ResNet:
    """ResNet-44 for CIFAR."""
    return _cifar(7, options)


def resnet56(**options: Any) -> ResNet:
    """ResNet-56 for CIFAR."""
    return _cifar(9, options)


def resnet110(**options: Any) -> ResNet:
    """ResNet-110 for CIFAR."""
    return _cifar(18, options)
