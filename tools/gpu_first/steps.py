"""The steps: what each runs, for how long at most, in which run of ten minutes, and how the CPU stands in for it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = (1, 2, 3)
CUDA_BIN = "/usr/local/cuda/bin"

Command = list[str]


@dataclass(frozen=True)
class Context:
    """Where results go, and whether the CPU stands in."""

    out: Path
    dry: bool = False


@dataclass(frozen=True)
class Step:
    """One step.

    seconds: its share of a part's ten minutes. rehearse: its command where the CPU stands in; None: shown alone.
    tool: a program that it needs; without it the step is absent, which fails the run unless ``optional``. figure: the
    key figure in what it printed.
    """

    name: str
    parts: tuple[int, ...]
    seconds: int
    about: str
    command: Callable[[Context], Command]
    rehearse: Callable[[Context], Command] | None
    tool: str = ""
    optional: bool = False
    figure: Callable[[str], str] = lambda text: last(r"^figure: (.*)$", text)


def last(pattern: str, text: str) -> str:
    """The first group of the last match in ``text``, or nothing."""
    found = re.findall(pattern, text, re.MULTILINE)
    return str(found[-1]).strip() if found else ""


def find(tool: str) -> str | None:
    """The path of a program, on PATH or beside CUDA's compiler."""
    return shutil.which(tool) or shutil.which(tool, path=CUDA_BIN)


def ours(module: str, *arguments: str) -> Callable[[Context], Command]:
    """A program of this folder; ``{out}`` in its arguments is the folder of results."""
    return lambda context: [
        *(sys.executable, "-m", f"gpu_first.{module}"),
        *(argument.format(out=context.out) for argument in arguments),
    ]


def _sanitizer(tool: str) -> Step:
    def command(context: Context) -> Command:
        program = find("compute-sanitizer") or "compute-sanitizer"
        flags = ["--tool", tool, "--error-exitcode", "3", "--print-limit", "20"]
        return [program, *flags, *ours("kernels", "--backend", "cuda", "--small")(context)]

    def figure(text: str) -> str:
        return last(r"ERROR SUMMARY: (.*)$", text) or last(r"RACECHECK SUMMARY: (.*)$", text)

    about = f"compute-sanitizer {tool} on every CUDA kernel, small shapes"
    return Step(tool, (2,), 110, about, command, None, "compute-sanitizer", figure=figure)


def _profile(context: Context) -> Command:
    program = find("ncu") or "ncu"
    sections = ["SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis"]
    sections += ["WarpStateStats", "SchedulerStats"]
    flags = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--force-overwrite"]
    chosen = [word for section in sections for word in ("--section", section)]
    flags += ["--log-file", str(context.out / "ncu.csv")]
    return [program, *flags, *chosen, *ours("kernels", "--profile")(context)]


def _pytest(*arguments: str) -> Callable[[Context], Command]:
    return lambda context: [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", *arguments]


def _counts(text: str) -> str:
    return last(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", text)


STEPS = (
    Step(
        "versions", (1, 2, 3), 15, "driver, CUDA, PyTorch, Triton, tools and packages",
        ours("device", "versions", "--out", "{out}"), ours("device", "versions", "--out", "{out}", "--dry-run"),
    ),
    Step(
        "build", (1, 2, 3), 180, "the library in place for this device alone; cuda, triton and cudnn must be there",
        ours("device", "build"), ours("device", "build", "--dry-run"),
    ),
    Step(
        "kernels", (1,), 240, "every CUDA kernel, Triton config and cuDNN path against float64, a row each",
        ours("kernels", "--csv", "{out}/kernels.csv"),
        ours("kernels", "--csv", "{out}/kernels.csv", "--small", "--dry-run"),
    ),
    Step(
        "rates", (1,), 60, "copy, matrix products and L2",
        ours("device", "rates", "--out", "{out}"), ours("device", "rates", "--out", "{out}", "--dry-run"),
    ),
    Step(
        "profile", (1,), 90, "three kernels under ncu", _profile, None, "ncu", True,
    ),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    Step(
        "tests", (2,), 170, "pytest -m gpu", _pytest("-n", "12", "--timeout", "120"),
        _pytest("-n", "0", "tests/test_gpu_backends.py", "tests/test_add_relu.py"), figure=_counts,
    ),
    Step(
        "networks", (3,), 190, "ResNet-50, bf16 and fp16, batch 1, 32, 256: eager, each backend, graphs",
        ours("measure", "networks", "--out", "{out}"), ours("measure", "networks", "--out", "{out}", "--dry-run"),
    ),
    Step(
        "blocks", (3,), 90, "every block of ResNet-18 and -50",
        ours("measure", "blocks", "--out", "{out}"), ours("measure", "blocks", "--out", "{out}", "--dry-run"),
    ),
    Step(
        "compiled", (3,), 115, "ResNet-50 by torch.compile, max-autotune; rows come as they are made",
        ours("measure", "compiled", "--out", "{out}"), ours("measure", "compiled", "--out", "{out}", "--dry-run"),
    ),
)  # fmt: skip
