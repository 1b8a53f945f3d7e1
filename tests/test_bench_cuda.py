"""The harness on a CUDA device, with the CPU standing in for it: clock, graphs, memory, and the whole path to rows."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from bench_tools import CPU, QUICK, RATES, _case, pool  # noqa: F401, a fixture

from resnet_fused.testing.bench import measure
from resnet_fused.testing.bench.machine import CUDAMachine


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    class Properties:
        L2_cache_size = 1 << 10

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    quiet = {
        "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream,
        "synchronize": lambda device=None: None, "get_device_properties": lambda device: Properties,
        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext,
        "reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350,
    }  # fmt: skip
    for name, value in quiet.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return CUDAMachine(CPU)


def test_cold_samples_overwrite_the_cache_and_time_the_call_alone(fake_cuda):
    order = []
    scratch = fake_cuda._scratch
    assert scratch.numel() >= 1 << 26

    class Spy:
        def zero_(self):
            order.append("flush")
            time.sleep(0.02)

    fake_cuda._scratch = Spy()
    seconds = fake_cuda.sample("cold")(lambda: order.append("call"), 3)
    assert order == ["flush", "call"] * 3
    assert 0 <= seconds < 0.02
    order.clear()
    fake_cuda.sample("warm")(lambda: order.append("call"), 3)
    assert order == ["call"] * 3
    with pytest.raises(ValueError, match="cache"):
        fake_cuda.sample("tepid")


def test_graphs_are_warmed_up_captured_once_and_replayed(fake_cuda):
    calls = []
    replay = fake_cuda.graph(lambda: calls.append(0) or len(calls))
    assert len(calls) == 4, "three to warm up, one captured"
    assert replay() == replay() == 4
    assert len(calls) == 4
    assert fake_cuda.peak_bytes(lambda: None) == 250


def test_the_whole_cuda_path_gives_rows(fake_cuda, case):
    rows = measure.measure_case(case, pool("eager NCHW", "fused"), fake_cuda, RATES, QUICK)
    assert {(r["contender"], r["cache"], r["status"]) for r in rows} == {
        (name, cache, "ok")
        for name in ("eager NCHW", "fused", "eager NCHW + graph", "fused + graph")
        for cache in ("warm", "cold")
    }
