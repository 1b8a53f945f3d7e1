"""Transfer of weights: a head for other classes, weights from a file, stages that stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_fused.training import weights
from resnet_fused.training.errors import CheckpointError, TrainingError


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
    own, most = model.state_dict(), largest_file(model)
    if path.suffix == ".safetensors":
        fit(model, weights.outline(path, most), path, head)  # before a byte of what does not fit is read
    found = weights.read(path, most)
    fits = fit(model, found, path, head)
    values = {}
    for name, value in own.items():
        if name in found and (fits or not name.startswith(f"{head}.")):
            values[name] = _dense(found[name], value.dtype, name, path)
        else:
            values[name] = value
    model.load_state_dict(values)
    return fits


def fit(model: nn.Module, found: Mapping[str, Tensor], path: Path, head: str) -> bool:
    """See that tensors of these names and shapes, from ``path``, fit ``model``; whether the layer ``head`` does too.

    Values are not looked at: both may lie on the meta device.

    Raises:
        CheckpointError: anything but the head does not fit.
    """
    own = model.state_dict()
    heads = {name for name in own if name.startswith(f"{head}.")}
    fits = all(name in found and found[name].shape == own[name].shape for name in heads)
    names = own.keys() if fits else own.keys() - heads
    theirs = found.keys() if fits else {name for name in found if not name.startswith(f"{head}.")}
    lacking = {name for name in names - theirs if not name.endswith(".num_batches_tracked")}  # before PyTorch 0.4.1
    problems = [
        *_listed("lacks", lacking),
        *_listed("has the unknown", theirs - names),
        *_listed("has another shape of", [n for n in names & theirs if own[n].shape != found[n].shape]),
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: it {'; it '.join(problems)}")
    return fits


def largest_file(model: nn.Module) -> int:
    """Bytes of a file that may hold this model: with optimizers, averages and a larger head, in wider dtypes."""
    return int(8 * sum(value.nbytes for value in model.state_dict().values()) + (64 << 20))


def _dense(value: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    if value.is_meta or value.is_quantized or value.is_complex() or value.layout != torch.strided:
        raise CheckpointError(f"{path}: {name} is no dense tensor of real numbers: {value.layout}, {value.dtype}")
    try:
        return value.to(dtype)
    except (RuntimeError, NotImplementedError) as error:  # dtypes that PyTorch only stores
        raise CheckpointError(f"{path}: {name} is {value.dtype}, which does not convert to {dtype}") from error


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


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(name[:100] for name in names[:3])}{more}"] if names else []
