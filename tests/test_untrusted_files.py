"""Files of weights, checkpoints and tuning tables of any content: an answer or one error, and never code that runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import optional
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tuning_tools import CPU, _own_tables, conv_call, run_auto  # noqa: F401, the fixture

import resnet_fused as rf
from resnet_fused import files
from resnet_fused.cli import main
from resnet_fused.testing import models
from resnet_fused.training import CheckpointError, checkpoint, transfer
from resnet_fused.tuning import environment, lookup, table, tuner
from resnet_fused.tuning.table import Entry

HERE = {"device": "a device", "torch": "2"}
PLANTED = """
import pathlib, resnet_fused
pathlib.Path(__file__).with_suffix(".ran").touch()
def network(): return resnet_fused.resnet20(num_classes=2)
"""


def no_depth(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


@pytest.fixture(scope="module")
def recipe():
    optional.needs("PIL", "safetensors", "torchvision", "timm")
    return importlib.import_module("resnet_fused.recipes.classifier")


@pytest.fixture(scope="module")
def small():
    optional.needs("safetensors")
    return checkpoint.packed(rf.resnet20(num_classes=2).state_dict())


def facts(**changes: Any) -> str:
    return json.dumps({"model": "resnet20", "size": 16, "classes": ["a", "b"], "data": "images"} | changes)


def trained(path: Path, tensors: dict[str, torch.Tensor], text: str) -> str:
    checkpoint.write(path, tensors, {checkpoint.FACTS: text})
    return str(path)


# What a file may name.


def test_a_file_names_models_and_runs_no_code(recipe, small, tmp_path, monkeypatch):
    (tmp_path / "planted_here.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    for name in (
        *("planted_here:network", "os:abort", "torchvision:get_model", "torchvision:__loader__", "torchvision:a.b"),
        *("timm:create_model", "timm:hf-hub:a/b", "timm:local-dir:/", "timm:__doc__", "timm:resnet18.a.b", ":", "os"),
    ):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*name another model") as caught:
            recipe.load(trained(path, small, facts(model=name)))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "planted_here.ran").exists() and "planted_here" not in sys.modules
    # The caller may name it, and then gets the classes and the size that are in the file.
    found = recipe.load("planted_here:network", trained(path, small, facts(model="planted_here:network", size=24)))
    assert found.classes == ["a", "b"] and found.decode.blank().shape == (3, 24, 24)
    sys.modules.pop("planted_here")


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "timm:resnet18.a1_in1k"])
def test_registered_models_load_from_a_file(recipe, name, tmp_path):
    model = models.load(name)
    transfer.fit_head(model, 2)
    found = recipe.load(trained(tmp_path / "m.safetensors", checkpoint.packed(model.state_dict()), facts(model=name)))
    assert all(
        torch.equal(a, b) for a, b in zip(found.model.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_short_file_makes_no_large_model(recipe, small, tmp_path, monkeypatch):
    made = []
    load = models.load

    def counted(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        made.append(sum(p.numel() for p in model.parameters() if p.device.type != "meta"))
        return model

    monkeypatch.setattr(models, "load", counted)
    with pytest.raises(CheckpointError, match="does not fit"):
        recipe.load(trained(tmp_path / "m.safetensors", small, facts(model="timm:eva_giant_patch14_224")))
    assert made == [0]


DAMAGED = {
    "no JSON": "{",
    "deep": no_depth(),
    "a list": "[]",
    "no model": facts(model=None),
    "a list of models": facts(model=["resnet20"]),
    "no size": facts(size="16"),
    "a huge size": facts(size=10**9),
    "a size of many digits": '{"model": "resnet20", "classes": ["a"], "size": ' + "9" * 400 + "}",
    "a true size": facts(size=True),
    "no classes": facts(classes=[]),
    "classes that are numbers": facts(classes=[1, 2]),
    "classes that are a word": facts(classes="ab"),
    "other classes": facts(classes=["a", "b", "c"]),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_metadata_is_one_error(recipe, small, text, tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.safetensors: "):
        recipe.load(trained(tmp_path / "m.safetensors", small, text))


# Every byte is what was written.


def test_a_flipped_bit_is_seen_by_every_reader(recipe, small, tmp_path):
    path = tmp_path / "model.safetensors"
    whole = Path(trained(path, small, facts())).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    places = [draw.randrange(header) for _ in range(60)] + [draw.randrange(header, len(whole)) for _ in range(60)]
    model = rf.resnet20(num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            recipe.load(str(path))
        with contextlib.suppress(CheckpointError):  # only where the bit is in the name of the metadata
            transfer.load_weights(model, path, "fc")
            assert all(torch.equal(model.state_dict()[name], value) for name, value in small.items())
            model.load_state_dict(before)
    path.write_bytes(whole)
    assert transfer.load_weights(model, path, transfer.head_of(model))


def test_weights_of_train_without_a_checksum_are_refused(small, tmp_path):
    save_file = importlib.import_module("safetensors.torch").save_file
    path = tmp_path / "m.safetensors"
    save_file(small, path, {checkpoint.FACTS: facts()})
    with pytest.raises(CheckpointError, match="has no checksum"):
        transfer.load_weights(rf.resnet20(num_classes=2), path, "fc")
    save_file(small, path, {"checksum": "another program's"})
    assert transfer.load_weights(rf.resnet20(num_classes=2), path, "linear")


# Any bytes.

HEADERS = st.dictionaries(
    st.sampled_from(["a", "model.b", "__metadata__"]),
    st.one_of(
        st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "BF16", "BOOL", "I64", "U64", "C64", "F8_E4M3", "F8_E8M0", "F4", "X"]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 2**40]), max_size=3),
            "data_offsets": st.sampled_from([[0, 0], [0, 4], [0, 1], [4, 8], [0, 8], [0, 2**60]]),
        }),
        st.dictionaries(st.sampled_from(["state", "checksum", "resnet_fused"]), st.text(max_size=9)),
        st.text(max_size=3),
    ),
)  # fmt: skip


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    header = json.dumps(draw(HEADERS)).encode()
    size = len(header) if draw(st.integers(0, 3)) else draw(st.integers(0, 2**64 - 1))
    return size.to_bytes(8, "little") + header + draw(st.binary(max_size=16))


@given(data=st.one_of(st.binary(max_size=200), safetensors()), suffix=st.sampled_from([".safetensors", ".pth"]))
@example(data=(2**27).to_bytes(8, "little") + b"{}", suffix=".safetensors")
def test_any_bytes_are_weights_or_one_error(tmp_path_factory, recipe, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    for read in (
        lambda: transfer.load_weights(model, path, "0"),
        lambda: checkpoint.load(path),
        lambda: recipe.load("resnet20", str(path)),
        lambda: recipe.load(str(path)) if suffix == ".safetensors" else None,
    ):
        with contextlib.suppress(CheckpointError):
            read()


def test_what_is_no_file_does_not_block(tmp_path):
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"pipe{suffix}"
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match="no regular file"):
            transfer.load_weights(torch.nn.Linear(1, 1), path, "")
    with pytest.raises(CheckpointError, match="no regular file"):
        checkpoint.load(tmp_path / "pipe.safetensors")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "stored.pth")
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(tmp_path / "stored.pth") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    with pytest.raises(CheckpointError, match="is compressed"):
        transfer.load_weights(torch.nn.Linear(1, 1), packed, "")


@pytest.mark.parametrize("text", ["[]", "{", no_depth(), "{}", '{"identity": 3}', '{"identity": {}, "groups": 1}'])
def test_a_checkpoint_with_another_state_is_one_error(text, tmp_path):
    optional.needs("safetensors")
    loop = importlib.import_module("resnet_fused.training.loop")
    path = tmp_path / "checkpoint-00000001.safetensors"
    run = loop.Trainer.__new__(loop.Trainer)
    run.identity, run.model = {}, torch.nn.Linear(1, 1)
    run.optimizer = torch.optim.SGD(run.model.parameters())
    tensors = {f"model.{name}": value for name, value in checkpoint.packed(run.model.state_dict()).items()}
    checkpoint.write(path, tensors, {checkpoint.STATE: text})
    with pytest.raises(CheckpointError, match=r"checkpoint-00000001\.safetensors: "):
        run.restore(checkpoint.load(path), str(path))


# Tuning tables.


def tabled(**entry: Any) -> str:
    entry = {"backend": "onednn", "config": None, "milliseconds": {}} | entry
    bound = {"format": table.FORMAT, "version": table.VERSION, "environment": HERE}
    return json.dumps(bound | {"entries": {"a": entry}})


TABLES = {
    "deep": no_depth(),
    "a deep config": tabled().replace('"config": null', f'"config": {no_depth(500)}'),
    "a time of 400 digits": tabled(milliseconds={"onednn": 10**400}),
    "a negative time": tabled(milliseconds={"onednn": -1}),
    "a config of 400 digits": tabled(config=[10**400]),
    "a layout that is a list": tabled(backend="reference", config=["nhwc"]),
    "too many digits to be read": '{"format": ' + "9" * 10**4 + "}",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_damaged_tables_are_set_aside(text, tmp_path, caplog):
    path = tmp_path / "t.json"
    path.write_text(text)
    assert table.load(path, HERE) == {}
    assert len(caplog.records) == 1 and "is ignored" in caplog.text and (tmp_path / "t.json.bad0").exists()


@pytest.mark.parametrize("kind", ["pipe", "endless", "large", "folder"])
def test_what_stands_in_a_tables_place_stops_no_model(kind, caplog, monkeypatch):
    path = environment.path_for(environment.describe(CPU))
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        monkeypatch.setattr(table, "MAX_BYTES", 100)
        path.write_text(" " * 101)
    lookup.forget()
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        run_auto(conv_call()), run_auto(conv_call(n=3))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "is ignored" in caplog.text
    assert not os.path.lexists(path)


def test_no_more_is_read_than_the_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert files.read(path, 5) == b"12345"
    with pytest.raises(files.FileError, match="has more than"):
        files.read(path, 4)


def test_without_a_home_inference_goes_on(monkeypatch, caplog, capsys):
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("RESNET_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    lookup.forget()
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        run_auto(conv_call()), run_auto(conv_call(n=3))
    assert len(caplog.records) == 1 and "RESNET_FUSED_CACHE" in caplog.text
    assert main(["tune", "resnet20", "--batch", "1", "--device", "cpu"]) == 2
    assert "RESNET_FUSED_CACHE" in capsys.readouterr().err


def test_tune_says_at_the_start_that_it_cannot_write(tmp_path, monkeypatch, capsys):
    def measured(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something is measured")

    monkeypatch.setattr(tuner, "tune_call", measured)
    (tmp_path / "file").touch()
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="file"):
        tuner.tune(rf.FusedBasicBlock(8, 8).eval(), torch.randn(1, 8, 6, 6))
    assert main(["tune", "resnet20", "--batch", "1", "--device", "cpu"]) == 2
    assert "the table cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "cache"))
    ship = str(tmp_path / "file" / "ship.json")
    assert main(["tune", "resnet20", "--batch", "1", "--device", "cpu", "--ship", ship]) == 2
    assert "the table cannot be written" in capsys.readouterr().err


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {"backend": st.one_of(JSON, st.just("reference")), "config": JSON, "milliseconds": JSON}
)


@given(data=st.one_of(st.binary(max_size=99), JSON.map(lambda value: json.dumps(value).encode()),
                      st.builds(lambda entry: tabled(**entry).encode(), ENTRIES)))  # fmt: skip
def test_any_bytes_are_a_table_or_set_aside(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    for key, entry in table.load(path, HERE).items():
        assert isinstance(key, str) and isinstance(entry, Entry) and repr(entry)
    for aside in path.parent.glob("any.json.bad*"):
        aside.unlink()
