"""Transfer of weights: a head for other classes, weights from a file, stages that stay as they are."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from resnet_fused import files
from resnet_fused.training import checkpoint
from resnet_fused.training.errors import CheckpointError, TrainingError

MODEL = "model."  # what the names of a model's tensors begin with in a checkpoint


def fit_head(model: nn.Module, classes: int) -> str:
    """Give ``model``, in place, a last linear layer of ``classes`` outputs, a new one unless it has that many.

    Returns:
        The name of that layer.

    Raises:
        TrainingError: the model has no linear layer.
    """
    name = head_of(model)
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    if head.out_features != classes:
        parent, _, own = name.rpartition(".")
        weight = head.weight
        new = nn.Linear(head.in_features, classes, head.bias is not None, weight.device, weight.dtype)
        setattr(model.get_submodule(parent), own, new)
    return name


def head_of(model: nn.Module) -> str:
    """The name of the last linear layer of ``model``.

    Raises:
        TrainingError: it has none.
    """
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names or not names[-1]:
        raise TrainingError(f"{type(model).__name__} has no linear layer that could be its classifier")
    return names[-1]


def load_weights(model: nn.Module, path: Path, head: str) -> bool:
    """Load a state_dict into ``model``: from safetensors, a checkpoint of ours, or what ``torch.save`` wrote.

    The layer ``head`` keeps its own weights where those in the file have another shape.

    Returns:
        Whether the head was loaded too.

    Raises:
        CheckpointError: the file cannot be read, or anything but the head does not fit; ``model`` is then unchanged.
    """
    return load_tensors(model, _read(path), path, head)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, head: str) -> bool:
    """:func:`load_weights` with the tensors that were read from ``path`` already."""
    weights, fits = fitting(model, tensors, path, head)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # types and layouts that cannot be copied
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: {error}") from error
    return fits


def fitting(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, head: str) -> tuple[dict[str, Tensor], bool]:
    """The state_dict for ``model`` that :func:`load_tensors` would load, and whether the head is among it.

    Raises:
        CheckpointError: anything but the head does not fit.
    """
    weights = dict(tensors)
    own = model.state_dict()
    heads = [name for name in own if name.startswith(f"{head}.")]
    fits = all(name in weights and weights[name].shape == own[name].shape for name in heads)
    if not fits:
        weights = {name: value for name, value in weights.items() if not name.startswith(f"{head}.")}
        weights.update({name: own[name] for name in heads})
    counters = {name: own[name] for name in own.keys() - weights.keys() if name.endswith(".num_batches_tracked")}
    weights.update(counters)  # files from before PyTorch 0.4.1 lack them
    problems = [
        *_listed("lacks", own.keys() - weights.keys()),
        *_listed("has the unknown", weights.keys() - own.keys()),
        *_listed(
            "has another shape of", [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
        ),
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: it {'; it '.join(problems)}")
    return weights, fits


def freeze_until(model: nn.Module, name: str) -> list[nn.Module]:
    """Freeze every part of ``model`` that comes before its submodule ``name``: no gradients.

    Returns:
        The frozen modules, which belong in eval mode, so that their batch norms keep their statistics.

    Raises:
        TrainingError: there is no such submodule, or nothing comes before it.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        known = ", ".join(child for child, _ in model.named_children())
        raise TrainingError(f"{type(model).__name__} has no part {name!r} to freeze until; it has {known}")
    frozen = []
    for own, module in modules.items():
        if own == name:
            break
        if own and not name.startswith(f"{own}."):
            module.requires_grad_(False)
            frozen.append(module)
    if not frozen:
        raise TrainingError(f"nothing in {type(model).__name__} comes before {name!r}, so nothing would be frozen")
    return frozen


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        tensors, metadata = checkpoint.read(path)
        if checkpoint.STATE in metadata:
            tensors = {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)}
        return tensors
    try:
        with files.opened(path) as file:
            _check_stored(file)
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, pickle and torch raise a dozen kinds
        raise CheckpointError(
            f"{path}: is corrupt, or no file of weights alone (need safetensors, or a state_dict by torch.save): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state_dict")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _check_stored(file: BinaryIO) -> None:
    """Refuse an archive with compressed parts: a few bytes could become any number. ``torch.save`` compresses none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED or part.file_size > part.compress_size:
                    raise files.FileError(f"its part {part.filename[:100]!r} is compressed")
    file.seek(0)


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{more}"] if names else []
