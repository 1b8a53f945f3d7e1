"""Builds the host runner of the CUDA kernels and calls it with tensors."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "simt"
FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # fmt: skip
COMPILER = os.environ.get("CXX", "g++")
FAULT_STATUS = 3


class RunnerError(Exception):
    """The runner stopped: a fault that the runtime or a sanitizer found. The text is what it printed."""


def missing_compiler() -> str | None:
    return None if shutil.which(COMPILER) else f"no C++ compiler: {COMPILER} is not on PATH"


@functools.cache
def runner() -> Path:
    """The built runner; objects are kept in build/simt and named by the hash of all sources."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return link(list(pool.map(build, sources())))


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def build(source: Path, csrc: Path = CSRC, folder: Path = BUILD) -> Path:
    """The object of ``source`` with the kernels in ``csrc``."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}-{_digest(csrc, source)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        _call([COMPILER, *FLAGS, f"-I{csrc}", f"-I{HERE}", "-c", str(source), "-o", str(partial)])
        partial.replace(target)
    return target


def link(objects: list[Path], folder: Path = BUILD) -> Path:
    program = folder / ("runner-" + hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16])
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}.tmp")
        _call([COMPILER, *FLAGS, *map(str, objects), "-o", str(partial)])
        partial.replace(program)
    return program


def _digest(csrc: Path, source: Path) -> str:
    digest = hashlib.sha256(" ".join((COMPILER, *FLAGS)).encode())
    for path in (*sorted([*HERE.glob("*.h"), *csrc.rglob("*.h"), *csrc.rglob("*.cuh")]), source):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def call(*arguments: str) -> str:
    """Run the runner and return what it printed; raise RunnerError where it stopped."""
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    result = subprocess.run(
        [str(runner()), *arguments], env={**os.environ, "ASAN_OPTIONS": options}, capture_output=True, text=True
    )
    if result.returncode:
        raise RunnerError(f"exit status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def run(command: str, values: dict[str, object], tensors: dict[str, Tensor | None], out: str) -> tuple[str, bytes]:
    """Run ``command`` on the raw bytes of ``tensors``; give what it printed and the bytes of tensor ``out``."""
    text, found = run_many(command, values, tensors, (out,))
    return text, found.get(out, b"")


def run_many(
    command: str, values: dict[str, object], tensors: dict[str, Tensor | None], outs: Iterable[str]
) -> tuple[str, dict[str, bytes]]:
    """As ``run``, with the bytes of every tensor of ``outs`` that there is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"{key} {value}" for key, value in values.items()]
        (folder / "request.txt").write_text("\n".join(lines) + "\n")
        for key, tensor in tensors.items():
            if tensor is not None:
                (folder / f"{key}.bin").write_bytes(to_bytes(tensor))
        text = call(command, name)
        paths = {name: folder / f"{name}.bin" for name in outs}
        return text, {name: path.read_bytes() for name, path in paths.items() if path.exists()}


def to_bytes(tensor: Tensor) -> bytes:
    """The memory of a contiguous tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
