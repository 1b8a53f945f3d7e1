"""The environment of a measured choice: each device, driver and library version has a table of its own."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent
DRIVER = Path("/proc/driver/nvidia/version")


def describe(device: torch.device) -> dict[str, str]:
    """Device, driver and library versions as text; on a CPU also how many threads compute."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return dict(_describe("cuda", index))
    return dict(_describe(device.type, torch.get_num_threads()))


@functools.cache
def _describe(kind: str, number: int) -> tuple[tuple[str, str], ...]:
    import resnet_fused

    facts = {"resnet_fused": resnet_fused.__version__, "torch": torch.__version__}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(number)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "driver": driver_version(),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(torch.backends.cudnn.version()),
            "triton": _version("triton"),
        }
    else:
        onednn = re.search(r"DNN v([\d.]+)", torch.__config__.show())
        facts |= {
            "device": cpu_name() if kind == "cpu" else kind,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(number),
            "onednn": onednn.group(1) if onednn else "",
        }
    return tuple(sorted(facts.items()))


def device_alone(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that a table to be shipped is bound to."""
    return {key: environment[key] for key in ("device", "capability", "threads") if key in environment}


def cache_directory() -> Path:
    """``$RESNET_FUSED_CACHE``, else ``resnet_fused`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.

    Raises:
        OSError: neither variable is set, and the user has no home directory.
    """
    own = os.environ.get("RESNET_FUSED_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fused"
    except RuntimeError as error:
        raise OSError(f"there is no cache directory: {error} Set RESNET_FUSED_CACHE to a directory.") from error


def path_for(environment: dict[str, str]) -> Path:
    """The user's own table for this environment.

    Raises:
        OSError: see :func:`cache_directory`.
    """
    digest = hashlib.sha256(repr(sorted(environment.items())).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", environment["device"]).strip("-")
    return cache_directory() / "tuning" / f"{name}-{digest}.json"


def cpu_name() -> str:
    """The CPU's model, or its architecture where the system does not give the model."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return (found.group(1).strip() if found else platform.processor()) or platform.machine()


def driver_version() -> str:
    """The CUDA driver's version, or the CUDA version that it serves where only that can be read."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group(1) if found else str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
