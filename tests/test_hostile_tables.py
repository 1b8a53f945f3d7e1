"""Tuning tables of any content, and whatever may lie in their place: inference goes on, with one warning."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pwd
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from tuning_tools import CPU, _own_tables, _register, conv_call, run_auto, write  # noqa: F401, the fixtures

import resnet_fused as rf
from resnet_fused.cli import main
from resnet_fused.tuning import environment, lookup, table, tuner
from resnet_fused.tuning.table import Entry


@pytest.fixture(autouse=True)
def _warnings() -> None:
    table.warn_once.cache_clear()


def whole(entry: Any, **changes: Any) -> str:
    """A table for this device whose entry for ``conv_call()`` is ``entry``."""
    value = {"format": table.FORMAT, "version": table.VERSION, "environment": environment.describe(CPU)}
    return json.dumps(value | {"entries": {lookup.key("conv_bn_act", conv_call()): entry}} | changes)


def entry(**changes: Any) -> dict[str, Any]:
    return {"backend": "reference", "config": None, "milliseconds": {"reference": 1.0}} | changes


DEEP = "[" * 900 + "]" * 900
BAD = {
    "nested": "[" * 100_000,
    "nested as deep as JSON goes": whole(entry()).replace("null", DEEP),
    "nested in place of a fact": whole(entry()).replace(f'"{environment.describe(CPU)["device"]}"', DEEP),
    "objects nested": '{"a":' * 100_000,
    "a time of 400 digits": whole(entry(milliseconds={"reference": 10**400})),
    "a time of 5000 digits": whole(entry()).replace("1.0", "9" * 5000),
    "a time below zero": whole(entry(milliseconds={"reference": -1.0})),
    "a list for a backend": whole(entry(backend=["reference"])),
    "a list in a list for a config": whole(entry(config=[[[[["nchw"]]]]])),
    "a list for a layout": whole(entry(config=["nchw"])),
    "an object for a config": whole(entry(config={"nchw": 1})),
    "a number of 400 digits for a config": whole(entry(config=10**400)),
    "a list for a fact": whole(entry(), environment={"device": ["a"]}),
    "a list for a version": whole(entry(), version=[1]),
    "a list for a format": whole(entry(), format=[table.FORMAT]),
    "a list for an entry": whole([entry()]),
    "not UTF-8": "\udcff\udcfe",
    "a megabyte of nothing": "\0" * 1_000_000,
    "larger than any": " " * (table.MAX_BYTES + 1),
}


def goes_on(caplog: pytest.LogCaptureFixture, warnings: int = 1) -> str:
    """Inference, twice, with so many warnings in all; their text."""
    lookup.forget()
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        for _ in range(2):
            assert run_auto(conv_call()).shape == (2, 8, 6, 6)
            lookup.forget()
    assert len(caplog.records) == warnings, caplog.text
    assert all(len(record.getMessage()) < 1000 for record in caplog.records)
    return caplog.text


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_inference_goes_on_with_one_warning(text, caplog):
    path = write({})
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert "is ignored" in goes_on(caplog)
    assert not path.exists() and path.with_name(f"{path.name}.bad0").exists()


@pytest.mark.parametrize("config", [["nchw"], [], [[1, 2], 3], "diagonal", 5, 1.5, True])
def test_a_config_of_another_kind_is_not_followed(config, caplog):
    write({}).write_text(whole(entry(backend="onednn", config=config)))
    goes_on(caplog, warnings=0)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), Path.mkdir], ids=["FIFO", "zero", "folder"]
)
def test_what_is_no_file_is_set_aside(make, caplog):
    path = write({})
    path.unlink()
    make(path)
    assert "is no regular file" in goes_on(caplog)
    assert not os.path.lexists(path)
    write({"a": Entry("reference")})
    assert table.read(path, environment.describe(CPU)) == {"a": Entry("reference")}


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "t.json"
    with path.open("wb") as file:
        file.truncate(10**9)
    tracemalloc.start()
    try:
        with pytest.raises(table.TableError, match="has more than 8 MiB"):
            table.read(path, {})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_table_is_not_written_larger_than_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MAX_BYTES", 500)
    table.merge(tmp_path / "t", {"device": "d"}, {"a": Entry("reference")})
    with pytest.raises(OSError, match="would hold more than"):
        table.merge(tmp_path / "t", {"device": "d"}, {"b" * 400: Entry("reference")})
    assert table.read(tmp_path / "t", {"device": "d"}) == {"a": Entry("reference")}


def test_a_user_without_a_home(monkeypatch, caplog):
    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "RESNET_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert "Set RESNET_FUSED_CACHE" in goes_on(caplog)


def test_a_lock_that_another_keeps_does_not_stop_inference(caplog):
    path = write({})
    path.write_text("{")
    with path.with_name(f"{path.name}.lock").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "keeps" in goes_on(caplog)


def test_a_lock_that_is_no_file_does_not_stop_inference(caplog):
    path = write({})
    path.write_text("{")
    lock = path.with_name(f"{path.name}.lock")
    lock.unlink()
    os.mkfifo(lock)
    assert "cannot be set aside" in goes_on(caplog)


def test_no_more_than_ten_are_kept(tmp_path):
    path = tmp_path / "t.json"
    for i in range(13):
        path.write_text(f"{{{i}")
        table.load(path, {})
    assert sorted(p.name for p in tmp_path.glob("*.bad*")) == [f"t.json.bad{i}" for i in range(10)]
    assert (tmp_path / "t.json.bad9").read_text() == "{12"


def test_a_shipped_table_that_cannot_be_read_does_no_harm(own_tables, caplog):
    folder = own_tables / "shipped"
    folder.mkdir()
    os.mkfifo(folder / "a.json")
    (folder / "b.json").symlink_to("nowhere")
    (folder / "c.json").symlink_to("c.json")
    (folder / "d.json").write_text(BAD["nested"])
    goes_on(caplog, warnings=0)


def unwritable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A cache directory that cannot be made, for root either: a file is in its place."""
    (folder / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(folder / "file"))


def test_tune_says_at_once_that_its_cache_cannot_be_written(monkeypatch, tmp_path):
    unwritable(monkeypatch, tmp_path)
    monkeypatch.setattr(tuner, "record", lambda *arguments: pytest.fail("the model ran"))
    with pytest.raises(OSError, match="file"):
        tuner.tune(rf.fuse(nn.Sequential(rf.FusedBasicBlock(8, 8)).eval()), torch.randn(1, 8, 6, 6))


@pytest.mark.parametrize("ship", [False, True])
def test_the_command_says_at_once_that_it_cannot_write(ship, monkeypatch, tmp_path, capsys):
    from resnet_fused.cli import tune as command

    options = []
    unwritable(monkeypatch, tmp_path)
    if ship:
        monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "cache"))
        options = ["--ship", str(tmp_path / "file" / "table.json")]
    monkeypatch.setattr(command, "prepare", lambda *arguments: pytest.fail("a model was made"))
    assert main(["tune", "resnet20", *options]) == 2
    err = capsys.readouterr().err
    assert "the table cannot be written" in err and err.count("\n") == 1
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("times", [{}, {"reference": 0.0}, {"other": 1.0}])
def test_an_entry_without_its_time_is_told(times, monkeypatch, capsys):
    """Of a call that is in the table already."""
    result = tuner.Tuned("conv_bn_act x", Entry("reference", None, times), measured=False)
    from resnet_fused.cli.tune import tuned_table

    assert str(result.speedup) == "nan" and tuned_table([result]).row_count == 1


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "backend": st.one_of(st.sampled_from(["reference", "onednn", "cpu", "chain", ""]), JSON),
        "config": st.one_of(st.sampled_from(["nchw", "nhwc", ["a", 1]]), JSON),
        "milliseconds": st.one_of(st.dictionaries(st.text(max_size=9), st.floats(), max_size=2), JSON),
    },
)


HEADS = st.fixed_dictionaries({}, optional={"format": JSON, "version": JSON, "entries": JSON})
TABLES = st.tuples(st.one_of(FIELDS, JSON), HEADS).map(lambda parts: whole(parts[0], **parts[1]).encode())


@given(text=st.one_of(st.binary(max_size=200), TABLES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_of_any_kind_do_not_stop_inference(text):
    write({}).write_bytes(text)
    lookup.forget()
    call = conv_call()
    torch.testing.assert_close(run_auto(call), torch.relu(run_auto(call)))
    lookup.summary(CPU), lookup.alike("conv_bn_act", call)
