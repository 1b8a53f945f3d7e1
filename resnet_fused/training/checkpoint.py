"""Checkpoints and weights as safetensors: written whole or not at all, and read only when every byte is what was
written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import files
from resnet_fused.training.errors import CheckpointError

_NAME = re.compile(r"checkpoint-(\d{8,})\.safetensors")
_UNFINISHED = ".unfinished"
_MAX_HEADER = 8 * 2**20  # bytes: names, shapes and metadata of tens of thousands of tensors and classes
STATE = "state"  # in the metadata: what a checkpoint holds besides tensors
FACTS = "resnet_fused"  # in the metadata of trained weights: the model, its classes and the size of its images
_CHECKSUM = "checksum"


class Checkpoint(NamedTuple):
    """Tensors by name, and everything else as what JSON holds."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that ``path`` holds, at any moment, what it held before or all of the new file.

    Where ``metadata`` has ``STATE`` or ``FACTS``, a checksum is added, which :func:`read` compares.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = path.with_name(path.name + _UNFINISHED)
    kept = dict(metadata)
    if STATE in kept:
        kept[_CHECKSUM] = _checksum(tensors, kept[STATE])
    elif FACTS in kept:  # in the same entry, as the order of several is random and equal weights make equal files
        kept[FACTS] = f"{_checksum(tensors, kept[FACTS])} {kept[FACTS]}"
    try:
        save_file(dict(tensors), unfinished, kept)
        _sync(unfinished)
        os.replace(unfinished, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` with a checksum. Tensors may lie on any device, in any strides, and share memory.

    Raises:
        CheckpointError: see :func:`write`.
    """
    write(path, packed(checkpoint.tensors), {STATE: json.dumps(checkpoint.state)})


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which is what safetensors takes."""
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def load(path: Path) -> Checkpoint:
    """Read what :func:`save` wrote.

    Raises:
        CheckpointError: it cannot be read, is truncated, is no checkpoint, or some byte is not what was written.
    """
    tensors, metadata = read(path)
    if STATE not in metadata or _CHECKSUM not in metadata:
        raise CheckpointError(f"{path}: is no checkpoint of a training run")
    return Checkpoint(tensors, mapping(path, metadata[STATE]))


def mapping(path: Path, text: str) -> dict[str, Any]:
    """The JSON object in the metadata of the file ``path``.

    Raises:
        CheckpointError: ``text`` is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its metadata is a {type(value).__name__}, need a JSON object")
    return value


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. What this package wrote is compared with its checksum.

    Raises:
        CheckpointError: it cannot be read, is no regular file, is truncated, or some byte is not what was written.
    """
    from safetensors import safe_open

    try:
        with files.opened(path) as start:
            header = int.from_bytes(start.read(8), "little")
        if header > _MAX_HEADER:
            raise CheckpointError(f"{path}: is corrupt or truncated: its header has {header} bytes")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
        found, text = metadata.get(_CHECKSUM), metadata.get(STATE)
        if text is None and FACTS in metadata:
            found, _, text = metadata[FACTS].partition(" ")
            metadata = metadata | {FACTS: text}
        sound = found is None or text is None or found == _checksum(tensors, text)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except files.FileError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # safetensors and torch raise a dozen kinds for types and shapes that they do not know
        raise CheckpointError(f"{path}: is corrupt or truncated: {error}") from error
    if found is not None and found.startswith("{"):
        raise CheckpointError(f"{path}: has no checksum: it is corrupt, or an earlier version wrote it; train anew")
    if not sound:
        raise CheckpointError(f"{path}: is corrupt: its checksum is not that of its contents")
    return tensors, metadata


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return folder / f"checkpoint-{step:08d}.safetensors"


def found(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint in ``folder``, the newest first."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def newest(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest checkpoint in ``folder`` that is sound, and what is wrong with those after it; None without any.

    Raises:
        CheckpointError: there are checkpoints, and none of them is sound.
    """
    problems: list[str] = []
    for _, path in found(folder):
        try:
            return path, load(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}; {folder} holds no older checkpoint")
    return None


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove what a kill left unfinished, and all but the ``keep`` newest of the checkpoints up to ``step``.

    Later ones, which were found corrupt, stay until they are written anew.
    """
    old = [path for at, path in found(folder) if at <= step][keep:]
    for path in (*old, *folder.glob(f"*{_UNFINISHED}")):
        path.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _sync(path: Path) -> None:
    """Have the file, or the folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
