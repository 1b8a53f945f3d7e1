"""Timing side by side: candidates take turns, so that what slows the machine for a while slows them alike."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Sample = Callable[[Callable[[], Any], int], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per repetition."""

    samples: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Seconds below which ``percent`` of the samples lie, interpolated."""
        return float(torch.quantile(torch.tensor(self.samples, dtype=torch.float64), percent / 100))

    @property
    def p20(self) -> float:
        return self.percentile(20)

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p80(self) -> float:
        return self.percentile(80)

    def to_dict(self) -> dict[str, float]:
        """p20, p50 and p80 in milliseconds."""
        return {name: 1e3 * getattr(self, name) for name in ("p20", "p50", "p80")}


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device,
    repeats: int = 20,
    warmup: int = 2,
    min_seconds: float = 2e-3,
    max_seconds: float = math.inf,
    progress: Callable[[], None] | None = None,
    sample: Sample | None = None,
) -> dict[str, Timing]:
    """Time every candidate ``repeats`` times, in turns, caches warm, without recording gradients.

    A turn is one untimed call and one sample, the mean of as many calls as fill ``min_seconds``. On CUDA a sample is
    taken between two events on the current stream with nothing queued before it, so it holds whichever is longer of
    launching and computing; on the CPU it is wall-clock time.

    Args:
        candidates: names and callables without arguments.
        device: where they compute.
        repeats: samples per candidate.
        warmup: calls before the first sample.
        min_seconds: least duration of a sample.
        max_seconds: no new round begins after this long, once there are three.
        progress: called after each round of samples.
        sample: takes one sample, in place of the device's own way: seconds per call over this many calls.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, need at least 1")
    measure = sample or (cuda_seconds if device.type == "cuda" else cpu_seconds)
    with current(device), torch.inference_mode():
        loops = {}
        for name, call in candidates.items():
            for _ in range(warmup):
                call()
            loops[name] = max(1, round(min_seconds / max(measure(call, 1), 1e-9)))
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        end = time.perf_counter() + max_seconds
        for done in range(repeats):
            if done >= 3 and time.perf_counter() > end:
                break
            for name, call in candidates.items():
                call()  # untimed: threads of the one before may still spin, and the caches hold its data
                samples[name].append(measure(call, loops[name]))
            if progress is not None:
                progress()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it events, streams and graphs are this device's, where it is a CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cpu_seconds(call: Callable[[], Any], loops: int) -> float:
    """Wall-clock seconds per call over ``loops`` calls."""
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def cuda_seconds(call: Callable[[], Any], loops: int) -> float:
    """Seconds per call over ``loops`` calls between two events, on the current device's stream with nothing queued."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(loops):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / loops
