"""Replace files as a whole, and read untrusted files within bounds."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO


class FileError(ValueError):
    """The file is not read: it is no regular file, or has too many bytes. The message says which."""


def replace(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds, at any moment, what it held before or all of it.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def check_writable(path: Path) -> None:
    """Make the folder of ``path`` and see that a file can be made there; none is left.

    Raises:
        OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def opened(path: Path, limit: int | None = None) -> BinaryIO:
    """A regular file, open to be read. A pipe or a device in its place neither blocks nor feeds the reader.

    Raises:
        OSError: the file cannot be opened.
        FileError: it is no regular file, or has more bytes than ``limit``.
    """
    # Without O_NONBLOCK a pipe without a writer would block here.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise FileError("is no regular file")
        if limit is not None and facts.st_size > limit:
            raise FileError(f"has more than {limit / 2**20:g} MiB")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read(path: Path, limit: int) -> bytes:
    """All bytes of a regular file that has at most ``limit``.

    Raises:
        OSError: the file cannot be read.
        FileError: it is no regular file, or has more bytes.
    """
    with opened(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown meanwhile
        raise FileError(f"has more than {limit / 2**20:g} MiB")
    return data
