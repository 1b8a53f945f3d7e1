"""The harness: gate before clock, rows, resuming, who competes, training steps and whole models."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from bench_tools import CPU, FACTS, QUICK, RATES, StandIn, _case, pool  # noqa: F401, a fixture
from torch import nn

from resnet_fused import roofline
from resnet_fused.testing.bench import cases, contenders, measure, store, suites, summary
from resnet_fused.testing.bench.machine import Machine, measure_rates


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


def test_rates_are_of_this_machine():
    rates = measure_rates(Machine(CPU), "here", (torch.float32,), size=128)
    assert rates.bytes_per_s > 1e6 and rates.rate(torch.float32) > 1e6


def test_modules_are_what_they_say():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    module = cases.ConvBNAddAct(conv, "relu").eval()
    x, r = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(module.fused("reference")(x, r), F.relu(module.bn(conv(x)) + r))
