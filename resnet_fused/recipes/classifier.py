"""A classifier with its weights, the transform of its images, and the names of its classes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

import resnet_fused
from resnet_fused.testing import models
from resnet_fused.testing.torchvision_compat import import_torchvision
from resnet_fused.training import checkpoint, images, transfer
from resnet_fused.training.data import DIGITS, evaluation_transform
from resnet_fused.training.errors import CheckpointError, TrainingError
from resnet_fused.training.loop import logits_of

SIZES = range(1, 2049)  # that a trained file may ask for; memory grows with the square

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
            ``model.safetensors`` that ``resnet-fused train`` wrote, which holds everything. Such a file may name our
            own builders and models of torchvision and timm. For another model, name that here and the file as
            ``weights``: its classes and the size of its images are taken from it.
        weights: a file (safetensors, or a state_dict by ``torch.save``); or the name of weights that torchvision or
            timm downloads (``DEFAULT``; torchvision: ``IMAGENET1K_V1``, …).

    Raises:
        ModelError: the model, or weights of that name, do not exist, or no weights are given, or two.
        CheckpointError: a file cannot be read, is corrupt, or does not fit.
    """
    if model.endswith(".safetensors"):
        if weights is not None:
            raise models.ModelError(f"{model}: already holds weights; leave out {weights!r}, or name a model")
        return _trained(Path(model), None)
    if weights is None:
        raise models.ModelError(f"{model}: need weights, a file or the name of some to download")
    source, _, name = model.partition(":")
    if weights.endswith(".safetensors") and checkpoint.FACTS in checkpoint.outline(Path(weights)).metadata:
        return _trained(Path(weights), model)
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
        if of := known.get(weights) or known.get("DEFAULT"):
            names, numbers = of.meta.get("categories", ()), _numbers(network)
            return Classifier(network, Decoder(of.transforms()), names if len(names) == len(numbers) else numbers)
    channels, size = models.input_shape(model, network)
    return Classifier(network, Decoder(evaluation_transform(size, channels)), _numbers(network))


@dataclass(frozen=True)
class _Facts:
    """What ``resnet-fused train`` wrote beside the weights."""

    model: str
    size: int
    classes: list[str]


def _trained(path: Path, spec: str | None) -> Classifier:
    """The classifier in a file by ``resnet-fused train``, of the model ``spec``, or of the known one that it names."""
    outline = checkpoint.outline(path)
    facts = _facts(path, outline.metadata)
    if spec is None:
        _fits_unbuilt(path, facts, outline.tensors)
    model = _built(path, facts, spec)
    _load_weights(model, path)
    channels = models.input_shape(spec or facts.model, model)[0]
    if channels not in (1, 3):
        raise CheckpointError(f"{path}: its model takes images of {channels} channels; need 3 or 1")
    return Classifier(model.eval(), Decoder(evaluation_transform(facts.size, channels)), facts.classes)


def _facts(path: Path, metadata: Mapping[str, str]) -> _Facts:
    if checkpoint.FACTS not in metadata:
        raise CheckpointError(
            f"{path}: was not written by resnet-fused train; name its model, and this file as its weights"
        )
    facts = checkpoint.mapping(path, metadata[checkpoint.FACTS])
    model, size, classes = (facts.get(key) for key in ("model", "size", "classes"))
    if facts.get("data") == DIGITS:
        raise CheckpointError(f"{path}: was trained on scikit-learn's digits, not on image files")
    if not isinstance(model, str) or len(model) > 200:
        raise CheckpointError(f"{path}: its metadata names no model")
    if type(size) is not int or size not in SIZES:
        raise CheckpointError(f"{path}: its metadata gives no image size from 1 to {SIZES[-1]}")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path}: its metadata lists no classes")
    return _Facts(model, size, classes)


def _built(path: Path, facts: _Facts, spec: str | None) -> nn.Module:
    try:
        model = models.load(facts.model, registered=True) if spec is None else models.load(spec)
    except models.ModelError as error:
        if spec is not None:
            raise
        raise CheckpointError(f"{path}: {error}; name another model, and this file as its weights") from error
    try:
        transfer.fit_head(model, len(facts.classes))
    except TrainingError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model


def _fits_unbuilt(path: Path, facts: _Facts, tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes before memory is taken: a small file may name the largest model there is."""
    with torch.device("meta"):
        outline = _built(path, facts, None)
    _check_head(transfer.fit(outline, tensors, path, transfer.head_of(outline)), outline, path)


def _load_weights(model: nn.Module, path: Path) -> None:
    _check_head(transfer.load_weights(model, path, transfer.head_of(model)), model, path)


def _check_head(fits: bool, model: nn.Module, path: Path) -> None:
    if not fits:
        head = transfer.head_of(model)
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
