"""The tuner, under a clock of the test's own: nothing here depends on how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from tuning_tools import (
    CPU,
    _own_tables,  # noqa: F401, a fixture
    _register,  # noqa: F401, a fixture
    clock,
    conv_call,
    network,
    write,
)

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.cli import main
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.testing.compare import check
from resnet_fused.testing.eager import eager_copy
from resnet_fused.testing.timing import Timing
from resnet_fused.tuning import environment, lookup, table, tuner, verify
from resnet_fused.tuning.table import Entry


@pytest.mark.parametrize("fastest", ["reference nchw", "reference", "onednn", "chain", "cpu"])
def test_whatever_is_chosen_the_numbers_stay(monkeypatch, fastest):
    model, x = network()
    fused = rf.fuse(model)
    clock(monkeypatch, fastest)
    results = tuner.tune(fused, x)
    chosen = {result.choice for result in results}
    if fastest not in ("cpu", "chain"):
        assert chosen == {fastest}
    assert fastest in chosen or backends.unavailable("cpu")
    assert not any(result.excluded for result in results)
    assert check("", "", "", eager_copy(model, channels_last=True), fused, (x,)).ok


def test_of_equal_ones_the_static_choice_wins(monkeypatch):
    model, x = network()
    clock(monkeypatch, "nobody")
    fused = rf.fuse(model)
    first = tuner.tune(fused, x)
    assert not any(r.choice.startswith(("reference", "chain")) for r in first)
    assert [r.entry for r in tuner.tune(fused, x, fresh=True)] == [r.entry for r in first]


def test_every_backend_is_a_candidate_and_eager_in_both_layouts():
    call = conv_call()
    assert {"onednn", "reference", "reference nhwc"} <= set(map(tuner.label, tuner.candidates("conv_bn_act", call)))
    last = call.x.contiguous(memory_format=torch.channels_last)
    names = set(map(tuner.label, tuner.candidates("conv_bn_act", call._replace(x=last))))
    assert {"reference", "reference nchw", "reference nhwc"} <= names


def test_wrong_and_failing_candidates_are_left_out(register, monkeypatch):
    def fail(call):
        raise RuntimeError("out of\nregisters")

    register("wrong", run=lambda call: reference.run(call) + 1e-2)
    register("fails", run=fail)
    register("shapeless", run=lambda call: reference.run(call)[:, :1])
    timed = clock(monkeypatch, "wrong")
    call = conv_call()
    result = tuner.tune_call("conv_bn_act", call, repeats=1, max_seconds=1)
    assert set(result.excluded) == {"wrong", "fails", "shapeless"} and not set(result.excluded) & set(timed)
    assert "of the budget" in result.excluded["wrong"]
    assert result.excluded["fails"] == "raised RuntimeError: out of registers"
    assert "shape" in result.excluded["shapeless"]


def test_configs_are_measured_and_the_fastest_is_kept(register, monkeypatch):
    served = register("mine", configs=lambda call: [("a", 1), ("b", 2)])
    clock(monkeypatch, "mine ['b', 2]")
    model, x = network()
    results = tuner.tune(rf.fuse(model), x)
    convs = [r for r in results if r.key.startswith("conv_bn_act")]
    assert {r.choice for r in convs} == {"mine ['b', 2]"}
    assert {"mine", "mine ['a', 1]"} <= set(convs[0].entry.milliseconds)
    served.clear()
    stem = rf.fuse(model)
    with torch.no_grad():
        stem(x)
    assert served and all(config == [("b", 2)] for _, *config in served)


def test_triton_configs_stand_in_on_the_interpreter(monkeypatch):
    triton = pytest.importorskip("resnet_fused.ops.conv_bn_act.triton", reason="triton is not installed")
    if torch.cuda.is_available():
        call = conv_call()._replace(x=torch.randn(1, 8, 6, 6))
        call = tuner._map(call, lambda t: t.cuda())
    else:
        monkeypatch.setattr(backends, "interpreting", lambda: True)
        backends._unavailable.cache_clear()
        call = conv_call(n=1)
    config = triton.configs(call)[-1]
    seen = []
    run = triton.run
    monkeypatch.setattr(triton, "run", lambda call, config=None: seen.append(config) or run(call, config))
    tuner.runner("conv_bn_act", call, Entry("triton", lookup.plain(config)))()
    assert seen == [config]


def test_fuse_tunes_in_place_and_only_once(register, monkeypatch):
    served = register("mine")
    timed = clock(monkeypatch, "mine")
    model, x = network()
    fused = rf.fuse(model, tune=x)
    assert "mine" in timed
    timed.clear()
    served.clear()
    again = rf.fuse(model, tune=(x,))
    assert not timed
    with torch.no_grad():
        torch.testing.assert_close(again(x), fused(x), rtol=0, atol=0)
    assert served  # the stem


def test_a_users_backend_that_comes_later_is_measured_too(register, monkeypatch):
    model, x = network()
    fused = rf.fuse(model)
    timed = clock(monkeypatch, "later")
    tuner.tune(fused, x)
    register("later")
    register("blind", supports=lambda call: "nothing")
    results = tuner.tune(fused, x)
    assert {r.measured for r in results if r.key.startswith("conv_bn_act")} == {True}
    assert {r.choice for r in results if r.measured} == {"later"}
    assert not any(r.measured for r in results if r.key.startswith("basic_block"))
    timed.clear()
    assert not any(r.measured for r in tuner.tune(fused, x)) and not timed


def test_what_cannot_be_tuned_says_why():
    model, x = network()
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        rf.fuse(model.train(), tune=x)
    with pytest.raises(ValueError, match="backend='onednn', need backend='auto'"):
        rf.fuse(model.eval(), backend="onednn", tune=x)


def test_tuning_leaves_the_model_as_it_was(monkeypatch):
    model, x = network()
    fused = rf.fuse(model)
    clock(monkeypatch, "onednn")
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tuner.tune(fused, x)
    assert torch.equal(torch.rand(3), expected)
    for key, value in fused.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_sample_of_the_caller_is_the_clock():
    ticks = []

    def sample(call, loops):
        call()
        ticks.append(loops)
        return 1.0

    result = tuner.tune_call("conv_bn_act", conv_call(), repeats=2, max_seconds=1, sample=sample)
    assert len(ticks) == 3 * len(result.entry.milliseconds)
    assert set(result.entry.milliseconds.values()) == {1000.0} and result.speedup == 1.0


# What counts as faster.


def test_a_challenger_has_to_win_beyond_noise():
    static, near, wide, clear, best = (
        Timing(t) for t in ((1.0, 1.0, 1.0), (0.985,) * 3, (0.9, 0.9, 1.4), (0.97,) * 3, (0.9, 0.95, 0.95))
    )
    assert tuner.pick({"static": static, "near": near, "wide": wide}) == "static"
    assert tuner.pick({"static": static, "near": near, "clear": clear, "best": best}) == "best"
    assert tuner.pick({"static": static, "clear": clear, "alike": clear}) == "clear"
    assert tuner.pick({"only": wide}) == "only"


def test_one_image_twice_is_eagers_own_error(register, monkeypatch):
    """A candidate that sums one image as eager sums two is right, as far as eager is."""
    call = conv_call(n=1)
    exact = reference.run(tuner._map(call, torch.Tensor.double)).float()
    run = reference.run

    def as_in_a_pair(of):
        off = 1e-3 if of.x.shape[0] == 2 and of.x.dtype == torch.float32 else 0.0
        return run(of) + off

    monkeypatch.setattr(reference, "run", as_in_a_pair)
    register("pairwise", run=lambda of: exact + 1e-3)
    clock(monkeypatch, "pairwise")
    assert tuner.tune_call("conv_bn_act", call, repeats=1, max_seconds=1).choice == "pairwise"
    monkeypatch.setattr(reference, "run", run)
    result = tuner.tune_call("conv_bn_act", call, repeats=1, max_seconds=1)
    assert "of the budget" in result.excluded["pairwise"]


def test_nothing_within_the_budget_is_said(monkeypatch):
    monkeypatch.setattr(tuner._Gate, "problem", lambda self, run: "too far")
    with pytest.raises(RuntimeError, match=r"conv_bn_act: no backend is within the error budget: \{.*too far"):
        tuner.tune_call("conv_bn_act", conv_call(), repeats=1, max_seconds=1)


# What is chosen, in reports.


@pytest.mark.parametrize("fastest", ["reference nchw", "onednn", "mine"])
def test_reports_name_what_was_tuned(register, monkeypatch, fastest):
    register("mine"), register("mine", "basic_block", run=lambda call: tuner.eager("basic_block")(call))
    model, x = network()
    fused = rf.fuse(model)
    before = rf.report(fused)
    assert not any("tuned" in entry.backend for entry in before)
    clock(monkeypatch, fastest)
    tuner.tune(fused, x)
    for found in (rf.report(fused), rf.explain(model)):
        assert {entry.backend for entry in found} == {f"{fastest} (tuned)"}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # which has no table
    assert [entry.backend for entry in rf.report(fused)] == [entry.backend for entry in before]
    torch.set_num_threads(threads)
    monkeypatch.setenv("RESNET_FUSED_TUNING", "0")
    lookup.forget()
    assert [entry.backend for entry in rf.report(fused)] == [entry.backend for entry in before]


def test_a_tuned_chain_is_reported_by_its_convolutions(register, monkeypatch):
    register("mine")
    model, x = network()
    fused = rf.fuse(model)
    facts = environment.describe(CPU)
    entries = {
        key: Entry("mine" if op == "conv_bn_act" else "chain") for key, (op, _) in tuner.record(fused, x).items()
    }
    table.merge(environment.path_for(facts), facts, entries)
    lookup.forget()
    assert {entry.backend for entry in rf.report(fused)} == {"mine (tuned)"}
    other = rf.fuse(rf.resnet20(num_classes=3).eval().bfloat16())
    assert not any("tuned" in entry.backend for entry in rf.report(other))


def test_sums_are_reported_too():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv(x) + x)

    fused, x = rf.fuse(Sum().eval(), generic=True), torch.randn(2, 3, 4, 4)
    for tuned in ("", " (tuned)"):
        (entry,) = (entry for entry in rf.report(fused) if entry.kind == "add_relu")
        assert entry.backend == "reference" + tuned
        write({lookup.key("add_relu", AddReLUCall(x, x)): Entry("reference")})


# Beside eager.


def test_verify_compares_what_the_tuned_model_calls_in_both_formats(monkeypatch):
    model, x = network()
    fused = rf.fuse(model)
    clock(monkeypatch, "auto")
    whole = verify.verify(fused, x)
    assert {c.key.split(" ")[0] for c in whole} == {"conv_bn_act", "basic_block"} and len(
        whole
    ) == 6  # the stem, blocks
    assert all(set(r) == {"auto", "eager NCHW", "eager channels_last"} for c in whole for r in c.rounds)
    assert all(c.ratios == (2.0, 2.0) and not c.slower and c.choice == "static" for c in whole)
    clock(monkeypatch, "chain")
    tuner.tune(fused, x)
    chained = verify.verify(fused, x)
    assert len(chained) > len(whole)  # every convolution by itself
    assert {c.choice for c in chained if c.key.startswith("basic_block")} == {"chain"}


def test_verify_runs_eager_as_its_user_would(monkeypatch):
    seen = {}

    def interleaved(runs, **options):
        for name, run in runs.items():
            seen[name] = run.args[0]
            run()
        return {name: Timing((1.0,)) for name in runs}

    monkeypatch.setattr(verify, "interleaved", interleaved)
    fused = rf.fuse(nn.Sequential(rf.FusedBasicBlock(8, 8)).eval())
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    verify.verify(fused, x)
    for name, layout in (("eager NCHW", torch.contiguous_format), ("eager channels_last", torch.channels_last)):
        call = seen[name]
        assert all(t.is_contiguous(memory_format=layout) for t in (call.x, *(conv.weight for conv in call.convs)))
    verify.verify(fused, x.contiguous())  # a fused block turns it
    assert seen["eager channels_last"].x.is_contiguous(memory_format=torch.channels_last)
    assert seen["eager channels_last"].convs[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_slower_is_said_only_beyond_noise_and_twice():
    def rounds(*pairs):
        return tuple(
            {"auto": Timing((ours,)), "eager NCHW": Timing((eager,)), "eager channels_last": Timing((9.0,))}
            for ours, eager in pairs
        )

    assert verify.Comparison("", "", rounds((1.0, 0.9), (1.0, 0.9))).slower == "eager NCHW"
    assert not verify.Comparison("", "", rounds((1.0, 0.9), (1.0, 1.1))).slower
    assert not verify.Comparison("", "", rounds((1.0, 0.99), (1.0, 0.99))).slower
    assert verify.Comparison("", "", rounds((1.0, 0.5), (1.0, 2.0))).ratios == (0.5, 2.0)


def test_the_command_verifies_and_its_exit_code_tells(monkeypatch, capsys):
    command = ["tune", "resnet20", "--batch", "1", "--size", "8", "--repeats", "1", "--verify"]
    clock(monkeypatch, "auto")
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and len(facts["comparisons"]) == 6
    assert all(c["ratios"] == [2.0, 2.0] and len(c["rounds"]) == 2 for c in facts["comparisons"])
    clock(monkeypatch, "eager channels_last")
    assert main(command) == 1
    out = capsys.readouterr().out
    assert out.count("SLOWER than eager channels_last") == 6
    assert "no slower than eager in either format: 0 of 6 calls" in out


# From the command line, and from outside.


def test_the_command_prints_what_it_wrote(monkeypatch, capsys, own_tables):
    clock(monkeypatch, "onednn")
    command = ["tune", "resnet20", "--batch", "1", "--size", "8", "--repeats", "1"]
    shipped = own_tables / "one.json"
    assert main([*command, "--json", "--ship", str(shipped)]) == 0
    facts = json.loads(capsys.readouterr().out)
    written = table.read(Path(facts["table"]), environment.describe(CPU))
    assert {entry["key"]: entry["choice"] for entry in facts["entries"]} == {
        key: entry.backend for key, entry in written.items()
    }
    assert all(entry["measured"] and entry["speedup"] == 2.0 for entry in facts["entries"])
    assert set(table.read(shipped, environment.describe(CPU))) == set(written)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "in the table already" in out and facts["table"] in "".join(out.split())


PLUGIN = """
import resnet_fused as rf
from resnet_fused.ops.conv_bn_act import reference

@rf.register_backend("from_file")
def kernel(call):
    return reference.run(call)
"""


def test_a_users_file_is_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "plugin_of_a_user.py").write_text(PLUGIN)
    timed = clock(monkeypatch, "from_file")
    command = ["tune", "resnet20", "--batch", "1", "--size", "8", "--json", "--load"]
    try:
        assert main([*command, str(tmp_path / "plugin_of_a_user.py")]) == 0
        assert "from_file" in timed
        assert any(e["choice"] == "from_file" for e in json.loads(capsys.readouterr().out)["entries"])
    finally:
        rf.unregister_backend("from_file")
    assert main([*command, str(tmp_path / "nothing.py")]) == 2
    assert "--load" in capsys.readouterr().err
