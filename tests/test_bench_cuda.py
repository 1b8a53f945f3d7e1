"""The harness on a CUDA device, with the CPU standing in: clock, graphs, memory, environment, and the whole program."""

from __future__ import annotations

import csv
import importlib
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_tools import CPU, FACTS, QUICK, RATES, _case, pool  # noqa: F401, a fixture
from gpu_tools import GPU, Current, _gpu  # noqa: F401, a fixture
from rich.console import Console

from resnet_fused.testing.bench import environment, measure, program, store
from resnet_fused.testing.bench.machine import CUDAMachine, machine_for, measure_cache, measure_rates

GRAPH = measure.GRAPH


@pytest.fixture
def machine(gpu):
    return CUDAMachine(CPU)


# The clock, graphs and memory.


def test_cold_samples_overwrite_the_cache_and_time_the_call_alone(machine):
    order = []
    scratch = machine._scratch
    assert scratch.numel() >= 1 << 26

    class Spy:
        def zero_(self):
            order.append("flush")
            time.sleep(0.02)

    machine._scratch = Spy()
    seconds = machine.sample("cold")(lambda: order.append("call"), 3)
    assert order == ["flush", "call"] * 3
    assert 0 <= seconds < 0.02
    order.clear()
    machine.sample("warm")(lambda: order.append("call"), 3)
    assert order == ["call"] * 3
    with pytest.raises(ValueError, match="cache"):
        machine.sample("tepid")


def test_graphs_are_warmed_up_captured_once_and_replayed(machine):
    calls = []
    replay = machine.graph(lambda: calls.append(0) or len(calls))
    assert len(calls) == 4, "three to warm up, one captured"
    assert replay() == replay() == 4
    assert len(calls) == 4
    assert machine.peak_bytes(lambda: None) == 250


def test_a_graph_is_of_inference_on_its_own_device(machine):
    machine.device, seen = torch.device("cuda", 1), []
    machine.graph(lambda: seen.append((torch.is_inference_mode_enabled(), Current.device)))
    assert seen == [(True, machine.device)] * 4 and Current.device == GPU


def test_the_machine_of_a_gpu_has_a_scratch_of_four_caches(gpu, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: empty(*shape, **options))
    monkeypatch.setattr(gpu, "L2_cache_size", 50 << 20)
    found = machine_for(GPU)
    assert isinstance(found, CUDAMachine) and found.device == GPU and found._scratch.numel() == 200 << 20
    assert found.caches == ("warm", "cold") and found.graphs


def test_rates_are_taken_between_events(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda self, other: 2.0)
    rates = measure_rates(machine, "here", (torch.float32, torch.bfloat16), size=64)
    took = 2e-3  # of one call, whatever the number of loops that fill a sample
    assert rates.bytes_per_s == pytest.approx(2 * 4 * 4 * 64**2 / took)
    assert rates.rate(torch.bfloat16) == pytest.approx(2 * 64**3 / took)


# Rows.


def test_the_whole_cuda_path_gives_rows(machine, case):
    rows = measure.measure_case(case, pool("eager NCHW", "fused"), machine, RATES, QUICK)
    assert {(r["contender"], r["cache"], r["status"]) for r in rows} == {
        (name, cache, "ok")
        for name in ("eager NCHW", "fused", "eager NCHW" + GRAPH, "fused" + GRAPH)
        for cache in ("warm", "cold")
    }
    assert {r["contender"]: r["peak_bytes"] for r in rows} == {
        "eager NCHW": "250", "fused": "250", "eager NCHW" + GRAPH: "", "fused" + GRAPH: "",
    }  # fmt: skip


def test_what_cannot_be_captured_is_told_in_its_row(machine, case, monkeypatch):
    def capture(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(machine, "graph", capture)
    rows = measure.measure_case(case, pool("eager NCHW", "fused"), machine, RATES, QUICK)
    by_name = {row["contender"]: row for row in rows if row["cache"] == "cold"}
    assert {name: row["status"] for name, row in by_name.items()} == {
        "eager NCHW": "ok", "fused": "ok", "eager NCHW" + GRAPH: "absent", "fused" + GRAPH: "red",
    }  # fmt: skip
    assert "stream is capturing" in by_name["fused" + GRAPH]["note"] and not by_name["fused" + GRAPH]["p50_ms"]


SMI = "580.1, 1980 MHz, 2619 MHz, 700.00 W"


@pytest.fixture
def smi(gpu, monkeypatch):
    """nvidia-smi's answer, which a test may change, and the commands that were run."""
    asked, answers = [], {"nvidia-smi": SMI}
    monkeypatch.setattr(environment, "_run", lambda *command: asked.append(command) or answers.get(command[0], ""))
    return answers, asked


def test_the_environment_of_a_cuda_device(smi, monkeypatch):
    """As nvidia-smi, asked by the device's identity, and PyTorch tell it."""
    monkeypatch.setattr(environment.lookup, "summary", lambda device: "3 entries")
    facts = environment.describe(torch.device("cuda", 1))
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    assert smi[1][0] == ("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "GPU-1f-2e")
    wanted = {"device": "A GPU", "driver": "580.1", "clocks": "1980 MHz / 2619 MHz / 700.00 W", "cuda": "13.0"}
    wanted |= {"cudnn": "91200", "tf32": "True", "tuning": "3 entries"}
    assert {key: facts[key] for key in wanted} == wanted and tuple(facts) == store.ENVIRONMENT
    assert facts["commit"].startswith("v")
    assert store.path_for(Path("x"), facts).name == f"A-GPU-{torch.__version__}-13.0.csv"


def test_what_eager_computes_by_is_pinned_and_recorded(smi):
    """The search for algorithms and both precisions, whatever they were; they are as before afterwards."""
    flags = torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = flags[0].benchmark, flags[1].fp32_precision, flags[2].fp32_precision
    try:
        flags[0].benchmark, flags[1].fp32_precision, flags[2].fp32_precision = False, "ieee", "tf32"
        with pytest.raises(ZeroDivisionError), environment.pinned(GPU):
            facts = environment.describe(GPU)
            assert facts["flags"] == "cudnn.benchmark on conv tf32 matmul ieee" and facts["tf32"] == "True"
            raise ZeroDivisionError
        assert environment.flags() == "cudnn.benchmark off conv ieee matmul tf32"
        with environment.pinned(CPU):
            assert environment.flags() == "cudnn.benchmark off conv ieee matmul tf32"
    finally:
        flags[0].benchmark, flags[1].fp32_precision, flags[2].fp32_precision = before


def test_the_rate_of_a_cache_is_of_copies_in_one_graph(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda self, other: 2.0)
    captured = []
    graph = machine.graph
    monkeypatch.setattr(machine, "graph", lambda call: captured.append(call) or graph(call))
    assert measure_cache(machine, 1 << 16) == pytest.approx(50 * (1 << 16) / 2e-3) and len(captured) == 1


def test_without_nvidia_smi_the_driver_is_still_known(smi):
    smi[0].clear()
    facts = environment.describe(GPU)
    assert (facts["driver"], facts["clocks"]) == ("580.82.07", "")


def test_tf32_is_what_cudnns_convolutions_may_use_however_it_was_set(smi):
    """The older flag's getter raises where the newer one has been set."""
    flags, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    try:
        for value in ("ieee", "tf32"):
            flags.fp32_precision = value
            assert environment.describe(GPU)["tf32"] == str(value == "tf32")
    finally:
        flags.fp32_precision = before


# The program.


def test_the_program_on_a_gpu_writes_prints_and_goes_on(smi, machine, monkeypatch, tmp_path, capsys):
    machine._scratch = torch.empty(1)
    plans = []
    run = measure.run
    monkeypatch.setattr(
        measure, "run", lambda *args, plan, **options: plans.append(plan) or run(*args, plan=plan, **options)
    )
    monkeypatch.setattr(program, "measure_rates", lambda *args: RATES)
    options = program.Options(
        GPU, tmp_path, ("kernels",), ("resnet18",), (2,), size=32, case="add_relu-fp32-N2-C64x8", repeats=3,
        contender=("eager", "fused", "peers"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="onnxruntime: timed on the CPU only"):
        program.execute(program.Options(GPU, tmp_path, contender=("onnxruntime",)), Console(), machine)
    out = Console(width=160, highlight=False)
    result = program.execute(options, out, machine)
    assert result.ok and result.added == len(result.rows) == 3 * 2 * 2
    assert plans[0].gate_images is None, "on a GPU every image is compared"
    assert result.path.name == f"A-GPU-{torch.__version__}-13.0.csv"
    with result.path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert {(row["driver"], row["clocks"], row["tf32"]) for row in written} == {
        ("580.1", "1980 MHz / 2619 MHz / 700.00 W", "True")
    }
    assert {row["flags"] for row in written} == {"cudnn.benchmark on conv tf32 matmul ieee"}
    assert environment.flags() != "cudnn.benchmark on conv tf32 matmul ieee", "as it was before"
    told = capsys.readouterr().out
    assert "absent: openvino: timed on the CPU only" in told
    assert all(text in told for text in ("cache warm", "cache cold", "fused + graph", "MiB"))
    again = program.execute(options, out, machine)
    assert again.added == 0 and len(again.rows) == len(written)
    smi[0]["nvidia-smi"] = SMI.replace("580.1", "590.2")
    assert program.execute(options, out, machine).added == len(written), "another driver is another environment"


def test_pytest_benchmark_waits_for_the_gpu(monkeypatch, case):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    monkeypatch.delitem(sys.modules, "test_bench", raising=False)
    timed = importlib.import_module("test_bench")
    assert "/bench/" in timed.__file__.replace("\\", "/")
    monkeypatch.delitem(sys.modules, "test_bench")
    order = []
    entrant = measure.Entrant("ok", lambda: order.append("call"), 0.5)
    monkeypatch.setattr(measure, "enter", lambda *args: {"fused": entrant})
    monkeypatch.setattr(timed, "machine_for", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(device))
    monkeypatch.setattr(type(case), "make", lambda self, device: (None, ()))

    class Benchmark:
        extra_info: dict = {}  # noqa: RUF012

        def __call__(self, run):
            run()

    timed.test_bench(Benchmark(), case, "fused", GPU)
    assert order == ["call", GPU]
