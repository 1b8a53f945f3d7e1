"""The results file: one row per (suite, case, contender, cache), with all that is needed to judge the figure."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from resnet_fused import files

ADDED = ("peers", "tuning", "flags")  # columns that files of before do not have: the last ones, in this order
ENVIRONMENT = (
    *("device", "cpu", "driver", "clocks", "cuda", "cudnn", "python", "torch", "triton", "onednn", "threads", "tf32"),
    *("commit", *ADDED),
)
IDENTITY = ("suite", "case", "contender", "cache")
NUMBERS = (
    *("batch", "gate", "samples", "p20_ms", "p50_ms", "p80_ms", "flops", "bytes", "bound_ms", "roofline_pct"),
    *("peak_bytes", "copy_bytes_per_s", "matmul_flops_per_s"),
)
COLUMNS = (
    *IDENTITY,
    *("status", "note", "model", "dtype", "shape"),
    *NUMBERS,
    *(key for key in ENVIRONMENT if key not in ADDED),
    "date",
    *ADDED,
)
OLDER = COLUMNS[: -len(ADDED)]
_HEADERS = tuple(COLUMNS[:end] for end in range(len(OLDER), len(COLUMNS) + 1))
STATUSES = ("ok", "red", "absent")

Row = dict[str, str]


def path_for(folder: Path, environment: Mapping[str, str]) -> Path:
    """``<device>-<torch>-<cuda>.csv`` in ``folder``."""
    name = "-".join(environment[key] or "none" for key in ("device", "torch", "cuda"))
    return folder / (re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-") + ".csv")


def read(path: Path) -> tuple[list[Row], list[str]]:
    """All sound rows of ``path``, and one line of text on each broken one, with its line number.

    Raises:
        ValueError: the header is not this harness's.
    """
    rows: list[Row] = []
    problems: list[str] = []
    head, *lines = path.read_bytes().splitlines() or [b""]
    header = tuple(head.decode(errors="replace").split(","))
    if header not in _HEADERS:
        raise ValueError(f"{path}:1: the header is not this version's; need {','.join(COLUMNS)}")
    for number, line in enumerate(lines, 2):
        try:
            fields = next(csv.reader([line.decode()], strict=True), [])
            problem = _problem(fields, header)
        except (csv.Error, UnicodeDecodeError) as error:
            problem = str(error)
        if problem is None:
            rows.append(dict.fromkeys(ADDED, "") | dict(zip(header, fields, strict=True)))
        else:
            problems.append(f"{path}:{number}: {problem}")
    return rows, problems


def _problem(fields: Sequence[str], header: Sequence[str]) -> str | None:
    """Why these fields are no row, or None. A row is one line, so a broken one does not affect the next."""
    if len(fields) != len(header):
        return f"{len(fields)} fields, need {len(header)}"
    row = dict(zip(header, fields, strict=True))
    if row["status"] not in STATUSES:
        return f"status: got {row['status']!r}, need one of {', '.join(STATUSES)}"
    for key in NUMBERS:
        try:
            value = float(row[key] or 0)
        except ValueError:
            return f"{key}: got {row[key]!r}, need a number"
        if key != "gate" and not 0 <= value < math.inf:
            return f"{key}: got {row[key]!r}, need a finite number, not below 0"
    if row["status"] != "ok":
        return None
    for key in ("p50_ms", *(key for key in ("p20_ms", "p80_ms") if row[key])):
        if not float(row[key] or 0) > 0:
            return f"{key}: got {row[key]!r}, need a time above 0"
    if not re.fullmatch(r"0*[1-9]\d*", row["batch"]):
        return f"batch: got {row['batch']!r}, need a whole number above 0"
    return None


def append(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows. The file is replaced as a whole: an interruption leaves either the old one or the new one."""
    old = _widened(path.read_bytes()) if path.exists() else b""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if not old:
        writer.writerow(COLUMNS)
    elif not old.endswith(b"\n"):
        text.write("\n")
    writer.writerows([_text(row[key]) for key in COLUMNS] for row in rows)
    files.replace(path, old + text.getvalue().encode())


def _widened(old: bytes) -> bytes:
    """A file of before with the columns that it lacks, empty."""
    head, *lines = old.splitlines()
    columns = tuple(head.decode().split(","))
    if columns == COLUMNS or columns not in _HEADERS:
        return old
    empty = b"," * (len(COLUMNS) - len(columns))
    return b"\n".join([",".join(COLUMNS).encode(), *(line + empty for line in lines), b""])


def _text(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())  # a row is one line


def identity(row: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """What a figure is of, and where it was taken: rows alike in this are repetitions of one another."""
    return (*(row[key] for key in IDENTITY), *(environment[key] for key in ENVIRONMENT))


def measured(path: Path) -> set[tuple[str, ...]]:
    """The identities of the rows already in ``path``, but for red ones: those run again."""
    if not path.exists():
        return set()
    return {identity(row, row) for row in read(path)[0] if row["status"] != "red"}


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ only in when and at which commit they were taken, the last in the file."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        last[(*(row[key] for key in IDENTITY), row["device"], row["threads"])] = row
    return list(last.values())
