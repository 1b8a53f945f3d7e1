"""torchvision: resnet, resnext, wide_resnet, regnet, and the backbones of its detection and segmentation models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.modules.conv_bn_relu import FusedStem, only
from resnet_fused.modules.resnet import STEM
from resnet_fused.modules.spec import BASIC_BLOCK, BOTTLENECK, BlockSpec, extended, find


def _regnet_block(with_se: bool) -> BlockAdapter:
    convs = ("f.a", "f.b", "f.c")
    spec = BlockSpec.of("f.a.0 f.b.0 f.c.0", "f.a.1 f.b.1 f.c.1", "f.a.2 f.b.2 activation", "proj")
    layer = ("torchvision.ops.misc", "Conv2dNormActivation")
    spec = extended(
        spec,
        extras=("", "f.se", "") if with_se else (),
        containers=(("f", 4 if with_se else 3), ("f.a", 3), ("f.b", 3), ("f.c", 2)),
        wrappers=(
            ("f", ("torchvision.models.regnet", "BottleneckTransform")),
            *((name, layer) for name in convs),
        ),
    )
    return BlockAdapter("bottleneck", spec)


_REGNET, _REGNET_SE = _regnet_block(False), _regnet_block(True)

BLOCKS: dict[str, BlockAdapter | Callable[[nn.Module], BlockAdapter]] = {
    "torchvision.models.resnet.BasicBlock": BlockAdapter("basic_block", BASIC_BLOCK),
    "torchvision.models.resnet.Bottleneck": BlockAdapter("bottleneck", BOTTLENECK),
    "torchvision.models.regnet.ResBottleneckBlock": lambda block: (
        _REGNET if find(block, ("f", "se")) is None else _REGNET_SE
    ),
}

REFUSED = {
    "torchvision.models.quantization.resnet.QuantizableBasicBlock": "a quantizable block, whose forward is another",
    "torchvision.models.quantization.resnet.QuantizableBottleneck": "a quantizable block, whose forward is another",
    "torchvision.models.video.resnet.BasicBlock": "a video block of three-dimensional convolutions",
    "torchvision.models.video.resnet.Bottleneck": "a video block of three-dimensional convolutions",
}


_BEHIND_STEM = ("maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")


class FusedResNet(FusedStem):
    """torchvision's ResNet with its stem as one op."""

    _rf_whole = True

    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        features = self._rf_planned(x, _BEHIND_STEM)
        if features is not None:
            return self.fc(features)  # type: ignore[no-any-return]
        if self._rf_stem_pairs(x) is None:
            return self._rf_original("_forward_impl")(x)  # type: ignore[no-any-return]
        layers = [self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4, self.avgpool]
        return self.fc(self._rf_run_features(x, layers))  # type: ignore[no-any-return]


class FusedLayerGetter(FusedStem):
    """torchvision's IntermediateLayerGetter over a ResNet, with the stem as one op."""

    return_layers: dict[str, str]

    def forward(self, *args: Any, **kwargs: Any) -> OrderedDict[str, Tensor]:
        x = only(args, kwargs)
        if _layer_getter_refusal(self) is not None or self._rf_stem_pairs(x) is None:
            return self._rf_original("forward")(*args, **kwargs)  # type: ignore[no-any-return]
        x = self._rf_run_stem(x)
        out: OrderedDict[str, Tensor] = OrderedDict()
        for name, module in self._modules.items():
            if name not in _STEM_NAMES:
                x = module(x)  # type: ignore[misc]
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out


_STEM_NAMES = ("conv1", "bn1", "relu")


def _layer_getter_refusal(module: nn.Module) -> str | None:
    if tuple(module._modules)[:3] != _STEM_NAMES:
        return "its first layers are not conv1, bn1 and relu"
    wanted: Any = module.return_layers
    if "conv1" in wanted or "bn1" in wanted:
        return "it returns a tensor from inside the stem"
    return None


STEMS = {
    "torchvision.models.resnet.ResNet": StemAdapter(STEM, FusedResNet, ("forward", "_forward_impl")),
    "torchvision.models._utils.IntermediateLayerGetter": StemAdapter(
        STEM, FusedLayerGetter, ("forward",), _layer_getter_refusal
    ),
}
