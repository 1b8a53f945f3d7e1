"""Classes of other packages whose parts may be bypassed, by module path and name: none of them is imported here."""

from __future__ import annotations

Name = tuple[str, str]


def _huggingface(*names: str) -> dict[Name, float | None]:
    """DETR's copies, one per model; their eps is written in their forward."""
    table: dict[Name, float | None] = {}
    for entry in names:
        model, prefix = entry.split(":")
        table[f"transformers.models.{model}.modeling_{model}", f"{prefix}FrozenBatchNorm2d"] = 1e-5
    return table


# Classes that normalise with given statistics, in training mode too: buffers weight, bias, running_mean, running_var;
# eps as here, or where this is None their attribute eps, read at each call.
FROZEN_NORMS: dict[Name, float | None] = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): None,
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"): None,
    **_huggingface(
        "detr:Detr",
        "conditional_detr:ConditionalDetr",
        "deformable_detr:DeformableDetr",
        "dab_detr:DabDetr",
        "table_transformer:TableTransformer",
        "grounding_dino:GroundingDino",
        "mm_grounding_dino:MMGroundingDino",
        "rt_detr:RTDetr",
        "rt_detr_v2:RTDetrV2",
    ),
}

# Subclasses of nn.Conv2d whose forward is its own convolution, then their child ``norm``, then ``activation`` if any.
NORMED_CONVS: frozenset[Name] = frozenset({("detectron2.layers.wrappers", "Conv2d")})

# Modules that only call a convolution and then a norm: where the two are, and they have no other children.
PROJECTIONS: dict[Name, tuple[str, str]] = {
    ("torchvision.ops.misc", "Conv2dNormActivation"): ("0", "1"),
    ("transformers.models.resnet.modeling_resnet", "ResNetShortCut"): ("convolution", "normalization"),
    ("transformers.models.rt_detr.modeling_rt_detr_resnet", "RTDetrResNetShortCut"): ("convolution", "normalization"),
}

# Modules that give a new tensor and do nothing else, beside PyTorch's own.
PURE: frozenset[Name] = frozenset({
    ("timm.layers.blur_pool", "BlurPool2d"),
    ("timm.layers.pool2d_same", "AvgPool2dSame"),
    ("timm.layers.pool2d_same", "MaxPool2dSame"),
})  # fmt: skip


def name_of(cls: type) -> Name:
    """The name that ``cls`` stands under in these tables."""
    return cls.__module__, cls.__qualname__
