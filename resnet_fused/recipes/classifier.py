"""A classifier with all that belongs to it: its weights, the transform of its images, the names of its classes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn

import resnet_fused
from resnet_fused.testing import models
from resnet_fused.testing.torchvision_compat import import_torchvision
from resnet_fused.training import checkpoint, images, transfer
from resnet_fused.training.data import DIGITS, evaluation_transform
from resnet_fused.training.errors import CheckpointError
from resnet_fused.training.loop import logits_of

MAX_SIZE = 2048  # of the images that a trained file may ask for

import_torchvision()  # before another process unpickles anything of it: beside a CPU-only torch it needs help


@dataclass(frozen=True)
class Decoder:
    """From the bytes of an image file to a model's input ``[C, H, W]``, by ``transform`` of the PIL image."""

    transform: Callable[[Any], Tensor]

    def __call__(self, data: bytes) -> Tensor:
        """The input.

        Raises:
            ImageError: ``data`` is no image that :func:`resnet_fused.training.images.decode` takes: a ValueError.
        """
        return self.transform(images.decode(data))

    def file(self, path: Path) -> Tensor:
        """The input from the image in a file.

        Raises:
            ImageError: it is none that :func:`resnet_fused.training.images.read` takes: a ValueError.
        """
        return self.transform(images.read(path))

    def blank(self) -> Tensor:
        """The input from a black image."""
        return self.transform(Image.new("RGB", (64, 64)))


class Classifier(NamedTuple):
    """An eager model in eval mode, what makes its input, and the names of its classes."""

    model: nn.Module
    decode: Decoder
    classes: Sequence[str]


class Predictor:
    """A fused copy of a classifier's model, ready for batches of up to ``batch`` images: one for each process.

    On the GPU that the process sees, else on the CPU.
    """

    def __init__(self, classifier: Classifier, batch: int) -> None:
        self.classes = classifier.classes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = resnet_fused.fuse(classifier.model).to(self.device)
        resnet_fused.warmup(self.model, self._batch([classifier.decode.blank()] * batch))

    def __call__(self, images: Sequence[Tensor]) -> list[tuple[str, float]]:
        """The best class of each image, and its probability."""
        with torch.inference_mode():
            best = logits_of(self.model(self._batch(images))).softmax(1).max(1)
        names = (self.classes[i] for i in best.indices.tolist())
        return list(zip(names, best.values.tolist(), strict=True))

    def _batch(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(images)).to(self.device, memory_format=torch.channels_last)


def load(model: str, weights: str | None = None) -> Classifier:
    """The classifier that ``model`` and ``weights`` name.

    Args:
        model: ``torchvision:NAME``, ``timm:NAME`` or another form that ``resnet-fused check`` takes; or the
            ``model.safetensors`` that ``resnet-fused train`` wrote, which holds everything. A file runs no code: where
            it was trained as ``package.module:callable``, give that as ``model`` and the file as ``weights``.
        weights: a file (safetensors, or a state_dict by ``torch.save``); or the name of weights that torchvision or
            timm downloads (``DEFAULT``; torchvision: ``IMAGENET1K_V1``, …). Not with a trained file.

    Raises:
        ModelError: the model, or weights of that name, do not exist, or no weights are given.
        CheckpointError: a file cannot be read or does not fit.
    """
    if model.endswith(".safetensors"):
        return cast(Classifier, _trained(Path(model)))
    if weights is None:
        raise models.ModelError(f"{model}: need weights, a file or the name of some to download")
    source, _, name = model.partition(":")
    if name and source not in ("torchvision", "timm") and weights.endswith(".safetensors"):
        trained = _trained(Path(weights), named=model)
        if trained is not None:
            return trained
    if Path(weights).suffix:
        network = models.load(model)
        _load_weights(network, Path(weights))
    else:
        network = _downloaded(source, name, weights)
    if source == "timm":
        data = importlib.import_module("timm.data")
        transform = data.create_transform(**data.resolve_model_data_config(network))
        return Classifier(network, Decoder(transform), _numbers(network))
    if source == "torchvision":
        known = importlib.import_module("torchvision").models.get_model_weights(name).__members__
        of = known.get(weights, known["DEFAULT"])
        names = of.meta["categories"]
        network_has = _numbers(network)
        return Classifier(network, Decoder(of.transforms()), names if len(names) == len(network_has) else network_has)
    channels, size = models.input_shape(model, network)
    return Classifier(network, Decoder(evaluation_transform(size, channels)), _numbers(network))


def _trained(path: Path, named: str | None = None) -> Classifier | None:
    """The classifier in a file that ``resnet-fused train`` wrote; None where ``named`` is not what was trained there.

    Nobody need trust the file: it may name a registered model and no code, which ``named`` alone may do.
    """
    tensors, metadata = checkpoint.read(path)
    if checkpoint.FACTS not in metadata and named is None:
        raise CheckpointError(f"{path}: was not written by resnet-fused train; name its model, and this as its weights")
    facts = checkpoint.mapping(path, metadata.get(checkpoint.FACTS, "{}"))
    name, size, classes = (facts.get(key) for key in ("model", "size", "classes"))
    if named is not None and name != named:
        return None
    if facts.get("data") == DIGITS:
        raise CheckpointError(f"{path}: has learnt scikit-learn's digits, not image files")
    if not isinstance(name, str) or type(size) is not int or not 1 <= size <= MAX_SIZE:
        raise CheckpointError(f"{path}: its metadata is damaged: need a model's name, and a size from 1 to {MAX_SIZE}")
    if not isinstance(classes, list) or not classes or not all(isinstance(one, str) for one in classes):
        raise CheckpointError(f"{path}: its metadata is damaged: need the names of the classes")
    model = models.load(name) if named else _registered(name, len(classes), tensors, path)
    if not transfer.load_tensors(model, tensors, path, transfer.fit_head(model, len(classes))):
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: its last layer has another shape")
    channels = models.input_shape(name, model)[0]
    return Classifier(model.eval(), Decoder(evaluation_transform(size, channels)), classes)


def _registered(name: str, classes: int, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The model of that name, made once a sketch of it without memory has shown that the file holds its tensors."""
    try:
        with torch.device("meta"):
            sketch = models.load(name, registered=True)
    except models.ModelError as error:
        raise CheckpointError(f"{path}: {error}; another model must be named, and this file as its weights") from error
    except Exception:  # a builder that needs its numbers
        return models.load(name, registered=True)
    transfer.fitting(sketch, tensors, path, transfer.fit_head(sketch, classes))
    return models.load(name, registered=True)


def _load_weights(model: nn.Module, path: Path) -> None:
    head = transfer.head_of(model)
    if not transfer.load_weights(model, path, head):
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: {head} has another shape or is not there")


def _downloaded(source: str, name: str, weights: str) -> nn.Module:
    models.load(f"{source}:{name}")  # says what is wrong with the name
    if source == "timm" and weights == "DEFAULT":
        return importlib.import_module("timm").create_model(name, pretrained=True).eval()  # type: ignore[no-any-return]
    library = importlib.import_module("torchvision").models
    known = list(library.get_model_weights(name).__members__) if source == "torchvision" else []
    if weights not in known:
        have = ", ".join(["DEFAULT"] if source == "timm" else known) or "none to download"
        raise models.ModelError(f"{source}:{name} has no weights {weights!r}; there are: {have}; or name a file")
    return library.get_model(name, weights=weights).eval()  # type: ignore[no-any-return]


def _numbers(model: nn.Module) -> list[str]:
    """Names for classes that have none."""
    return [str(i) for i in range(model.get_submodule(transfer.head_of(model)).out_features)]  # type: ignore[arg-type]
