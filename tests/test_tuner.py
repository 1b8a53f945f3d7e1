"""Tuning tables and the tuner, under a clock of the test's own: nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.cli import main
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall
from resnet_fused.testing.compare import check
from resnet_fused.testing.eager import eager_copy
from resnet_fused.testing.statistics import calibrate
from resnet_fused.testing.timing import Timing
from resnet_fused.tuning import environment, lookup, table, tuner
from resnet_fused.tuning.table import Entry

CPU = torch.device("cpu")
HERE = {"device": "a device", "torch": "2"}
ENTRY = Entry("onednn", None, {"onednn": 1.5, "reference": 2.0})


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables are read, from a directory of the test's own; Triton's interpreter is no candidate."""
    monkeypatch.setenv("RESNET_FUSED_TUNING", "1")
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    backends._unavailable.cache_clear()
    lookup.forget()
    yield tmp_path
    backends._unavailable.cache_clear()
    monkeypatch.undo()
    lookup.forget()


@pytest.fixture
def register() -> Iterator[Callable[..., list[Any]]]:
    """Register a backend that computes as eager does, and list the calls that it serves."""
    names = []

    def make(name: str, op: str = "conv_bn_act", run: Any = reference.run, **options: Any) -> list[Any]:
        served: list[Any] = []

        def kernel(call: Any, *config: Any) -> Tensor:
            served.append((call, *config))
            return run(call)

        rf.register_backend(name, op, **options)(kernel)
        names.append(name)
        return served

    yield make
    for name in names:
        rf.unregister_backend(name)


def clock(monkeypatch: pytest.MonkeyPatch, fastest: str) -> list[str]:
    """Candidates whose label is ``fastest`` take 1 ms, all others 2 ms; gives the labels that were ever timed."""
    timed: list[str] = []

    def interleaved(runs: dict[str, Any], **options: Any) -> dict[str, Timing]:
        timed.extend(runs)
        return {name: Timing((1e-3 if name == fastest else 2e-3,)) for name in runs}

    monkeypatch.setattr(tuner, "interleaved", interleaved)
    return timed


def conv_call(channels: int = 8, n: int = 2) -> ConvBNActCall:
    x = torch.randn(n, channels, 6, 6)
    vectors = [torch.rand(channels) + 0.5 for _ in range(4)]
    conv = ConvBN(torch.randn(channels, channels, 3, 3) / 9, None, *vectors, 1e-5, (1, 1), (1, 1))
    return ConvBNActCall(x, conv, None, "relu")


def run_auto(call: ConvBNActCall) -> Tensor:
    c = call.conv
    return rf.conv_bn_act(
        call.x, c.weight, c.bn_weight, c.bn_bias, c.running_mean, c.running_var, padding=1, backend="auto"
    )


def write(entries: dict[str, Entry]) -> Path:
    """The user's table, as another process would leave it; read anew."""
    facts = environment.describe(CPU)
    table.merge(environment.path_for(facts), facts, entries)
    lookup.forget()
    return environment.path_for(facts)


def network() -> tuple[nn.Module, Tensor]:
    model = rf.resnet20(num_classes=3)
    x = torch.randn(2, 3, 12, 12)
    model.eval()
    calibrate(model, x, perturb=True)
    return model, x


# The file.


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "deep" / "t.json"
    table.merge(path, HERE, {"b": ENTRY})
    table.merge(path, HERE, {"a": Entry("triton", ["pointer", 64], {"x": 1.0}), "b": ENTRY})
    assert table.read(path, HERE) == {"a": Entry("triton", ["pointer", 64], {"x": 1.0}), "b": ENTRY}
    assert table.read(tmp_path / "none.json", HERE) == {}
    assert json.loads(path.read_text())["version"] == table.VERSION


def test_the_same_entries_give_the_same_bytes(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    table.merge(one, HERE, {"a": ENTRY, "b": ENTRY})
    table.merge(two, dict(reversed(HERE.items())), {"b": ENTRY})
    table.merge(two, HERE, {"a": ENTRY})
    assert one.read_bytes() == two.read_bytes()


WRITER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("table", sys.argv[1])
table = sys.modules["table"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)
print("ready", flush=True); sys.stdin.readline()
for i in range(40):
    table.merge(table.Path(sys.argv[2]), {"device": "d"}, {f"{sys.argv[3]}{i}": table.Entry("onednn", None, {})})
"""


def test_two_processes_tuning_at_once_lose_nothing(tmp_path):
    path = tmp_path / "t.json"
    command = [sys.executable, "-c", WRITER, table.__file__, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    for writer in writers:
        writer.stdout.readline()
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    assert set(table.read(path, {"device": "d"})) == {f"{name}{i}" for name in "ab" for i in range(40)}
    assert {p.name for p in tmp_path.iterdir()} == {"t.json", "t.json.lock"}


def test_an_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    table.merge(path, HERE, {"a": ENTRY})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        table.merge(path, HERE, {"b": ENTRY})
    assert table.read(path, HERE) == {"a": ENTRY}
    assert {p.name for p in tmp_path.iterdir()} == {"t.json", "t.json.lock"}


def damaged(**changes: Any) -> str:
    entry = {"backend": "onednn", "config": None, "milliseconds": {}}
    value = {"format": table.FORMAT, "version": table.VERSION, "environment": HERE, "entries": {"a": entry}}
    return json.dumps(value | changes)


BAD = {
    "cut short": '{"format": ',
    "not text": "\udcff",
    "a list": "[]",
    "another program's": "{}",
    "a later version": damaged(version=2),
    "another device": damaged(environment=HERE | {"device": "another"}),
    "more facts than are known": damaged(environment=HERE | {"moon": "full"}),
    "no environment": damaged(environment=None),
    "entries are a list": damaged(entries=[]),
    "an entry is a name": damaged(entries={"a": "onednn"}),
    "an entry without a backend": damaged(entries={"a": {"milliseconds": {}}}),
    "a time that is none": damaged(entries={"a": {"backend": "cpu", "milliseconds": {"cpu": float("nan")}}}),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_table_is_set_aside_with_a_warning(tmp_path, caplog, text):
    path = tmp_path / "t.json"
    content = text.encode(errors="surrogateescape")
    path.write_bytes(content)
    (tmp_path / "t.json.bad0").write_text("an earlier one")
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert table.load(path, HERE) == {}
    assert "is ignored" in caplog.text and "t.json.bad1" in caplog.text
    assert not path.exists() and (tmp_path / "t.json.bad1").read_bytes() == content
    path.write_bytes(content)
    table.merge(path, HERE, {"b": ENTRY})
    assert table.read(path, HERE) == {"b": ENTRY}
    assert (tmp_path / "t.json.bad2").read_bytes() == content


def test_damage_does_not_stop_a_model(caplog):
    path = write({})
    path.write_text("{")
    lookup.forget()
    call = conv_call()
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert run_auto(call).shape == (2, 8, 6, 6)
    assert "is ignored" in caplog.text


def test_threads_and_versions_have_tables_of_their_own():
    facts = environment.describe(CPU)
    assert {"device", "torch", "resnet_fused", "threads", "onednn"} <= set(facts)
    paths = {environment.path_for(facts | {key: "another"}) for key in facts if key != "device"}
    assert len(paths | {environment.path_for(facts)}) == len(facts)


# From a call to a choice.


def test_the_key_names_shapes_layouts_and_dtype():
    call = conv_call()
    assert lookup.key("conv_bn_act", call) == (
        "conv_bn_act float32:2x8x6x6:nchw float32:8x8x3x3:nchw - 1 1 1 1 1 1 1 - relu"
    )
    last = call.x.contiguous(memory_format=torch.channels_last)
    keys = {
        lookup.key("conv_bn_act", call._replace(**change))
        for change in ({}, {"x": last}, {"act": "none"}, {"residual": call.x}, {"x": call.x.double()})
    }
    assert len(keys) == 5
    assert lookup.key("conv_bn_act", call._replace(x=torch.randn(2, 8, 6, 12)[..., ::2])) is None
    with torch.inference_mode():
        passing = call.conv._replace(weight=call.conv.weight.clone())
    assert lookup.key("conv_bn_act", call._replace(conv=passing)) is None


def test_auto_follows_the_table(register):
    served = register("mine")
    call = conv_call()
    run_auto(call)
    assert not served
    path = write({lookup.key("conv_bn_act", call): Entry("mine")})
    expected = reference.run(call)
    torch.testing.assert_close(run_auto(call), expected)
    torch.testing.assert_close(run_auto(call), expected)
    assert len(served) == 2
    run_auto(conv_call(n=3))
    assert len(served) == 2  # another shape
    path.unlink()
    lookup.forget()
    run_auto(call)
    assert len(served) == 2


def test_the_switch_turns_tables_off(register, monkeypatch):
    served = register("mine")
    call = conv_call()
    write({lookup.key("conv_bn_act", call): Entry("mine")})
    monkeypatch.setenv("RESNET_FUSED_TUNING", "0")
    lookup.forget()
    run_auto(call)
    assert not served


@pytest.mark.parametrize(
    "entry",
    [Entry("gone"), Entry("cuda"), Entry("refuses"), Entry("chosen", ["c", 3]), Entry("reference", "diagonal")],
    ids=["unknown", "not here", "refuses", "config no longer offered", "no such layout"],
)
@pytest.mark.parametrize("op", ["conv_bn_act", "bottleneck"])
def test_an_entry_that_cannot_serve_is_ignored(register, entry, op):
    served = register("chosen", op, configs=lambda call: [("a", 1)])
    served += register("refuses", op, supports=lambda call: "no")
    call = conv_call()
    lone = rf.FusedBottleneck(8, 2).eval()
    with lookup.recording(lambda found, c: write_later.append((found, c))), torch.no_grad():
        write_later: list[Any] = []
        run_auto(call)
        lone(call.x)
    found = next(c for name, c in write_later if name == op)
    write({lookup.key(op, found): entry})
    with torch.no_grad():
        run_auto(call), lone(call.x)
    assert not served


def test_a_config_reaches_the_kernel_and_only_aligned_tensors_get_it(register):
    served = register("mine", configs=lambda call: [("a", 1), ("b", 2)])
    call = conv_call()
    write({lookup.key("conv_bn_act", call): Entry("mine", ["b", 2])})
    odd = torch.empty(call.x.numel() + 1)[1:].view(call.x.shape).copy_(call.x)
    for x in (odd, call.x, odd):
        run_auto(call._replace(x=x))
    assert [config for _, *config in served] == [[], [("b", 2)], []]


def test_a_changed_table_empties_the_plans_of_blocks(register):
    served = register("mine", "basic_block", run=lambda call: call.x.clone())
    block = rf.FusedBasicBlock(8, 8).eval()
    x = torch.randn(1, 8, 6, 6)
    calls: list[Any] = []
    with torch.no_grad():
        with lookup.recording(lambda op, call: calls.append((op, call))):
            block(x)
        block(x)
        assert not served
        write({lookup.key(*calls[0]): Entry("mine")})
        block(x)
        assert len(served) == 1
        write({lookup.key(*calls[0]): Entry("chain")})
        block(x)
        assert len(served) == 1


def test_shipped_tables_go_behind_the_users_own(register, own_tables):
    first, second = register("first"), register("second")
    one, two = conv_call(), conv_call(channels=4)
    keys = [lookup.key("conv_bn_act", call) for call in (one, two)]
    facts = environment.describe(CPU)
    shipped = own_tables / "shipped" / "this.json"
    results = [tuner.Tuned(key, Entry("first", None, {"first": 1.0})) for key in keys]
    tuner.ship(results, CPU, shipped)
    assert set(json.loads(shipped.read_text())["environment"]) == {"device", "capability", "threads"}
    other = {"device": "another"}
    table.merge(own_tables / "shipped" / "z.json", other, {key: Entry("second") for key in keys})
    table.merge(environment.path_for(facts), facts, {keys[1]: Entry("second")})
    lookup.forget()
    run_auto(one), run_auto(two)
    assert len(first) == 1 and len(second) == 1


def test_what_is_shipped_is_sound():
    for path in Path(table.__file__).parent.glob("*.json"):
        bound = json.loads(path.read_text())["environment"]
        assert set(bound) <= {"device", "capability", "threads"}
        assert all(entry.milliseconds for entry in table.read(path, bound).values())


# The tuner.


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
    assert check("", "", "", eager_copy(model, like=fused), fused, (x,)).ok


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
