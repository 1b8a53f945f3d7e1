"""Tuning tables: the file, and the way from a call to what a table says."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_tools import CPU, _own_tables, _register, conv_call, run_auto, write  # noqa: F401, the fixtures

import resnet_fused as rf
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.tuning import environment, lookup, table, tuner
from resnet_fused.tuning.table import Entry

HERE = {"device": "a device", "torch": "2"}
ENTRY = Entry("onednn", None, {"onednn": 1.5, "reference": 2.0})


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


def test_another_number_of_threads_is_not_served_from_this_ones_table(register):
    """Neither a lone call nor a block, whose choice is kept from call to call."""
    served = register("mine"), register("mine", "basic_block", run=lambda call: call.x.clone())
    block, call = rf.FusedBasicBlock(8, 8).eval(), conv_call()
    x = torch.randn(1, 8, 6, 6)
    calls: list[Any] = []
    with lookup.recording(lambda op, call: calls.append((op, call))), torch.no_grad():
        block(x), run_auto(call)
    write({lookup.key(op, call): Entry("mine") for op, call in calls})
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            for number, times in ((threads, 1), (threads + 1, 1), (threads, 2)):
                torch.set_num_threads(number)
                block(x), run_auto(call)
                assert [len(of) for of in served] == [times, times], number
    finally:
        torch.set_num_threads(threads)


def test_a_table_that_is_forgotten_meanwhile_is_not_remembered(register, monkeypatch):
    """Another thread may read the old table while this one writes a new one."""
    served = register("mine")
    call = conv_call()
    write({lookup.key("conv_bn_act", call): Entry("mine")})
    key = lookup.key

    def slow(op, call):
        monkeypatch.setattr(lookup, "key", key)
        write({key(op, call): Entry("reference")})
        return key(op, call)

    monkeypatch.setattr(lookup, "key", slow)
    run_auto(call)
    assert len(served) == 1
    run_auto(call)
    assert len(served) == 1


def test_what_decides_is_told_in_a_word():
    assert lookup.summary(CPU) == ""
    write({"a": Entry("mine")})
    first = lookup.summary(CPU)
    assert first.startswith("1 entries ")
    write({"a": Entry("other")})
    assert lookup.summary(CPU) != first


def test_keys_of_any_text_do_no_harm():
    write({"": Entry("mine"), "conv_bn_act": Entry("mine"), "conv_bn_act a:b": Entry("mine"), "x y": Entry("mine")})
    assert lookup.alike("conv_bn_act", conv_call()) == []


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
