"""The machine: its versions, the library built for its device, the rates that its roofline rests on."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_first.steps import ROOT, find
from resnet_fused.testing.bench import environment
from resnet_fused.testing.bench.machine import machine_for, measure_cache, measure_rates

BACKENDS = ("cuda", "triton", "cudnn")
PACKAGES = ("torch", "triton", "torchvision", "timm", "transformers", "numpy", "hypothesis", "pytest", "pytest-xdist",
            "pytest-timeout", "rich", "pandas", "safetensors", "pybind11", "ninja")  # fmt: skip
TOOLS = {"nvidia-smi": ""} | dict.fromkeys(("nvcc", "ncu", "compute-sanitizer", "g++"), "--version")


def versions(out: Path, device: torch.device) -> int:
    """Prints what is here and writes it to versions.json."""
    facts: dict[str, Any] = dict(environment.describe(device))
    facts |= {"platform": platform.platform(), "cores": os.cpu_count(), "packages": {}, "tools": {}}
    if device.type == "cuda":
        facts["properties"] = str(torch.cuda.get_device_properties(device))
    for name in PACKAGES:
        try:
            facts["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["packages"][name] = "absent"
    for name, flag in TOOLS.items():
        path = find(name)
        facts["tools"][name] = _first_lines([path, flag] if flag else [path]) if path else "absent"
    (out / "versions.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(facts, indent=1, ensure_ascii=False))
    print(f"figure: {facts['device']}, torch {facts['torch']}, triton {facts['triton']}, driver {facts['driver']}")
    return 0


def _first_lines(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "\n".join(done.stdout.splitlines()[:20])


def build(dry: bool) -> int:
    """Builds the library in place for the device's architecture alone, with this interpreter and no installation; then
    every backend of a CUDA device must be available in a fresh process."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    wanted = {}
    if dry:
        command.append("--help")  # setup.py is run, and nothing compiled
    else:
        major, minor = torch.cuda.get_device_capability()
        wanted = {"RESNET_FUSED_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    print(" ".join(f"{key}={value}" for key, value in wanted.items()), *command, flush=True)
    code = subprocess.run(command, cwd=ROOT, env=os.environ | wanted).returncode
    absent = refusals()
    for name, reason in absent.items():
        print(f"{name}: {reason}")
    if dry:
        print("figure: setup.py runs; nothing compiled, no backend asserted")
        return code
    here = ", ".join(name for name in BACKENDS if name not in absent) or "none"
    print(f"figure: setup.py's exit code {code}; for sm_{major}{minor}; available: {here}")
    return 1 if code or absent else 0


def refusals() -> dict[str, str]:
    """Of a CUDA device's backends those that a fresh process finds unavailable, with the reason."""
    program = "import json; from resnet_fused import backends as b\n"
    program += f"print(json.dumps([b.unavailable(name) for name in {BACKENDS}]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return dict.fromkeys(BACKENDS, done.stderr.strip().splitlines()[-1])
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: reason for name, reason in zip(BACKENDS, answers, strict=True) if reason is not None}


def rates(out: Path, device: torch.device) -> int:
    """Writes rates.csv: copies through memory and through half of L2, matrix products of random values."""
    cuda = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,)
    with environment.pinned(device):
        machine = machine_for(device)
        found = measure_rates(machine, environment.describe(device)["device"], dtypes, size=None if cuda else 256)
        cached = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 1 << 20
        l2 = measure_cache(machine, cached // 2)
        flags = environment.flags()
    rows = [("copy, memory", "TB/s", found.bytes_per_s / 1e12), ("copy, half of L2", "TB/s", l2 / 1e12)]
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in dtypes}
    rows += [(f"matrix product, {names[dtype]}", "TFLOP/s", found.rate(dtype) / 1e12) for dtype in dtypes]
    with (out / "rates.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("what", "unit", "rate", "device", "flags"))
        writer.writerows((name, unit, f"{rate:.4g}", found.name, flags) for name, unit, rate in rows)
    for name, unit, rate in rows:
        print(f"{name}: {rate:.4g} {unit}")
    print("figure: " + ", ".join(f"{name.partition(', ')[2]} {rate:.3g} {unit}" for name, unit, rate in rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("versions", "build", "rates"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", 0)
    if args.what == "build":
        return build(args.dry_run)
    return versions(args.out, device) if args.what == "versions" else rates(args.out, device)


if __name__ == "__main__":
    sys.exit(main())
