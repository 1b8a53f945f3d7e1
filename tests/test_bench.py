"""The harness: gate before clock, rows, resuming, and the CUDA paths of the clock with the CPU standing in."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import roofline
from resnet_fused.testing.bench import cases, contenders, environment, measure, store, summary
from resnet_fused.testing.bench.machine import CUDAMachine, Machine, measure_rates

CPU = torch.device("cpu")
RATES = roofline.Device("toy", {torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9)
QUICK = measure.Plan(repeats=3, min_seconds=1e-5)
FACTS = dict.fromkeys(store.ENVIRONMENT, "x")


class StandIn(Machine):
    """A CPU that says it has a second cache state and graphs; what it is asked for is kept."""

    caches = ("warm", "cold")
    graphs = True

    def __init__(self):
        super().__init__(CPU)
        self.captured = []

    def graph(self, call):
        self.captured.append(call)
        return lambda: call()


@pytest.fixture
def case():
    return next(c for c in cases.cases("kernels", batches=[2], dtypes=[torch.float32], size=32) if "add" in c.id)


def pool(*names):
    present, _ = contenders.table(CPU)
    return {name: present[name] for name in names or ("eager NCHW", "eager channels_last", "fused")}


@pytest.mark.parametrize("suite", cases.SUITES)
def test_every_suite_has_cases_and_they_run(suite):
    found = cases.cases(suite, batches=[1, 3], dtypes=[torch.float32], models=["resnet18"], size=32)
    assert len({c.id for c in found}) == len(found) >= 2
    rows = measure.measure_case(found[0], pool(), Machine(CPU), RATES, QUICK)
    assert [row["status"] for row in rows] == ["ok"] * 3, rows
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["roofline_pct"] == pytest.approx(100 * row["bound_ms"] / row["p50_ms"])


def test_warm_cold_and_graph_rows(case, tmp_path):
    machine, path = StandIn(), tmp_path / "x.csv"
    (outcome,) = measure.run([case], pool(), machine, RATES, FACTS, path, plan=QUICK)
    names = {"eager NCHW", "eager channels_last", "fused"}
    assert {(r["contender"], r["cache"]) for r in outcome.rows} == {
        (name + tail, cache) for name in names for tail in ("", measure.GRAPH) for cache in ("warm", "cold")
    }
    assert len(machine.captured) == 3
    assert all(r["status"] == "ok" for r in outcome.rows)
    rows, problems = store.read(path)
    assert len(rows) == 12 and not problems
    assert all(row[key] == "x" for row in rows for key in store.ENVIRONMENT)


def test_a_graph_that_gives_something_else_is_red(case):
    class Wrong(StandIn):
        def graph(self, call):
            return lambda: call() + 1

    rows = measure.measure_case(case, pool("fused"), Wrong(), RATES, QUICK)
    assert {r["contender"]: r["status"] for r in rows} == {"fused": "ok", "fused + graph": "red"}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    wanted = cases.cases("kernels", batches=[1], dtypes=[torch.float32], models=["resnet18"], size=32)[:3]
    path, who = tmp_path / "x.csv", pool("eager NCHW", "fused")
    steps = measure.run(wanted, who, Machine(CPU), RATES, FACTS, path, plan=QUICK)
    next(steps), next(steps)
    again = list(measure.run(wanted, who, Machine(CPU), RATES, FACTS, path, plan=QUICK))
    assert [o.resumed for o in again] == [True, True, False]
    other = FACTS | {"commit": "y"}
    assert not any(o.resumed for o in measure.run(wanted, who, Machine(CPU), RATES, other, path, plan=QUICK))
    assert not any(
        o.resumed for o in measure.run(wanted, who, Machine(CPU), RATES, FACTS, path, plan=QUICK, fresh=True)
    )


def test_wrong_numbers_have_no_time(case):
    def spoiled(case, module, inputs):
        return lambda: module(*inputs) + 1e-3

    def broken(case, module, inputs):
        raise RuntimeError("no such kernel")

    table = pool("eager NCHW") | {"fused[bad]": spoiled, "fused[broken]": broken, "peer": broken}
    rows = {r["contender"]: r for r in measure.measure_case(case, table, Machine(CPU), RATES, QUICK)}
    assert rows["fused[bad]"]["status"] == rows["fused[broken]"]["status"] == "red"
    assert rows["peer"]["status"] == "absent" and "no such kernel" in rows["peer"]["note"]
    assert "p50_ms" in rows["eager NCHW"] and rows["eager NCHW"]["p50_ms"]
    assert not any(rows[name]["p50_ms"] for name in ("fused[bad]", "fused[broken]", "peer"))


def test_peers_are_contenders_where_installed(case):
    present, absent = contenders.table(CPU, compiled=True)
    assert {"compile", "compile max-autotune freezing"} <= set(present)
    for name in ("onnxruntime", "openvino"):
        installed = importlib.util.find_spec(name) is not None
        assert (name in present) == installed and (name in absent) != installed
    conv = next(c for c in cases.cases("kernels", batches=[1], dtypes=[torch.float32], size=32) if "k3s1" in c.id)
    names = [n for n in ("eager NCHW", "onnxruntime", "openvino") if n in present]
    rows = measure.measure_case(conv, {n: present[n] for n in names}, Machine(CPU), RATES, QUICK)
    assert [r["status"] for r in rows] == ["ok"] * len(names), rows


# The clock of a CUDA device, with the CPU standing in for it


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


# Figures


def test_rates_are_of_this_machine():
    rates = measure_rates(Machine(CPU), "here", (torch.float32,), size=128)
    assert rates.bytes_per_s > 1e6 and rates.rate(torch.float32) > 1e6


def test_the_environment_is_told_whole():
    facts = environment.describe(CPU)
    assert tuple(facts) == store.ENVIRONMENT
    assert all(facts[key] for key in ("device", "cpu", "python", "torch", "threads"))


def test_broken_rows_are_told_with_their_line(tmp_path):
    path = tmp_path / "x.csv"
    good = dict.fromkeys(store.COLUMNS, "") | {"suite": "kernels", "status": "ok", "p50_ms": 1.0}
    store.append(path, [good, good | {"status": "fast"}, good | {"p50_ms": "soon"}, good | {"p50_ms": 0}, good])
    with path.open("a") as file:
        file.write("a,b\n")
    rows, problems = store.read(path)
    assert len(rows) == 2
    assert [p.split(":")[1] for p in problems] == ["3", "4", "5", "7"]
    (tmp_path / "y.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"y.csv:1: the header"):
        store.read(tmp_path / "y.csv")


def test_speedups_are_over_the_faster_eager_layout():
    base = {"suite": "s", "case": "c", "dtype": "float32", "cache": "warm", "status": "ok"}
    rows = [
        base | {"contender": n, "p50_ms": t} for n, t in (("eager NCHW", 4), ("eager channels_last", 2), ("fused", 1))
    ]
    assert summary.speedups(rows) == {
        ("s", "c", "float32", "warm"): {"eager NCHW": 0.5, "eager channels_last": 1, "fused": 2}
    }
    assert summary.geometric_mean([1, 4]) == 2


def test_the_csv_is_plain(case, tmp_path):
    list(
        measure.run(
            [case],
            pool("fused"),
            Machine(CPU),
            RATES,
            FACTS | {"device": 'a "b", c\nd'},
            tmp_path / "x.csv",
            plan=QUICK,
        )
    )
    with (tmp_path / "x.csv").open(newline="") as file:
        (row,) = list(csv.DictReader(file))
    assert row["device"] == 'a "b", c d'


def test_modules_are_what_they_say():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    module = cases.ConvBNAddAct(conv, "relu").eval()
    x, r = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(module.fused("reference")(x, r), F.relu(module.bn(conv(x)) + r))
