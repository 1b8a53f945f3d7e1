"""The harness: gate before clock, rows, resuming, and the CUDA paths of the clock with the CPU standing in."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import roofline
from resnet_fused.testing.bench import cases, contenders, environment, measure, store, suites, summary
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
    return next(c for c in suites.cases("kernels", batches=[2], dtypes=[torch.float32], size=32) if "add" in c.id)


def pool(*names):
    present, _ = contenders.table(CPU)
    return {name: present[name] for name in names or ("eager NCHW", "eager channels_last", "fused")}


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_has_cases_and_they_run(suite):
    found = suites.cases(suite, batches=[1, 3], dtypes=[torch.float32], models=["resnet18"], size=32)
    assert len({c.id for c in found}) == len(found) >= 2
    rows = measure.measure_case(found[0], pool(), Machine(CPU), RATES, QUICK)
    assert [row["status"] for row in rows] == ["ok"] * 3, rows
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["roofline_pct"] == pytest.approx(100 * row["bound_ms"] / row["p50_ms"])
        assert row["bound_ms"] > 0


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
    wanted = suites.cases("kernels", batches=[1], dtypes=[torch.float32], models=["resnet18"], size=32)[:3]
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


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "resnet_fused.cli", "bench", "--suite", "kernels", "--model", "resnet18"]
    command += ["--size", "32", "--batch", "1", "--device", "cpu", "--contender", "eager", "fused", "--repeats", "3"]
    command += ["--case", "conv_bn_act-K64", "--results", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    told = next(line for line in first.stdout if line.startswith("kernels: "))
    first.kill()
    first.communicate()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("kernels: ")]
    assert told.split(":")[1] == lines[0].split(":")[1] and lines[0].endswith("in the file already")
    assert lines[-1].endswith("rows")
    (path,) = tmp_path.glob("*.csv")
    rows, problems = store.read(path)
    assert not problems and len({store.identity(row, row) for row in rows}) == len(rows) == 3 * len(lines)


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


def conv_case(dtype=torch.float32):
    return next(c for c in suites.cases("kernels", batches=[1], dtypes=[dtype], size=32) if "k3s1" in c.id)


def test_peers_are_contenders_where_installed():
    present, absent = contenders.table(CPU)
    for name in contenders.PEERS:
        installed = importlib.util.find_spec(name) is not None
        assert (name in present) == installed and (name in absent) != installed
    names = [n for n in ("eager NCHW", *contenders.PEERS) if n in present]
    rows = measure.measure_case(conv_case(), {n: present[n] for n in names}, Machine(CPU), RATES, QUICK)
    assert [r["status"] for r in rows] == ["ok"] * len(names), rows


def test_peers_in_bfloat16_compute_it_or_say_that_they_cannot():
    pytest.importorskip("openvino"), pytest.importorskip("onnxruntime")
    rows = measure.measure_case(
        conv_case(torch.bfloat16), pool("eager NCHW", *contenders.PEERS), Machine(CPU), RATES, QUICK
    )
    by_name = {row["contender"]: row for row in rows}
    assert by_name["openvino"]["status"] == "ok", by_name["openvino"]["note"]
    assert by_name["onnxruntime"]["status"] == "absent"
    assert by_name["onnxruntime"]["note"] == "unsupported: it has no convolution in bfloat16 on the CPU"
    assert summary.left_out(rows) == ["onnxruntime: unsupported: it has no convolution in bfloat16 on the CPU (1 case)"]


def test_contenders_by_name_and_by_group():
    present, absent = contenders.choose(CPU)
    assert not set(contenders.COMPILED) & set(present) and absent["compile"] == "not asked for"
    assert set(contenders.COMPILED) <= set(contenders.choose(CPU, compiled=True)[0])
    assert list(contenders.choose(CPU, ["fused", "eager"])[0]) == ["eager NCHW", "eager channels_last", "fused"]
    assert list(contenders.choose(CPU, ["compile freezing"])[0]) == ["compile freezing"]
    with pytest.raises(ValueError, match=r"fsued: unknown\. Here are: eager, "):
        contenders.choose(CPU, ["fsued"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"fused\[cudnn\]: no CUDA device"):
            contenders.choose(CPU, ["fused[cudnn]"])
        assert contenders.choose(torch.device("cuda"), ["peers"])[1] == dict.fromkeys(
            contenders.PEERS, "timed on the CPU only"
        )


def test_compile_with_freezing_is_told_to_freeze(case, monkeypatch):
    """What it compiles to is PyTorch's to test: here the compiler is asked and the settings are looked at."""
    seen = []

    def compile(model, **options):
        def run(*inputs):
            seen.append((options["mode"], importlib.import_module("torch._inductor.config").freezing))
            return model(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    rows = measure.measure_case(case, contenders.choose(CPU, ["compiled"])[0], Machine(CPU), RATES, QUICK)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert seen[0] == ("default", False)
    assert ("default", True) in seen and ("max-autotune-no-cudagraphs", True) in seen
    training = suites.cases("training", batches=[2], dtypes=[torch.float32], models=["resnet18"], size=32)[0]
    rows = measure.measure_case(training, contenders.choose(CPU, ["compiled"])[0], Machine(CPU), RATES, QUICK)
    assert [(row["status"], row["note"]) for row in rows[1:]] == [("absent", "inference only")] * 2


# Training steps


def training_case(dtype=torch.float32, kind="batch_norm_act-res", batch=2):
    found = suites.cases("training", batches=[batch], dtypes=[dtype], models=["resnet20"], size=16)
    return next(case for case in found if case.name.startswith(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["batch_norm_act", "batch_norm_act-res", "resnet20"])
def test_training_steps_are_gated_and_timed(dtype, kind):
    names = ("eager NCHW", "eager channels_last", "fused", "fused recompute=last_conv", "folded channels_last")
    case = training_case(dtype, kind, batch=4)
    rows = {r["contender"]: r for r in measure.measure_case(case, pool(*names), StandIn(), RATES, QUICK)}
    assert rows["folded channels_last"]["note"] == "inference only"
    assert {rows[name]["status"] for name in names[:3]} == {"ok"}, rows
    assert {rows[name + measure.GRAPH]["status"] for name in names[:3]} == {"ok"}, rows
    again = rows["fused recompute=last_conv"]
    assert again["status"] == ("ok" if kind == "resnet20" else "absent")
    if kind == "resnet20":
        assert int(again["peak_bytes"]) < int(rows["fused"]["peak_bytes"]) <= int(rows["eager NCHW"]["peak_bytes"])
        assert rows["fused"]["flops"] == 3 * roofline.count(cases.network("resnet20"), (4, 3, 16, 16))["block"].flops
    assert rows["fused"]["note"] == "memory: kept for the gradient"


@pytest.mark.parametrize("wrong", ["output", "gradient", "statistics"])
def test_a_wrong_training_step_is_red(wrong):
    def spoiled(case, module, inputs):
        module = contenders.laid_out(module, torch.contiguous_format)

        def run(x, residual):
            y = module(x, residual)
            if wrong == "gradient":
                return y + 1e-2 * (x - x.detach())
            if wrong == "statistics":
                module.running_var.data.mul_(1.01)  # autograd keeps it, and must not notice
            return y + 1e-2 if wrong == "output" else y

        return case.call(run, inputs, module)

    table = pool("fused") | {"fused[bad]": spoiled}
    rows = measure.measure_case(training_case(), table, Machine(CPU), RATES, QUICK)
    assert {r["contender"]: r["status"] for r in rows} == {"fused": "ok", "fused[bad]": "red"}


# Whole models


def test_models_by_name_are_torchvisions_or_ours_and_fuse():
    assert type(cases.network("resnet18")).__module__.startswith("torchvision")
    (small,) = suites.cases("models", batches=[2], dtypes=[torch.float32], models=["resnet20"], size=None)
    assert small.shapes == ((2, 3, 32, 32),) and small.id == "resnet20-fp32-N2-C3x32x32"
    module, inputs = small.make(CPU)
    fused = small.fused(module, backend="auto")
    with torch.inference_mode():
        torch.testing.assert_close(fused(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)
    assert "forward" in vars(module.layer1[0]) and "forward" not in vars(fused.layer1[0])
    with pytest.raises(ValueError, match="nothing in this model fuses"):
        cases.fuse_network(nn.Sequential(nn.Conv2d(3, 4, 3)))


class Several(nn.Module):
    """A model that gives tensors in a dictionary, one of them no figure."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return {"a": y, "b": [y.mean((1, 2, 3)), y.argmax(1)]}


def test_models_that_give_several_tensors_are_compared_in_all():
    def wrong(case, module, inputs):
        return lambda: {"a": module(*inputs)["a"], "b": [module(*inputs)["b"][0] + 1e-3]}

    case = cases.Case("models", "several", "several", 3, torch.float32, ((3, 3, 8, 8),), Several, lambda m: m, "block")
    rows = measure.measure_case(case, pool("eager NCHW") | {"fused[bad]": wrong}, Machine(CPU), RATES, QUICK)
    assert [r["status"] for r in rows] == ["ok", "red"]


def test_running_out_of_memory_is_a_row(case):
    def greedy(case, module, inputs):
        raise torch.OutOfMemoryError("no")

    rows = measure.measure_case(case, pool("eager NCHW") | {"fused": greedy}, Machine(CPU), RATES, QUICK)
    assert [(r["status"], r["note"]) for r in rows] == [("ok", ""), ("absent", "out of memory")]

    class Large(cases.Case):
        def make(self, device, seed=0):
            raise torch.OutOfMemoryError("no")

    rows = measure.measure_case(Large(**vars(case)), pool("fused"), StandIn(), RATES, QUICK)
    assert {(r["contender"], r["cache"], r["note"]) for r in rows} == {
        (name, cache, "eager runs out of memory") for name in ("fused", "fused + graph") for cache in ("warm", "cold")
    }


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


def test_a_file_of_before_is_read_and_widened(tmp_path):
    path = tmp_path / "x.csv"
    old = dict.fromkeys(store.OLDER, "") | {"suite": "kernels", "status": "ok", "p50_ms": "1.0", "date": "then"}
    path.write_text(",".join(store.OLDER) + "\n" + ",".join(old.values()) + "\nbroken\n")
    rows, problems = store.read(path)
    assert [row["tuning"] for row in rows] == [""] and rows[0]["date"] == "then" and len(problems) == 1
    store.append(path, [dict.fromkeys(store.COLUMNS, "") | {"status": "ok", "p50_ms": 2.0, "tuning": "4 entries"}])
    rows, problems = store.read(path)
    assert [(row["date"], row["tuning"]) for row in rows] == [("then", ""), ("", "4 entries")]
    assert [problem.split(":")[1] for problem in problems] == ["3"]


def test_the_environment_of_a_cuda_device(monkeypatch):
    """As nvidia-smi and PyTorch tell it where there is one."""
    given = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    asked = []

    def answer(*command):
        asked.append(command)
        return "580.1, 1980 MHz, 2619 MHz, 700.00 W" if command[0] == "nvidia-smi" else ""

    monkeypatch.setattr(environment, "_run", answer)
    monkeypatch.setattr(environment.lookup, "summary", lambda device: "3 entries")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    facts = environment.describe(torch.device("cuda", 1))
    assert [*given, "-i", "1"] == list(asked[0])
    wanted = {"device": "A GPU", "driver": "580.1", "clocks": "1980 MHz / 2619 MHz / 700.00 W", "cuda": "13.0"}
    assert {key: facts[key] for key in wanted} == wanted
    assert facts["commit"].startswith("v") and facts["tf32"] in ("True", "False") and facts["tuning"] == "3 entries"
    assert store.path_for(Path("x"), facts).name == f"A-GPU-{torch.__version__}-13.0.csv"


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
