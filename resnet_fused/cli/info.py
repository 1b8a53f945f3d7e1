"""``resnet-fused info``: versions, devices and backends, and why a backend is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch
from rich.table import Table

import resnet_fused
from resnet_fused import backends, extension
from resnet_fused.cli.common import add_json_option, console, print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="devices, versions, and which backends are here", description=__doc__)
    add_json_option(parser)
    parser.set_defaults(run=run)


def gather() -> dict[str, Any]:
    """Everything that ``info`` prints, as plain values."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "versions": {
            "resnet_fused": resnet_fused.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": cudnn,
        },
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "devices": [_device(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        "backends": backends.available(),
        "library": _library(),
    }


def run(args: argparse.Namespace) -> int:
    facts = gather()
    if args.json:
        print_json(facts)
        return 0
    out = console()
    table = Table(show_header=False, box=None)
    for name, version in facts["versions"].items():
        table.add_row(name, "not here" if version is None else str(version))
    cpu = facts["cpu"]
    table.add_row("CPU", f"{cpu['machine']}, {cpu['capability']}, {cpu['threads']} threads")
    for device in facts["devices"]:
        table.add_row(
            device["name"],
            f"{device['description']}, sm_{device['capability']}, {device['memory_gib']:.0f} GiB, "
            f"{device['multiprocessors']} multiprocessors",
        )
    out.print(table)
    out.print()
    table = Table("backend", "here", "why not", box=None)
    for name, reason in facts["backends"].items():
        table.add_row(name, "no" if reason else "yes", reason or "")
    out.print(table)
    out.print()
    library = facts["library"]
    if library["missing"]:
        out.print(f"compiled library: {library['missing']}")
        return 0
    table = Table("compiled library", "", show_header=True, box=None)
    for name, value in library["build_info"].items():
        table.add_row(name, value or "none")
    for name, value in library["kernels"].items():
        table.add_row(f"kernels for {name}", f"{value['count']}, at most {value['registers']} registers, "
                      f"{value['spill']} bytes spilled")  # fmt: skip
    out.print(table)
    return 0


def _library() -> dict[str, Any]:
    """The compiled library: why it is missing, or what it was built with and what its kernels cost."""
    reason = extension.missing()
    if reason is not None:
        return {"missing": reason, "build_info": {}, "kernels": {}}
    module = extension.module()
    kernels: dict[str, dict[str, int]] = {}
    for row in module.kernel_resources():
        entry = kernels.setdefault(row["architecture"], {"count": 0, "registers": 0, "spill": 0})
        entry["count"] += 1
        entry["registers"] = max(entry["registers"], row["registers"])
        entry["spill"] += row["spill"]
    return {"missing": None, "build_info": module.build_info(), "kernels": kernels}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": f"cuda:{index}",
        "description": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
    }
