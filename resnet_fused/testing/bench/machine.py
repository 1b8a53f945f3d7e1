"""The clock of a device, warm and cold, its graphs, and the two rates of its roofline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused.roofline import Device
from resnet_fused.testing.timing import Sample, cpu_seconds, cuda_seconds, current, interleaved

Call = Callable[[], Any]


class Machine:
    """A device to time on. ``caches`` are the states of its cache that a figure is taken in.

    "warm": calls follow one another, nothing else queued: the longer of launching and computing. "cold" (CUDA): the L2
    cache is overwritten before each call, and since that keeps the device busy while the call is launched, the figure
    is of computing alone.
    """

    caches: tuple[str, ...] = ("warm",)
    graphs = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sample(self, cache: str) -> Sample:
        """The function that takes one sample with the cache in this state."""
        if cache not in self.caches:
            raise ValueError(f"cache: got {cache!r}, need one of {self.caches}")
        return cpu_seconds

    def peak_bytes(self, call: Call) -> int | None:
        """Memory that ``call`` takes at its peak, beyond what is taken before it; None where that is not counted."""
        return None

    def graph(self, call: Call) -> Call:
        """``call`` captured as a graph, to be replayed in one launch; only where ``graphs`` is true."""
        raise NotImplementedError(f"{self.device} has no graphs")


class CUDAMachine(Machine):
    """A CUDA device."""

    caches = ("warm", "cold")
    graphs = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        cached = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.empty(max(4 * cached, 1 << 26), dtype=torch.int8, device=device)

    def sample(self, cache: str) -> Sample:
        super().sample(cache)
        return cuda_seconds if cache == "warm" else self._cold_seconds

    def _cold_seconds(self, call: Call, loops: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(loops)]
        torch.cuda.synchronize(self.device)
        for start, end in pairs:
            self._scratch.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return float(sum(start.elapsed_time(end) for start, end in pairs)) / 1e3 / loops

    def peak_bytes(self, call: Call) -> int | None:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.inference_mode():
            call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def graph(self, call: Call) -> Call:
        captured = torch.cuda.CUDAGraph()
        with current(self.device), torch.inference_mode():  # what a gradient would need is no part of the graph
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            with torch.cuda.graph(captured):
                out = call()

        def replay() -> Any:
            captured.replay()
            return out

        return replay


def machine_for(device: torch.device) -> Machine:
    """The machine of a CPU or CUDA device."""
    return CUDAMachine(device) if device.type == "cuda" else Machine(device)


def measure_cache(machine: Machine, nbytes: int) -> float:
    """Bytes per second, read and written, of copies between two buffers that together fill ``nbytes`` of a cache."""
    source = torch.randn(nbytes // 8, device=machine.device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(50):
            target.copy_(source)

    call = machine.graph(copies) if machine.graphs else copies
    timing = interleaved({"": call}, device=machine.device, repeats=10, sample=machine.sample("warm"))
    return 50 * 2 * source.numel() * source.element_size() / timing[""].percentile(20)


def measure_rates(machine: Machine, name: str, dtypes: tuple[torch.dtype, ...], *, size: int | None = None) -> Device:
    """The device as a roofline: bytes per second of a large copy, FLOP/s of a square matrix product in each dtype.

    ``size`` is the edge of the matrices, and 16 times its square the bytes copied; the default suits the device.
    """
    size = size or (8192 if machine.device.type == "cuda" else 2048)
    source = torch.randn(4 * size * size, device=machine.device)  # zeros may move faster than data
    target = torch.empty_like(source)

    def fastest(call: Call) -> float:
        timing = interleaved({"": call}, device=machine.device, repeats=10, sample=machine.sample("warm"))
        return timing[""].percentile(20)

    bandwidth = 2 * source.numel() * source.element_size() / fastest(lambda: target.copy_(source))
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> Tensor:
            return torch.mm(a, b, out=out)

        rates[dtype] = 2 * size**3 / fastest(product)
    return Device(name, rates, bandwidth)
