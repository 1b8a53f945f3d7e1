"""Builds the compiled sources for the host, under sanitizers, and calls their ops in a process of their own.

Two things are built from csrc: the bindings of the CUDA kernels (csrc/*/cuda.cpp) with the emulator in the place of
what nvcc compiles, and the kernels for the CPU. A GPU's bindings are called by redispatch to the key that they are
registered under, so that what runs is what runs on a GPU, from the dispatcher to the kernel's last line.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "simt"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
         "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # fmt: skip
FAULT_STATUS = 3


class RunnerError(Exception):
    """The process stopped: a fault that the runtime or a sanitizer found. The text is what it printed."""


class Refused(Exception):
    """The op raised; the text is its message."""


@dataclass(frozen=True)
class Answer:
    """What was printed, what the op returned, and its arguments as they were after the call."""

    text: str
    outs: tuple[Any, ...]
    arguments: tuple[Any, ...]

    @property
    def out(self) -> Tensor:
        (out,) = self.outs
        assert isinstance(out, Tensor)
        return out


def missing_compiler() -> str | None:
    return None if shutil.which(COMPILER) else f"no C++ compiler: {COMPILER} is not on PATH"


@functools.cache
def build_ext() -> ModuleType:
    """The project's own build, which knows torch's folder, the schemas and the instructions of each file."""
    spec = importlib.util.spec_from_file_location("build_ext", ROOT / "build_ext.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def library() -> Path:
    """The built library; objects are kept in build/simt and named by the hash of all sources."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return link(list(pool.map(build, sources())))


def sources(csrc: Path = CSRC) -> list[Path]:
    names = ["block/block.cpp", "block/cpu.cpp", "common/conv_bn.cpp", "common/reference.cpp", "common/torch.cpp"]
    found = [csrc / name for name in names] + sorted(csrc.glob("*/cuda.cpp"))
    found += [path for path in sorted((csrc / "conv_bn_act").glob("*.cpp")) if path.stem not in ("cuda", "onednn")]
    return [*sorted(HERE.glob("*.cpp")), *found]


def build(source: Path, csrc: Path = CSRC, folder: Path = BUILD) -> Path:
    """The object of ``source`` with the kernels in ``csrc``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schemas.h").write_text(build_ext()._schemas_header())
    flags = [*FLAGS, f"-DTORCH_TARGET_VERSION={_abi_target()}", f"-isystem{build_ext().torch_folder()}/include"]
    for isa, more in build_ext().INSTRUCTIONS.items():
        flags += more.split() * source.stem.endswith(f"_{isa}")
    name = f"{source.parent.name}.{source.stem}-{_digest(csrc, source, flags)}"
    target = folder / f"{name}.o"
    if not target.exists():
        partial = folder / f"{name}.{os.getpid()}.tmp"
        include = [f"-I{csrc}", f"-I{HERE}", f"-I{folder}"]
        _call([COMPILER, *flags, *include, "-c", str(source), "-o", str(partial)])
        partial.replace(target)
    return target


def link(objects: list[Path], folder: Path = BUILD) -> Path:
    name = "host-" + hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    target = folder / f"{name}.so"
    if not target.exists():
        partial = folder / f"{name}.{os.getpid()}.tmp"
        libraries = [f"-L{build_ext().torch_folder()}/lib", "-ltorch_cpu", "-lc10"]
        _call([COMPILER, *FLAGS, "-shared", "-Wl,-Bsymbolic", *map(str, objects), *libraries, "-o", str(partial)])
        partial.replace(target)
    return target


def _abi_target() -> str:
    return "0x" + "".join(f"{part:02x}" for part in build_ext().ABI_TARGET) + "0" * 12


def _digest(csrc: Path, source: Path, flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join((COMPILER, torch.__version__, *flags)).encode())
    headers = [*sorted(HERE.glob("*.h")), *sorted(csrc.rglob("*.h")), *sorted(csrc.rglob("*.cuh"))]
    for path in (*headers, source):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Process:
    """worker.py with a library, and its pipes; it is started anew after a fault."""

    def __init__(self, library: Path) -> None:
        runtimes = [_runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
        environment = {
            **os.environ,
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
            "OMP_NUM_THREADS": "2",
        }
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(library)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
        )  # fmt: skip

    def ask(self, request: object) -> Any:
        """The worker's answer; None where it stopped."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            return None

    def close(self) -> tuple[int, str]:
        """Its exit status, and what it said since it started."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait()
        self.process.stdout.close()
        with self.said as file:
            file.seek(0)
            return status, file.read().decode(errors="replace")


_processes: dict[Path, Process] = {}


def call(
    op: str, *arguments: object, shift: dict[int, int] | None = None, apart: bool = False, **settings: int
) -> Answer:
    """Call ``op``, "namespace::name". Every tensor among ``arguments`` is copied into a block of exactly its extent, so
    that the sanitizer sees every access past its end.

    Args:
        shift: the number of bytes by which an argument, given by its place, misses 64-byte alignment.
        apart: in a process of its own, for a call that is meant to fail.
        settings: of resnet_fused_host::set, in host.cpp.

    Raises:
        Refused: the op raised.
        RunnerError: the runtime or a sanitizer found a fault.
    """
    path = library()
    if path not in _processes:
        _processes[path] = Process(path)
    answer = _processes[path].ask((op, arguments, shift or {}, settings, apart))
    if answer is None:
        status, text = _processes.pop(path).close()
        raise RunnerError(f"exit status {status}\n{text}")
    kind, *values = answer
    if kind == "fault":
        raise RunnerError("exit status {}\n{}".format(*values))
    if kind == "refused":
        raise Refused(values[0])
    return Answer(*values)


def stop(path: Path) -> None:
    """End the process of this library."""
    if path in _processes:
        _processes.pop(path).close()


@atexit.register
def _stop_all() -> None:
    for path in list(_processes):
        stop(path)


def _runtime(name: str) -> str:
    return subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
