"""Files that are replaced as a whole, and read within bounds."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO


class FileError(ValueError):
    """What lies at a path is not a file that may be read whole; the message says what it is, without the path."""


def opened(path: str | os.PathLike[str], most: int) -> BinaryIO:
    """A regular file of at most ``most`` bytes, open to be read. Devices and pipes may wait, or never end.

    Raises:
        FileError: it is no regular file, or larger.
        OSError: it cannot be opened.
    """
    # So opened, a pipe without a writer does not wait for one; for regular files the flag means nothing.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise FileError("is no regular file")
        if facts.st_size > most:
            raise FileError(f"holds {facts.st_size / 1e6:.1f} MB; need at most {most / 1e6:.1f} MB")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read(path: str | os.PathLike[str], most: int) -> bytes:
    """All bytes of a regular file; see :func:`opened`, which says what is refused."""
    with opened(path, most) as file:
        data = file.read(most + 1)
    if len(data) > most:  # it has grown meanwhile
        raise FileError(f"holds more than {most / 1e6:.1f} MB")
    return data


def check_writable(path: Path) -> None:
    """Make the folder of ``path`` and see that a file can be made there.

    Raises:
        OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part"):
        pass


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
