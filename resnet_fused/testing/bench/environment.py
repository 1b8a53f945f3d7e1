"""The environment of a figure: all that has to be the same to measure it again."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import resnet_fused
from resnet_fused import registry
from resnet_fused.testing.bench.contenders import PEERS
from resnet_fused.tuning import lookup
from resnet_fused.tuning.environment import cpu_name, driver_version

_ROOT = Path(__file__).resolve().parents[3]


def describe(device: torch.device) -> dict[str, str]:
    """Text for every column of ``store.ENVIRONMENT``; empty where it does not apply."""
    cuda = device.type == "cuda"
    onednn = re.search(r"v([\d.]+)", _config_line("DNN v"))
    driver, clocks = _nvidia_smi(device) if cuda else ("", "")
    cudnn = torch.backends.cudnn.version() if cuda else None
    cudnn_flags: Any = torch.backends.cudnn  # the getter of allow_tf32 raises where a newer flag has been set
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cpu": cpu_name(),
        "driver": driver,
        "clocks": clocks,
        "cuda": torch.version.cuda or "",
        "cudnn": str(cudnn or ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "onednn": onednn.group(1) if onednn else "",
        "threads": str(torch.get_num_threads()),
        "tf32": str(cudnn_flags.conv.fp32_precision == "tf32") if cuda else "",
        "commit": commit(_ROOT) or f"v{resnet_fused.__version__}",
        "peers": " ".join(f"{name} {version}" for name, version in _peers().items() if version),
        "tuning": lookup.summary(device),
        "flags": flags() if cuda else "",
    }


def flags() -> str:
    """What decides how eager PyTorch computes on a CUDA device, as it is set now."""
    backends: Any = torch.backends
    precision = f"conv {backends.cudnn.conv.fp32_precision} matmul {backends.cuda.matmul.fp32_precision}"
    return f"cudnn.benchmark {'on' if backends.cudnn.benchmark else 'off'} {precision}"


@contextlib.contextmanager
def pinned(device: torch.device) -> Iterator[None]:
    """Within it what decides how eager PyTorch computes on a CUDA device is the same in every run, whatever it was.

    cuDNN tries its algorithms and keeps the fastest, which is how users make eager fast; float32 convolutions may use
    TF32 and float32 matrix products may not, which is PyTorch's default.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    conv, matmul = backends.cudnn.conv, backends.cuda.matmul
    before = backends.cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision
    try:
        backends.cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision = True, "tf32", "ieee"
        yield
    finally:
        backends.cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision = before


def commit(root: Path) -> str:
    """The commit checked out in ``root``, ``+`` and a digest of what is changed in the package; empty without git."""
    sources = ("--", "resnet_fused", "csrc")
    head = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not head or not (root / ".git").exists():
        return ""
    changes = _run("git", "-C", str(root), "diff", "HEAD", *sources)
    untracked = _run("git", "-C", str(root), "ls-files", "--others", "--exclude-standard", *sources)
    if not changes and not untracked:
        return head
    digest = hashlib.sha256(changes.encode())
    for name in untracked.splitlines():
        digest.update(name.encode() + (root / name).read_bytes())
    return f"{head}+{digest.hexdigest()[:8]}"


def _peers() -> dict[str, str]:
    """Versions of the peers, and digests of the files with a user's backends."""
    return {name: _version(name) for name in PEERS} | registry.LOADED


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _config_line(part: str) -> str:
    return next((line for line in torch.__config__.show().splitlines() if part in line), "")


def _nvidia_smi(device: torch.device) -> tuple[str, str]:
    """Driver version and the highest clocks, as the tool prints them; without it the driver alone."""
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    # By its identity: the tool counts all devices, PyTorch those that CUDA_VISIBLE_DEVICES leaves.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", uuid)
    driver, _, rest = line.partition(",")
    return driver or driver_version(), rest.strip().replace(", ", " / ")
