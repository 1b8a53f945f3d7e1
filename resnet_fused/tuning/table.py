"""A tuning table as a file: versioned JSON, replaced as a whole under a lock, never trusted blindly."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import reprlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused import files

FORMAT = "resnet_fused tuning table"
VERSION = 1
LARGEST = 8_000_000  # bytes of a table; an entry takes up to 3000

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
        TableError: the file is corrupt or foreign, larger than ``LARGEST``, or no regular file.
        OSError: it cannot be opened.
    """
    try:
        value = json.loads(files.read(path, LARGEST))
    except FileNotFoundError:
        return {}
    except files.FileError as error:
        raise TableError(f"it {error}") from error
    except (ValueError, RecursionError) as error:
        raise TableError(f"no JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise TableError(f"its format is not {FORMAT!r}")
    if value.get("version") != VERSION:
        raise TableError(f"its version is {reprlib.repr(value.get('version'))}, need {VERSION}")
    bound, entries = value.get("environment"), value.get("entries")
    if not isinstance(bound, dict) or "device" not in bound or not isinstance(entries, dict):
        raise TableError("its environment or its entries are missing")
    for key, fact in bound.items():
        if environment.get(key) != fact:
            here = environment.get(key)
            raise TableError(f"it is for {reprlib.repr(key)} {reprlib.repr(fact)}, here is {here!r}")
    return {key: _entry(key, entry) for key, entry in entries.items()}


def _entry(key: str, value: Any) -> Entry:
    times = value.get("milliseconds") if isinstance(value, dict) else None
    # A comparison holds for integers of any length, which isfinite does not take.
    sound = isinstance(times, dict) and all(type(t) in (int, float) and 0 <= t < 1e12 for t in times.values())
    if (
        not sound
        or not isinstance(value.get("backend"), str)
        or not {"backend", "config", "milliseconds"} >= set(value)
        or not _is_config(value.get("config"))
    ):
        raise TableError(f"the entry of {reprlib.repr(key)} is damaged")
    return Entry(value["backend"], value.get("config"), value["milliseconds"])


def _is_config(value: Any, levels: int = 3) -> bool:
    """Whether a config is what :func:`resnet_fused.tuning.lookup.plain` makes: a value, or lists of such."""
    if isinstance(value, list):
        return levels > 0 and len(value) <= 100 and all(_is_config(item, levels - 1) for item in value)
    return value is None or isinstance(value, (bool, str)) or (type(value) in (int, float) and abs(value) < 1e12)


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
    """Say it in this process once, however often the tables are read."""
    logger.warning("%s", line)


def check_writable(path: Path) -> None:
    """See that :func:`merge` could write to ``path``; its folder is made.

    Raises:
        OSError: it could not.
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
        if len(data) > LARGEST:
            raise OSError(f"{path} would hold more than {LARGEST / 1e6:.1f} MB; remove it, and tune what you use")
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
