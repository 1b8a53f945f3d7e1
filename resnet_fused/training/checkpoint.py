"""Checkpoints as safetensors: written whole or not at all, and read only when every byte is what was written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import files
from resnet_fused.training.errors import CheckpointError

LARGEST = 1 << 40  # bytes of a file, where nothing says how many are needed
FACTS = "resnet_fused"  # under this name a trained model's file says what it is
_STATE = "state"  # and under this one a run's checkpoint
_SEAL = re.compile(r'\{"checksum": "([0-9a-f]{8})"')  # what their texts begin with, safetensors ordering no two
_UNSEALED = '{"checksum": ""'
_HEADER = 8 << 20  # bytes of names, shapes and metadata: a thousand tensors take a tenth of a megabyte
_NAME = re.compile(r"checkpoint-(\d{8,})\.safetensors")
_UNFINISHED = ".unfinished"


class Checkpoint(NamedTuple):
    """Tensors by name, and everything else as what JSON holds."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Outline(NamedTuple):
    """What a safetensors file says of itself: tensors of the meta device by name, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write(path: Path, tensors: Mapping[str, Tensor], key: str, facts: Mapping[str, Any]) -> None:
    """Write a safetensors file so that ``path`` holds, at any moment, what it held before or all of the new file.

    Args:
        path: the file.
        tensors: as :func:`packed` gives them.
        key: under which ``facts`` and a checksum of everything stand in its metadata.
        facts: what JSON holds.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        save_file(dict(tensors), unfinished, {key: _sealed(tensors, json.dumps({"checksum": "", **facts}))})
        _sync(unfinished)
        os.replace(unfinished, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint``. Its tensors may lie on any device, in any strides, and share memory.

    Raises:
        CheckpointError: see :func:`write`.
    """
    write(path, packed(checkpoint.tensors), _STATE, checkpoint.state)


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which is what safetensors takes."""
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def load(path: Path, most: int = LARGEST) -> Checkpoint:
    """Read what :func:`save` wrote; ``most`` as for :func:`read`.

    Raises:
        CheckpointError: it cannot be read, is truncated, is no checkpoint, or some byte is not what was written.
    """
    tensors, metadata = read(path, most)
    if not holds_run(metadata):
        raise CheckpointError(f"{path}: is no checkpoint of a training run")
    return Checkpoint(tensors, parsed(path, metadata[_STATE]))


def holds_run(metadata: Mapping[str, str]) -> bool:
    """Whether a file with this metadata is the checkpoint of a run, not weights alone."""
    return _STATE in metadata


def parsed(path: Path, text: str) -> dict[str, Any]:
    """The JSON object in a file's metadata.

    Raises:
        CheckpointError: ``text`` is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its metadata is a JSON {type(value).__name__}, need an object")
    value.pop("checksum", None)
    return value


def read(path: Path, most: int = LARGEST) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. Files that we wrote are compared with their checksum.

    Args:
        path: a regular file.
        most: bytes that it may hold.

    Raises:
        CheckpointError: it cannot be read, is too large, is truncated, or some byte is not what we wrote.
    """
    with _opened(path, most) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
        for key, text in metadata.items():
            ours, sealed = key in (_STATE, FACTS), _SEAL.match(text) is not None
            if ours != sealed or (ours and text != _sealed(tensors, _SEAL.sub(_UNSEALED, text, count=1))):
                raise CheckpointError(f"{path}: is corrupt: its checksum is not that of its contents")
    return tensors, metadata


def outline(path: Path, most: int = LARGEST) -> Outline:
    """What :func:`read` would give, with tensors that have a shape and no values: its cost does not grow with theirs.

    The checksum is not looked at.

    Raises:
        CheckpointError: as for :func:`read`.
    """
    with _opened(path, most) as file:
        names = list(file.keys())
        tensors = {n: torch.empty(file.get_slice(n).get_shape(), device="meta") for n in names}
        return Outline(tensors, file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path, most: int) -> Iterator[Any]:
    """A safetensors file, open; whatever is wrong with it while the body reads from it is a CheckpointError."""
    from safetensors import safe_open

    try:
        with files.opened(path, most) as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _HEADER:
            raise CheckpointError(
                f"{path}: is corrupt or truncated: its header has {length} bytes; need at most {_HEADER}"
            )
        with safe_open(path, "pt") as content:
            yield content
    except CheckpointError:
        raise
    except files.FileError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # SafetensorError, and what torch raises for dtypes and shapes that it does not know
        raise CheckpointError(f"{path}: is corrupt or truncated: {str(error)[:200]}") from error


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return folder / f"checkpoint-{step:08d}.safetensors"


def found(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint in ``folder``, the newest first."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def newest(folder: Path, most: int = LARGEST) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest checkpoint in ``folder`` that is sound, and what is wrong with those after it; None without any.

    Raises:
        CheckpointError: there are checkpoints, and none of them is sound; ``most`` as for :func:`read`.
    """
    problems: list[str] = []
    for _, path in found(folder):
        try:
            return path, load(path, most), problems
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
        with contextlib.suppress(OSError):  # a folder of that name, say: no reason to end a run
            path.unlink()


def _sealed(tensors: Mapping[str, Tensor], text: str) -> str:
    """``text`` with the checksum of itself and ``tensors`` in the place that it has for it."""
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return text.replace(_UNSEALED, f'{_UNSEALED[:-1]}{value:08x}"', 1)


def _sync(path: Path) -> None:
    """Have the file, or the folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
