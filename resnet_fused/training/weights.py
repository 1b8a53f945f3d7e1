"""Files of weights from any source: read within bounds, and never as code."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from resnet_fused import files
from resnet_fused.training import checkpoint
from resnet_fused.training.errors import CheckpointError

MODEL = "model."  # what the names of a model's tensors begin with in a checkpoint
_PICKLE = 1 << 20  # bytes of a pickle, tensors apart: a ResNet-152 with two averages per weight takes half of it
_DIRECTORY = 1 << 20  # bytes of a zip file's list of contents
# What torch.save began its files with before they were zip files: five pickles, then the tensors.
_LEGACY, _LEGACY_PICKLES = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", 5


def read(path: Path, most: int) -> dict[str, Tensor]:
    """The tensors of a state_dict by name: from safetensors, a checkpoint of ours, or what ``torch.save`` wrote.

    Args:
        path: a regular file.
        most: bytes that it may hold.

    Raises:
        CheckpointError: it cannot be read, is too large, is corrupt, or holds no state_dict.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = checkpoint.read(path, most)
        return _of_model(tensors, metadata)
    content = _pickled(path, most)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state_dict")
    return {name.removeprefix("module."): value for name, value in content.items()}


def outline(path: Path, most: int) -> dict[str, Tensor]:
    """The same of a safetensors file with tensors of the meta device: what it says it holds.

    Raises:
        CheckpointError: it cannot be read, is too large or corrupt; values and checksum are not looked at.
    """
    return _of_model(*checkpoint.outline(path, most))


def _of_model(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    if checkpoint.STATE in metadata:
        return {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    return tensors


def _pickled(path: Path, most: int) -> Any:
    try:
        with files.opened(path, most) as file:
            _check(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except files.FileError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, pickle and torch raise a dozen kinds
        raise CheckpointError(
            f"{path}: is corrupt, or no file of weights alone (need safetensors, or a state_dict by torch.save): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _check(file: BinaryIO) -> None:
    """Refuse what would unpack to more than it holds, and pickles that are more than names and shapes.

    Raises:
        ValueError: it is such a file, or none by torch.save.
    """
    if file.read(len(_LEGACY)) == _LEGACY:
        file.seek(0)
        begin, ended = io.BytesIO(file.read(_PICKLE)), 0
        while ended < _LEGACY_PICKLES:
            _check_pickle(begin)  # raises where the pickle does not end in time
            ended += 1
        return
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - (1 << 16)))
    tail = file.read()
    # Where the list of contents ends its length stands, of 32 bits, or of 64 in a record before.
    at, of_64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    lengths = [int.from_bytes(tail[at + 12 : at + 16], "little")] if at >= 0 else []
    if of_64 >= 0:
        lengths.append(int.from_bytes(tail[of_64 + 40 : of_64 + 48], "little"))
    if not lengths or min(lengths) > _DIRECTORY:
        raise ValueError("it is no zip file, or one of too many parts")
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise ValueError("one of its parts is compressed, or parts overlap")
        for part in parts:
            if part.filename.endswith(".pkl"):
                if part.file_size > _PICKLE:
                    raise ValueError(f"its pickle is larger than {_PICKLE} bytes")
                _check_pickle(io.BytesIO(archive.read(part)))


def _check_pickle(stream: BinaryIO) -> None:
    """Refuse tuples that hold one another over and over: as the key of a dict, the hash of a few takes for ever.

    Follows the stack of one pickle; for each thing on it, how many things it is when written out, 1 but for tuples.

    Raises:
        ValueError: there are such, or the pickle is corrupt.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    argument: Any
    for op, argument, _ in pickletools.genops(stream):
        name = op.name
        if name == "MARK":
            marks.append(len(stack))
        elif name.startswith("TUPLE"):
            begin = marks.pop() if name == "TUPLE" else len(stack) - int(name[-1])
            stack[begin:] = [1 + sum(stack[begin:])]
            if stack[-1] > _PICKLE:
                raise ValueError("its tuples hold one another without end")
        elif name == "MEMOIZE" or name.endswith("PUT"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name == "DUP" or name.endswith("GET"):
            stack.append(stack[-1] if name == "DUP" else memo[int(argument)])
        else:
            taken = op.stack_before
            if pickletools.markobject in taken:
                del stack[marks.pop() - taken.index(pickletools.markobject) :]
            elif taken:
                del stack[-len(taken) :]
            stack += [1] * len(op.stack_after)
