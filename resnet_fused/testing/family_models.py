"""Models of each family with random weights and small images; a family's package is imported with its models."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.testing.models import load

MOST_PARAMETERS = 100_000_000  # larger ones have no other blocks than these

Run = Callable[[nn.Module, Tensor], Any]


def _call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


@dataclass(frozen=True)
class Candidate:
    """A model to try: how it is made, what shape of images it gets, and how it is run on them.

    Several images, and outputs of many numbers: the largest of a few rounding errors is a matter of luck.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 64, 64)
    run: Run = _call


@dataclass(frozen=True)
class Family:
    """Models that share their classes of blocks, and the packages that they need."""

    packages: tuple[str, ...]
    models: Callable[[], list[Candidate]]


def _named(source: str, *names: str, run: Run = _call, size: int = 64, batch: int = 2) -> list[Candidate]:
    shape = (batch, 3, size, size)
    return [Candidate(f"{source}:{name}", functools.partial(load, f"{source}:{name}"), shape, run) for name in names]


def _ours() -> list[Candidate]:
    names = ("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet20", "resnet56")
    return [Candidate(name, functools.partial(load, name)) for name in names]


def _torchvision() -> list[Candidate]:
    numbers = (18, 34, 50, 101, 152)
    others = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
    return _named("torchvision", *(f"resnet{n}" for n in numbers), *others)


def _torchvision_regnet() -> list[Candidate]:
    sizes = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf")
    return _named("torchvision", *(f"regnet_{kind}_{size}" for kind in "xy" for size in sizes))


def _torchvision_segmentation() -> list[Candidate]:
    names = ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101")
    return _named("torchvision", *names, batch=2)


def _torchvision_detection() -> list[Candidate]:
    """Their backbones with pyramid: what comes after chooses among boxes, which no error budget describes.

    The builders freeze the norms of the first versions only where they download weights, so here it is done to them.
    """

    def run(model: nn.Module, x: Tensor) -> Any:
        return model.backbone(x)  # type: ignore[operator]

    def frozen(name: str) -> nn.Module:
        model = load(f"torchvision:{name}")
        norm = importlib.import_module("torchvision.ops").FrozenBatchNorm2d
        for parent in list(model.backbone.body.modules()):  # type: ignore[union-attr]
            for own, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, own, norm(child.num_features, eps=0.0))  # their weights were trained with this eps
        return model.eval()

    first = ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
    first += ["retinanet_resnet50_fpn", "fcos_resnet50_fpn"]
    second = ["fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2"]
    return [
        *_named("torchvision", *first, *second, run=run, size=128),
        *(
            Candidate(f"torchvision:{name}, frozen norms", functools.partial(frozen, name), (2, 3, 128, 128), run)
            for name in first
        ),
    ]


def _package(name: str) -> Any:
    """A package that may import torchvision, which needs help beside a CPU-only torch."""
    from resnet_fused.testing.torchvision_compat import import_torchvision

    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    return importlib.import_module(name)


def _timm(*modules: str) -> list[Candidate]:
    timm = _package("timm")
    names = [name for module in modules for name in timm.list_models(module=module) if _is_small(timm, name)]
    return _named("timm", *names, size=96)


def _is_small(timm: Any, name: str) -> bool:
    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(int(p.numel()) for p in model.parameters()) <= MOST_PARAMETERS


def _huggingface() -> list[Candidate]:
    transformers = _package("transformers")

    def make(depths: list[int], kind: str, **options: Any) -> nn.Module:
        config = transformers.ResNetConfig(depths=depths, layer_type=kind, num_labels=100, **options)
        return transformers.ResNetForImageClassification(config)  # type: ignore[no-any-return]

    thin = {"hidden_sizes": [64, 128, 256, 512]}
    return [
        Candidate("ResNet-18", functools.partial(make, [2, 2, 2, 2], "basic", **thin)),
        Candidate("ResNet-34", functools.partial(make, [3, 4, 6, 3], "basic", **thin)),
        Candidate("ResNet-50", functools.partial(make, [3, 4, 6, 3], "bottleneck")),
        Candidate("ResNet-50 v1", functools.partial(make, [3, 4, 6, 3], "bottleneck", downsample_in_bottleneck=True)),
        Candidate("ResNet-101", functools.partial(make, [3, 4, 23, 3], "bottleneck")),
        Candidate("ResNet-18 silu", functools.partial(make, [2, 2, 2, 2], "basic", hidden_act="silu", **thin)),
    ]


def _detr() -> list[Candidate]:
    transformers = _package("transformers")
    rt_detr = _package("transformers.models.rt_detr.modeling_rt_detr")
    backbones = _package("transformers.models.rt_detr.modeling_rt_detr_resnet")
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}

    def detr(name: str) -> nn.Module:
        backbone = transformers.ResNetConfig(depths=[3, 4, 6, 3], out_features=["stage4"])
        config = getattr(transformers, f"{name}Config")(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            **small, **heads,
        )  # fmt: skip
        return getattr(transformers, f"{name}ForObjectDetection")(config)  # type: ignore[no-any-return]

    def rt(kind: str, depths: list[int], sizes: list[int], frozen: bool) -> nn.Module:
        config = transformers.RTDetrResNetConfig(layer_type=kind, depths=depths, hidden_sizes=sizes)
        model: nn.Module = backbones.RTDetrResNetBackbone(config)
        if frozen:
            with torch.no_grad():
                rt_detr.replace_batch_norm(model)
        return model

    wide, thin = [256, 512, 1024, 2048], [64, 128, 256, 512]
    return [
        *(Candidate(name, functools.partial(detr, name)) for name in ("Detr", "ConditionalDetr")),
        Candidate("RT-DETR r18", functools.partial(rt, "basic", [2, 2, 2, 2], thin, True)),
        Candidate("RT-DETR r50", functools.partial(rt, "bottleneck", [3, 4, 6, 3], wide, True)),
        Candidate("RT-DETR r50, batch norm", functools.partial(rt, "bottleneck", [3, 4, 6, 3], wide, False)),
    ]


def _smp() -> list[Candidate]:
    smp = _package("segmentation_models_pytorch")
    kinds = ("Unet", "FPN", "Linknet", "PSPNet", "UnetPlusPlus")
    models: list[tuple[str, str, dict[str, Any]]] = [(name, "resnet18", {}) for name in kinds]
    models += [("Unet", name, {}) for name in ("resnet34", "resnet50", "resnext50_32x4d", "se_resnet50")]
    models += [("DeepLabV3", "resnet50", {"encoder_output_stride": 8}), ("DeepLabV3Plus", "resnet34", {})]
    return [
        Candidate(f"{name}({encoder})", functools.partial(getattr(smp, name), encoder, encoder_weights=None, **options))
        for name, encoder, options in models
    ]  # fmt: skip


def _open_clip() -> list[Candidate]:
    cls = _package("open_clip.modified_resnet").ModifiedResNet
    models = [("RN50", [3, 4, 6, 3], 1024, 64), ("RN101", [3, 4, 23, 3], 512, 64), ("RN50x4", [4, 6, 10, 6], 640, 80)]
    return [
        Candidate(name, functools.partial(cls, layers, dim, 32, image_size=64, width=width))
        for name, layers, dim, width in models
    ]


def _monai() -> list[Candidate]:
    module = _package("monai.networks.nets.resnet")
    names = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101")

    def make(name: str, **options: Any) -> nn.Module:
        return getattr(module, name)(n_input_channels=3, num_classes=100, **options)  # type: ignore[no-any-return]

    flat = [Candidate(f"{n} 2-D", functools.partial(make, n, spatial_dims=2, conv1_t_stride=2)) for n in names]
    deep = Candidate("resnet10 3-D", functools.partial(make, "resnet10", spatial_dims=3), (2, 3, 16, 16, 16))
    option_a = functools.partial(make, "resnet10", spatial_dims=2, shortcut_type="A", conv1_t_stride=2)
    return [*flat, deep, Candidate("resnet10 2-D, shortcut A", option_a)]


def _stand_ins() -> list[Candidate]:
    from resnet_fused.testing.stand_ins import STAND_INS

    return [Candidate(name, make, (2, 3, 48, 48)) for name, make in STAND_INS.items()]


FAMILIES: dict[str, Family] = {
    "resnet_fused's own": Family((), _ours),
    "torchvision": Family(("torchvision",), _torchvision),
    "torchvision RegNet": Family(("torchvision",), _torchvision_regnet),
    "torchvision segmentation": Family(("torchvision",), _torchvision_segmentation),
    "torchvision detection (backbones with FPN)": Family(("torchvision",), _torchvision_detection),
    "timm resnet": Family(("timm", "torchvision"), functools.partial(_timm, "resnet")),
    "timm senet": Family(("timm", "torchvision"), functools.partial(_timm, "senet")),
    "timm res2net, resnest, sknet, resnetv2": Family(
        ("timm", "torchvision"), functools.partial(_timm, "res2net", "resnest", "sknet", "resnetv2")
    ),
    "transformers ResNet": Family(("transformers",), _huggingface),
    "transformers DETR, RT-DETR": Family(("transformers",), _detr),
    "segmentation_models_pytorch": Family(("segmentation_models_pytorch", "torchvision"), _smp),
    "open_clip ModifiedResNet": Family(("open_clip", "torchvision"), _open_clip),
    "MONAI": Family(("monai",), _monai),
    "detectron2, OpenMMLab, torchreid, CIFAR (stand-ins)": Family((), _stand_ins),
}
