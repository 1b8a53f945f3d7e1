"""Runs steps one after another: a process, a time limit and a line of the table each, whatever becomes of them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_first.steps import CUDA_BIN, ROOT, Command, Context, Step, find

MOST_LOGGED = 1 << 20  # bytes of one step's output that the log keeps: the last ones
GOOD = ("ok", "shown", "absent")
_GRACE = 5.0  # seconds between asking a step to end and ending it


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    step: Step
    verdict: str  # "ok", "failed", "timed out", "absent", "shown" or "not run"
    seconds: float
    figure: str

    @property
    def good(self) -> bool:
        return self.verdict in GOOD and (self.verdict != "absent" or self.step.optional)


def run(steps: Sequence[Step], context: Context) -> int:
    """Run the steps; the exit code. The table stands in summary.txt after every step, so an interruption keeps it."""
    context.out.mkdir(parents=True, exist_ok=True)
    log = context.out / "log.txt"
    log.write_bytes(b"")
    results: list[Result] = []
    start, allowed = time.monotonic(), 0.0
    for step in steps:
        allowed += step.seconds  # what a step leaves of its time goes to those behind it
        print(f"gpu_first: {step.name} …", flush=True)
        try:
            results.append(_run(step, context, log, start + allowed - time.monotonic()))
        except KeyboardInterrupt:
            results.append(Result(step, "failed", 0.0, "interrupted"))
            _write(results, context)
            break
        _write(results, context)
    print(table(results))
    return 0 if all(result.good for result in results) else 1


def _run(step: Step, context: Context, log: Path, seconds: float) -> Result:
    make = step.rehearse if context.dry else step.command
    if make is None:
        line = shlex.join(step.command(context))
        _log(log, step, f"$ {line}\nshown alone: it needs a GPU\n".encode())
        return Result(step, "shown", 0.0, line.partition(" ")[0].rpartition("/")[2])
    if step.tool and find(step.tool) is None:
        return Result(step, "absent", 0.0, f"{step.tool} is not on PATH nor in {CUDA_BIN}")
    command = make(context)
    start = time.monotonic()
    code, output = execute(command, seconds)
    took = time.monotonic() - start
    _log(log, step, f"$ {shlex.join(command)}\n".encode() + output)
    text = output.decode(errors="replace")
    if code is None:
        return Result(step, "timed out", took, step.figure(text) or f"after {seconds:.0f} s")
    lines = text.strip().splitlines()
    figure = step.figure(text) or ("" if code == 0 or not lines else lines[-1])
    return Result(step, "ok" if code == 0 else "failed", took, figure)


def execute(command: Command, seconds: float) -> tuple[int | None, bytes]:
    """Exit code, None where the time was up, and what it printed. Everything that it started ends with it."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, f"{error}\n".encode()
        code: int | None = None
        try:
            code = process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        output.seek(max(0, output.seek(0, os.SEEK_END) - MOST_LOGGED))
        return code, output.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the step's whole session, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def environment() -> dict[str, str]:
    """This process's, with the checkout first on the path. No tuning table of this machine decides what `auto` is, and
    no kernel is interpreted unless a program asks for it itself."""
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), CUDA_BIN]
    fixed = {"RESNET_FUSED_TUNING": "0", "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    return os.environ | fixed | {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(programs)}


def _log(log: Path, step: Step, output: bytes) -> None:
    with log.open("ab") as file:
        file.write(f"\n===== {step.name}: {step.about} =====\n".encode() + output)


def _write(results: Sequence[Result], context: Context) -> None:
    (context.out / "summary.txt").write_text(table(results) + "\n")


def table(results: Sequence[Result]) -> str:
    """A line for each step: name, verdict, seconds, key figure."""
    lines = [f"{'step':<10} {'verdict':<10} {'seconds':>7}  figure"]
    lines += [f"{r.step.name:<10} {r.verdict:<10} {r.seconds:>7.1f}  {r.figure[:90]}" for r in results]
    return "\n".join(lines)


def listing(steps: Sequence[Step], context: Context) -> str:
    """The steps, with their limits and commands."""
    return "\n".join(_listed(steps, context))


def _listed(steps: Sequence[Step], context: Context) -> Iterator[str]:
    for step in steps:
        make = step.command if not context.dry or step.rehearse is None else step.rehearse
        parts = ", ".join(map(str, step.parts))
        yield f"{step.name:<10} part {parts:<8} {step.seconds:>4} s  {step.about}\n{'':<11}{shlex.join(make(context))}"
