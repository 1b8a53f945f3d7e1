"""Hugging Face transformers: ResNet and RT-DETR's backbone. DETR's others are timm's, under frozen norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resnet_fused.fusion.adapters.table import BlockAdapter, StemAdapter
from resnet_fused.modules.conv_bn_relu import FusedStem, only
from resnet_fused.modules.spec import BlockSpec, extended

_MODULES = {
    "transformers.models.resnet.modeling_resnet": "ResNet",
    "transformers.models.rt_detr.modeling_rt_detr_resnet": "RTDetrResNet",
}


def _block(length: int, conv_layer: tuple[str, str]) -> BlockSpec:
    layers = [f"layer.{i}" for i in range(length)]
    return extended(
        BlockSpec.of(
            " ".join(f"{name}.convolution" for name in layers),
            " ".join(f"{name}.normalization" for name in layers),
            " ".join([*(f"{name}.activation" for name in layers[:-1]), "activation"]),
            "shortcut",
            f"{layers[-1]}.activation",
        ),
        containers=(("layer", length),),
        wrappers=tuple((name, conv_layer) for name in layers),
        optional="",
        adds="+=",
    )


class FusedEmbeddings(FusedStem):
    """The embeddings, which are the stem and its pool, with the stem fused."""

    num_channels: int
    pooler: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only(args, kwargs)
        if self._rf_stem_pairs(x) is None or x.shape[1] != self.num_channels:
            return self._rf_original("forward")(*args, **kwargs)  # type: ignore[no-any-return]
        return self.pooler(self._rf_run_stem(x))  # type: ignore[no-any-return]


def _stem(conv_layer: tuple[str, str], names: tuple[str, ...]) -> StemAdapter:
    spec = BlockSpec.of(
        " ".join(f"{name}.convolution" for name in names),
        " ".join(f"{name}.normalization" for name in names),
        " ".join(f"{name}.activation" for name in names),
    )
    containers = (("embedder", len(names)),) if len(names) > 1 else ()
    wrappers = tuple((name, conv_layer) for name in names)
    return StemAdapter(extended(spec, containers=containers, wrappers=wrappers), FusedEmbeddings, ("forward",))


BLOCKS: dict[str, BlockAdapter] = {}
for _module, _prefix in _MODULES.items():
    _layer = (_module, f"{_prefix}ConvLayer")
    BLOCKS[f"{_module}.{_prefix}BasicLayer"] = BlockAdapter("basic_block", _block(2, _layer))
    BLOCKS[f"{_module}.{_prefix}BottleNeckLayer"] = BlockAdapter("bottleneck", _block(3, _layer))

STEMS = {
    "transformers.models.resnet.modeling_resnet.ResNetEmbeddings": _stem(
        ("transformers.models.resnet.modeling_resnet", "ResNetConvLayer"), ("embedder",)
    ),
    "transformers.models.rt_detr.modeling_rt_detr_resnet.RTDetrResNetEmbeddings": _stem(
        ("transformers.models.rt_detr.modeling_rt_detr_resnet", "RTDetrResNetConvLayer"),
        ("embedder.0", "embedder.1", "embedder.2"),
    ),
}
