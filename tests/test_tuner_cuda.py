"""The tuner on a CUDA device, with the CPU standing in: what a table is kept by, candidates, and the whole path."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from gpu_tools import DRIVER, GPU, Current, _gpu, _on_gpu  # noqa: F401, the fixtures
from tuning_tools import _own_tables, _register, clock, conv_call, network, run_auto  # noqa: F401, the fixtures

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.modules import network_plan
from resnet_fused.ops.block import BlockCall
from resnet_fused.testing import timing
from resnet_fused.tuning import environment, lookup, table, tuner, verify
from resnet_fused.tuning.table import Entry

pytestmark = pytest.mark.usefixtures("one_thread")


# What a table is kept by.


def test_the_environment_of_a_gpu(gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or gpu)
    facts = environment.describe(torch.device("cuda", 1))
    assert asked == [1] and environment.describe(torch.device("cuda"))["device"] == "A GPU" and asked == [1, 0]
    assert facts == {
        "resnet_fused": rf.__version__, "torch": torch.__version__, "device": "A GPU", "capability": "9.0",
        "multiprocessors": "132", "driver": "580.82.07", "cuda": "13.0", "cudnn": "91200",
        "triton": environment._version("triton"),
    }  # fmt: skip
    assert environment.device_alone(facts) == {"device": "A GPU", "capability": "9.0"}
    assert environment.path_for(facts).name.startswith("A-GPU-")


def test_the_driver_is_read_or_asked_for(gpu, monkeypatch):
    assert environment.driver_version() == "580.82.07"
    environment.DRIVER.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"
    )
    assert environment.driver_version() == "535.104.05"
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    environment.DRIVER.write_text("something else")
    assert environment.driver_version() == "13000"
    environment.DRIVER.unlink()  # as under WSL
    assert environment.driver_version() == "13000"


CHANGES = {
    "device": lambda gpu, patch: patch.setattr(gpu, "name", "Another GPU"),
    "capability": lambda gpu, patch: patch.setattr(gpu, "minor", 1),
    "multiprocessors": lambda gpu, patch: patch.setattr(gpu, "multi_processor_count", 78),
    "driver": lambda gpu, patch: environment.DRIVER.write_text(DRIVER.format("590.1")),
    "cuda": lambda gpu, patch: patch.setattr(torch.version, "cuda", "13.1"),
    "cudnn": lambda gpu, patch: patch.setattr(torch.backends.cudnn, "version", lambda: 91300),
    "triton": lambda gpu, patch: patch.setattr(environment, "_version", lambda package: "4.0"),
    "torch": lambda gpu, patch: patch.setattr(torch, "__version__", "2.99"),
    "resnet_fused": lambda gpu, patch: patch.setattr(rf, "__version__", "99"),
}


@pytest.mark.parametrize("fact", CHANGES)
def test_another_fact_is_another_table(fact, gpu, monkeypatch, caplog):
    before = environment.describe(GPU)
    table.merge(environment.path_for(before), before, {"a": Entry("triton")})
    assert lookup.summary(GPU).startswith("1 entries")
    CHANGES[fact](gpu, monkeypatch)
    environment._describe.cache_clear()
    lookup.forget()
    after = environment.describe(GPU)
    assert {key for key in before if before[key] != after[key]} == {fact}
    assert environment.path_for(after) != environment.path_for(before)
    assert lookup.summary(GPU) == ""
    with pytest.raises(table.TableError, match=f"it is for {fact} "):
        table.read(environment.path_for(before), after)
    assert not caplog.text and environment.path_for(before).exists(), "the other table is left as it was"


def test_what_is_shipped_for_a_gpu_holds_for_every_driver(gpu, own_tables, monkeypatch):
    tuner.ship([tuner.Tuned("a", Entry("triton"))], GPU, own_tables / "shipped" / "gpu.json")
    for fact in ("driver", "cuda", "cudnn", "torch"):
        CHANGES[fact](gpu, monkeypatch)
    environment._describe.cache_clear()
    lookup.forget()
    assert lookup.summary(GPU).startswith("1 entries")
    CHANGES["device"](gpu, monkeypatch)
    environment._describe.cache_clear()
    lookup.forget()
    assert lookup.summary(GPU) == ""


def test_keys_name_the_switches_of_cudnn_and_not_the_threads(on_gpu, monkeypatch):
    call = conv_call()

    def key() -> str:
        return lookup.key("conv_bn_act", call).split(" ")[1]

    assert key() == "tf32"
    for name in ("benchmark", "deterministic"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cudnn, name, True)
            assert key() == f"tf32+{name}"
    monkeypatch.setattr(torch.backends.cudnn, "conv", type("Flags", (), {"fp32_precision": "ieee"}))
    assert key() == "ieee"
    before = lookup.key("conv_bn_act", call)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert lookup.key("conv_bn_act", call) == before


# Candidates.


def test_candidates_begin_with_the_static_choice_and_have_all_configs(on_gpu, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from resnet_fused.ops.conv_bn_act import cudnn, triton, triton_config

    call, calls = conv_call(), []
    with lookup.recording(lambda op, call: calls.append((op, call))), torch.no_grad():
        rf.FusedBottleneck(256, 64).eval().bfloat16()(torch.randn(1, 256, 4, 4).bfloat16())
    op, block = next((op, call) for op, call in calls if isinstance(call, BlockCall))
    triton_config.architecture.cache_clear()
    present = {"reference": None, "cudnn": None, "triton": None}
    monkeypatch.setattr(backends, "_unavailable", functools.cache(lambda name: present.get(name, "not here")))
    monkeypatch.setattr(cudnn, "supports", lambda call: None)
    found = tuner.candidates("conv_bn_act", call)
    assert list(dict.fromkeys(entry.backend for entry in found)) == ["cudnn", "triton", "reference"]
    configs = [entry.config for entry in found if entry.backend == "triton"]
    assert configs == [None, *map(lookup.plain, triton.configs(call))] and len(configs) > 2
    assert [entry.config for entry in found if entry.backend == "reference"] == [None, "nhwc"]
    narrow = call._replace(conv=call.conv._replace(weight=call.conv.weight[:, :, :1, :1].contiguous(), padding=(0, 0)))
    assert tuner.candidates("conv_bn_act", narrow)[0].backend == "triton"
    whole = [entry.backend for entry in tuner.candidates(op, block)]
    assert whole[0] == lookup.CHAIN and {"triton", "reference"} <= set(whole)
    triton_config.architecture.cache_clear()


# The whole path.


def test_a_model_is_tuned_and_verified_on_a_gpu(on_gpu, register, monkeypatch, own_tables):
    monkeypatch.setattr(network_plan, "run", lambda *_: None)  # its launches need a device
    served = register("mine")
    model, x = network()
    fused = rf.fuse(model)
    clock(monkeypatch, "mine")
    results = tuner.tune(fused, x)
    assert {r.key.split(" ")[1] for r in results} == {"tf32"}
    assert {r.choice for r in results if r.key.startswith("conv_bn_act")} == {"mine"}
    assert {r.choice for r in results if r.key.startswith("basic_block")} == {lookup.CHAIN}
    (path,) = (own_tables / "cache" / "tuning").glob("*.json")
    assert path == tuner.table_path(GPU) and path.name.startswith("A-GPU-")
    assert json.loads(path.read_text())["environment"] == environment.describe(GPU)
    served.clear()
    with torch.no_grad():
        fused(x)
    assert len(served) == 21  # the stem, nine blocks of two, two projections
    assert {entry.backend for entry in rf.report(fused)} == {"mine (tuned)"}
    clock(monkeypatch, "auto")
    compared = verify.verify(fused, x)
    assert all(c.ratios == (2.0, 2.0) and not c.slower for c in compared)
    assert {c.choice for c in compared} == {"mine", lookup.CHAIN}

    environment.DRIVER.write_text(DRIVER.format("590.1"))
    environment._describe.cache_clear()
    lookup.forget()
    served.clear()
    with torch.no_grad():
        fused(x)
    assert not served, "the static rule decides until the new driver is tuned"


def test_the_gpus_random_numbers_are_left_as_they_were(on_gpu, monkeypatch):
    kept = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"the state of {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: kept.append(args))
    tuner._detached(conv_call())
    assert kept == [("the state of 0", 0)]


def test_the_clock_is_of_the_calls_own_device(on_gpu, monkeypatch):
    """Two events on the stream of the device that computes, which need not be the current one."""
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.0)
    ticks = iter(range(10**6))
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda self, other: next(ticks) + 1.0)
    second, seen = torch.device("cuda", 1), []
    taken = timing.interleaved({"a": lambda: seen.append(Current.device)}, device=second, repeats=3, min_seconds=0)
    assert set(seen) == {second} and Current.device == GPU and len(taken["a"].samples) == 3
    result = tuner.tune_call("conv_bn_act", conv_call(), repeats=2, max_seconds=1)
    assert all(time > 0 for time in result.entry.milliseconds.values())
