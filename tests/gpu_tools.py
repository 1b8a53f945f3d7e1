"""A CUDA device that the CPU stands in for: what torch.cuda would say of it, and tensors that say they are there."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.tuning import environment, lookup

GPU = torch.device("cuda", 0)
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (x@y)\nGCC version: 12.3.0\n"


class Properties:
    name, major, minor, multi_processor_count, L2_cache_size, uuid = "A GPU", 9, 0, 132, 1 << 10, "1f-2e"


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at, self.on = time.perf_counter(), Current.device

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        assert self.on == other.on
        return 1e3 * (other.at - self.at)


class Graph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Current:
    """torch.cuda.device: the device that is current within it."""

    device = torch.device("cuda", 0)

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"
        self.wanted = device

    def __enter__(self) -> None:
        self.before, Current.device = Current.device, self.wanted

    def __exit__(self, *exc: object) -> None:
        Current.device = self.before


@pytest.fixture(name="gpu")
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Properties]]:
    """torch.cuda as it is where there is one device, whose properties a test may change."""
    properties = type("OfThisTest", (Properties,), {})
    told = {
        "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "device": Current,
        "synchronize": lambda device=None: None, "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: properties.name, "get_device_capability": lambda device: (9, 0),
        "current_device": lambda: Current.device.index,
        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext,
        "reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350,
        "get_rng_state": lambda device: torch.tensor([7]), "set_rng_state": lambda state, device: None,
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "driver")
    environment.DRIVER.write_text(DRIVER.format("580.82.07"))
    environment._describe.cache_clear()
    yield properties
    environment._describe.cache_clear()
    lookup.forget()


@pytest.fixture(name="on_gpu")
def _on_gpu(gpu: type[Properties], monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors of the CPU say of themselves that they are on GPU; kernels never hear of it. Eager PyTorch alone
    computes there, and what a test registers."""
    absent = functools.cache(lambda name: None if name == "reference" else "only the CPU is here")
    monkeypatch.setattr(backends, "_unavailable", absent)
    monkeypatch.setattr(Tensor, "device", property(lambda self: torch.device("meta") if self.is_meta else GPU))
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: not self.is_meta))
    empty = torch.empty_strided

    def here(*args: Any, device: torch.device | str | None = None, **options: Any) -> Tensor:
        return empty(*args, device=None if device == GPU else device, **options)

    monkeypatch.setattr(torch, "empty_strided", here)
    move = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, *a, **o: self if a == (GPU,) and not o else move(self, *a, **o))
