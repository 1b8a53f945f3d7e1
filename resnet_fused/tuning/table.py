"""A tuning table as a file: versioned JSON, replaced as a whole under a lock, never trusted blindly."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused import files

FORMAT = "resnet_fused tuning table"
VERSION = 1
MAX_BYTES = 8 * 2**20  # of a file: tens of thousands of entries
MAX_DEPTH = 8  # of the lists in a config
MAX_MILLISECONDS = 1e12

logger = logging.getLogger("resnet_fused")


class TableError(ValueError):
    """The file is no table of this version and environment; the message says why."""


@dataclass(frozen=True)
class Entry:
    """What was chosen for one call. ``config`` holds plain JSON values, None where the backend has no configs;
    ``milliseconds`` are the medians of all that was measured, for people to read."""

    backend: str
    config: Any = None
    milliseconds: Mapping[str, float] = field(default_factory=dict)


def read(path: Path, environment: Mapping[str, str]) -> dict[str, Entry]:
    """The entries of ``path`` by key; none where there is no such file.

    Every fact that the file is bound to must be as in ``environment``.

    Raises:
        TableError: the file is corrupt or foreign, no regular file, or larger than ``MAX_BYTES``.
        OSError: it cannot be read.
    """
    try:
        text = files.read(path, MAX_BYTES)
    except FileNotFoundError:
        return {}
    except files.FileError as error:
        raise TableError(f"it {error}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"no JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise TableError(f"its format is not {FORMAT!r}")
    if value.get("version") != VERSION:
        raise TableError(f"its version is {repr(value.get('version'))[:200]}, need {VERSION}")
    bound, entries = value.get("environment"), value.get("entries")
    if not isinstance(bound, dict) or "device" not in bound or not isinstance(entries, dict):
        raise TableError("its environment or its entries are missing")
    for key, fact in bound.items():
        if environment.get(key) != fact:
            raise TableError(f"it is for {key[:100]} {repr(fact)[:200]}, here is {environment.get(key)!r}")
    return {key: _entry(key, entry) for key, entry in entries.items()}


def _entry(key: str, value: Any) -> Entry:
    times = value.get("milliseconds") if isinstance(value, dict) else None
    if (
        not isinstance(times, dict)
        or not all(isinstance(time, (int, float)) and 0 <= time <= MAX_MILLISECONDS for time in times.values())
        or not isinstance(value.get("backend"), str)
        or not _is_config(value.get("config"))
        or (value["backend"] == "reference" and not isinstance(value.get("config"), (str, type(None))))
        or not {"backend", "config", "milliseconds"} >= set(value)
    ):
        raise TableError(f"the entry of {key[:200]!r} is damaged")
    return Entry(value["backend"], value.get("config"), times)


def _is_config(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return depth < MAX_DEPTH and all(_is_config(one, depth + 1) for one in inner)
    return not isinstance(value, (int, float)) or abs(value) < 2**63


def load(path: Path, environment: Mapping[str, str]) -> dict[str, Entry]:
    """:func:`read`, but a corrupt or foreign file is set aside with a warning, and there are then no entries."""
    try:
        return read(path, environment)
    except TableError:
        pass
    except OSError as error:
        warn_once(f"the tuning table {path} cannot be read and is ignored: {error}")
        return {}
    try:
        with _locked(path, seconds=1):
            return _read_or_set_aside(path, environment)
    except OSError as error:
        warn_once(f"the tuning table {path} is ignored, and cannot be set aside: {error}")
        return {}


@functools.cache
def warn_once(line: str) -> None:
    """Warn once in this process, however often the tables are read."""
    logger.warning("%s", line)


def check_writable(path: Path) -> None:
    """See that a table can be written at ``path``, and write none.

    Raises:
        OSError: it cannot.
    """
    files.check_writable(path)
    with _locked(path):
        pass


def merge(path: Path, environment: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    """Add ``entries`` to the table in ``path``, over those with the same keys.

    What other processes add meanwhile stays. An interruption leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        merged = _read_or_set_aside(path, environment) | dict(entries)
        value = {
            "format": FORMAT,
            "version": VERSION,
            "environment": dict(sorted(environment.items())),
            "entries": {key: _plain(merged[key]) for key in sorted(merged)},
        }
        data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
        if len(data) > MAX_BYTES:
            raise OSError(f"{path} would hold more than {MAX_BYTES / 2**20:g} MiB; remove it, and tune what you use")
        files.replace(path, data)


def _plain(entry: Entry) -> dict[str, Any]:
    return {"backend": entry.backend, "config": entry.config, "milliseconds": dict(entry.milliseconds)}


def _read_or_set_aside(path: Path, environment: Mapping[str, str]) -> dict[str, Entry]:
    try:
        return read(path, environment)
    except TableError as error:
        names = [path.with_name(f"{path.name}.bad{number}") for number in range(10)]
        aside = next((name for name in names if not name.exists()), names[-1])
        os.replace(path, aside)
        logger.warning("the tuning table %s is ignored (%s) and kept as %s", path, error, aside.name)
        return {}


@contextlib.contextmanager
def _locked(path: Path, seconds: float = 60) -> Iterator[None]:
    """Alone among the processes that use this file. The lock is the system's: it ends with the process.

    Raises:
        OSError: another process keeps it for so many ``seconds``, or it cannot be made.
    """
    with path.with_name(path.name + ".lock").open("a+b") as file:
        end = time.monotonic() + seconds
        while not _locks(file):
            if time.monotonic() > end:
                raise TimeoutError(f"another process keeps {file.name} locked")
            time.sleep(0.005)
        yield  # closing the file ends the lock


def _locks(file: Any) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Windows says the latter
        return False
    return True
