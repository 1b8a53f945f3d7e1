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
STATE = "state"  # and under this one a run's checkpoint says where the run was
# Their texts begin with a checksum: in an entry of its own it would come before or after at random, and equal weights
# would not make equal files.
_SEALED = re.compile(r"([0-9a-f]{8}) (?=\{)")
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


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that ``path`` holds, at any moment, what it held before or all of the new file.

    The texts that ``metadata`` has under ``STATE`` or ``FACTS`` get a checksum of the whole, which :func:`read`
    compares.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        ours = {k: f"{_checksum(tensors, text)} {text}" for k, text in metadata.items() if k in (STATE, FACTS)}
        save_file(dict(tensors), unfinished, {**metadata, **ours})
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
    write(path, packed(checkpoint.tensors), {STATE: json.dumps(checkpoint.state)})


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which is what safetensors takes."""
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def load(path: Path, most: int = LARGEST) -> Checkpoint:
    """Read what :func:`save` wrote; ``most`` as for :func:`read`.

    Raises:
        CheckpointError: it cannot be read, is truncated, is no checkpoint, or some byte is not what was written.
    """
    tensors, metadata = read(path, most)
    if STATE not in metadata:
        raise CheckpointError(f"{path}: is no checkpoint of a training run")
    return Checkpoint(tensors, mapping(path, metadata[STATE]))


def mapping(path: Path, text: str) -> dict[str, Any]:
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
        metadata = _texts(path, file.metadata() or {}, tensors)
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
        return Outline(tensors, _texts(path, file.metadata() or {}, None))


def _texts(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None) -> dict[str, str]:
    """The metadata without checksums, which are compared where there are ``tensors``."""
    texts = {}
    for key, text in metadata.items():
        sealed = _SEALED.match(text)
        if key in (STATE, FACTS) and sealed is None:
            raise CheckpointError(f"{path}: has no checksum: it is corrupt, or an earlier version wrote it; train anew")
        texts[key] = text[sealed.end() :] if sealed else text
        # A checksum under another name is ours too: a bit of the name is wrong.
        if sealed and tensors is not None and (
            key not in (STATE, FACTS) or sealed[1] != _checksum(tensors, texts[key])
        ):  # fmt: skip
            raise CheckpointError(f"{path}: is corrupt: its checksum is not that of its contents")
    return texts


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
