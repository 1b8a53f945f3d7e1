"""Files of weights of any content: what was written, or one clear error; never code, and within bounds on memory."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import optional
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import resnet_fused as rf
from resnet_fused.testing.models import ModelError
from resnet_fused.training import CheckpointError, checkpoint, transfer
from resnet_fused.training.checkpoint import FACTS, Checkpoint

torchvision = optional.torchvision()
optional.needs("safetensors", "PIL")
save_file = importlib.import_module("safetensors.torch").save_file
recipe = importlib.import_module("resnet_fused.recipes.classifier")

GOOD = {"model": "resnet20", "size": 24, "classes": ["cat", "dog"], "data": "images"}


def trained(path: Path, **changes: object) -> Path:
    """A file as ``resnet-fused train`` writes it, of a network with two classes."""
    facts = {key: value for key, value in (GOOD | changes).items() if value is not None}
    write(path, checkpoint.packed(rf.resnet20(num_classes=2).state_dict()), FACTS, facts)
    return path


def write(path: Path, tensors: dict[str, torch.Tensor], key: str, facts: dict[str, object]) -> None:
    checkpoint.write(path, tensors, {key: json.dumps(facts)})


def refused(path: Path, *told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        recipe.load(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < 1000, message
    assert all(text in message for text in told), message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# A file does not choose code.


PLANTED = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
def net(): Path(__file__).with_suffix(".called").touch()
"""


def test_a_file_runs_no_code(path, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("planted:net", "os:abort", "builtins:exit", "torch.hub:list", ":", "a:", ":b"):
        refused(trained(path, model=name), "name another model")
    assert "planted" not in sys.modules and not list(tmp_path.glob("planted.[rc]*"))


@pytest.mark.parametrize(
    "name",
    ["ResNet", "nn", "torchvision:get_model", "torchvision:list_models", "torchvision:models.resnet18", "timm:data",
     "timm:hf-hub:someone/net", "timm:hf_hub:someone/net", "timm:local-dir:/tmp", "timm:resnet18.no_such_tag",
     "timm:create_model"],
)  # fmt: skip
def test_a_file_names_builders_and_no_other_attribute(name, path):
    optional.needs("timm")
    refused(trained(path, model=name), "name another model")


def test_a_file_does_not_name_what_others_have_registered(path, monkeypatch):
    called = []
    register = torchvision.models._api.BUILTIN_MODELS
    monkeypatch.setitem(register, "mine", lambda weights=None: called.append(1))
    refused(trained(path, model="torchvision:mine"), "need a model of torchvision itself")
    timm = pytest.importorskip("timm")
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "mine", lambda **options: called.append(1))
    refused(trained(path, model="timm:mine"), "need a model of timm itself")
    assert not called


def two_classes() -> nn.Module:
    return rf.resnet20(num_classes=7)


def test_the_caller_may_name_the_model(path):
    """Then the file's classes and size hold, whatever model it names."""
    trained(path, model="unknown.package:net")
    found = recipe.load(f"{__name__}:two_classes", str(path))
    assert list(found.classes) == ["cat", "dog"] and found.decode.blank().shape == (3, 24, 24)
    with pytest.raises(ModelError, match="leave out"):
        recipe.load(str(path), "DEFAULT")


@pytest.mark.parametrize("spec", ["resnet20", "torchvision:resnet18", "timm:resnet10t"])
def test_known_models_are_loaded_by_name(spec, path):
    if spec.startswith("timm"):
        optional.needs("timm")
    model = recipe.models.load(spec)
    transfer.fit_head(model, 2)
    write(path, checkpoint.packed(model.state_dict()), FACTS, GOOD | {"model": spec})
    found = recipe.load(str(path)).model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


# Metadata.


@pytest.mark.parametrize(
    "change",
    [{"model": None}, {"model": 5}, {"model": "x" * 1_000_000}, {"model": ["resnet20"]}, {"size": None},
     {"size": "24"}, {"size": True}, {"size": 0}, {"size": -1}, {"size": 10**400}, {"size": 1_000_000}, {"size": 24.5},
     {"classes": None}, {"classes": "catdog"}, {"classes": []}, {"classes": [1, 2]}, {"classes": {"cat": 0}},
     {"classes": ["a", ["b"]]},
     {"classes": ["cat"]}, {"classes": [""] * 500_000}, {"data": "digits"}],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_metadata_of_any_kind_is_one_error(change, path):
    refused(trained(path, **change))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "1", "[" * 100_000, '{"a":' * 50_000, "9" * 5000, "NaN", "00000000 {}"],
    ids=lambda text: text[:12],
)
def test_metadata_that_is_no_object_is_one_error(text, path):
    save_file({"a": torch.zeros(1)}, path, {FACTS: text})
    refused(path)
    checkpoint.write(path, {"a": torch.zeros(1)}, {FACTS: text})
    refused(path)


def test_a_small_file_does_not_have_a_large_model_built(path, monkeypatch):
    built = []
    load = recipe.models.load
    monkeypatch.setattr(recipe.models, "load", lambda *a, **k: built.append(load(*a, **k)) or built[-1])
    refused(trained(path, model="torchvision:vit_h_14"), "does not fit")
    assert len(built) == 1 and all(p.is_meta for p in built[0].parameters())


def test_what_does_not_fit_is_not_read(path, monkeypatch):
    """Sparse files, which would be read into as much memory: one larger than the model can need, one that is not."""
    model = rf.resnet20()
    for size, told in ((200_000_000, "has more than"), (60_000_000, "it lacks")):
        outline = {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        header = json.dumps(outline).encode()
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=told):
            patch.setattr(checkpoint, "read", lambda *arguments: pytest.fail("it was read"))
            transfer.load_weights(model, path, "fc")


def test_a_large_header_is_not_parsed(path):
    path.write_bytes((50_000_000).to_bytes(8, "little") + b"[" * 50_000_000)
    tracemalloc.start()
    try:
        refused(path, "its header has 50000000 bytes")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


# Every byte counts.


def test_no_flipped_bit_passes(path):
    """In a trained file and a run's checkpoint."""
    tensors = {"conv.weight": torch.randn(3, 3), "n": torch.tensor(5)}
    write(path, tensors, FACTS, GOOD)
    other = path.with_name("run.safetensors")
    checkpoint.save(other, Checkpoint(tensors, {"step": 3}))
    for file in (path, other):
        whole = file.read_bytes()
        read = checkpoint.read(file)[0]
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
        for bit in range(0, 8 * len(whole), 5):  # each of a byte's bits, in turn
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=file.name):
                checkpoint.read(file)
        file.write_bytes(whole)


def test_every_reader_looks_at_the_checksum(path):
    trained(path)
    whole = bytearray(path.read_bytes())
    whole[-50_000] ^= 1
    path.write_bytes(whole)
    refused(path, "is corrupt: its checksum")
    model = rf.resnet20(num_classes=2)
    before = model.conv1.weight.clone()
    with pytest.raises(CheckpointError, match="is corrupt: its checksum"):
        transfer.load_weights(model, path, "fc")
    with pytest.raises(CheckpointError, match="is corrupt: its checksum"):
        recipe.load("resnet20", str(path))
    assert torch.equal(model.conv1.weight, before)


def test_the_same_weights_are_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    one = trained(tmp_path / "1.safetensors").read_bytes()
    torch.manual_seed(0)
    assert all(one == (torch.manual_seed(0), trained(tmp_path / f"{i}.safetensors"))[1].read_bytes() for i in range(20))


# Files by torch.save.


def saved(content: object, **options: object) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


def bomb(compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A state_dict whose tensor is compressed a thousandfold."""
    data = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(50_000_000)}))) as whole,
        zipfile.ZipFile(data, "w", compression) as target,
    ):
        for part in whole.infolist():
            target.writestr(part.filename, whole.read(part))
    return data.getvalue()


def tuples(zipped: bool) -> bytes:
    """A dict whose key is a tuple of two tuples of two tuples …, which takes 300 bytes, and for ever to be hashed."""
    pickled = b"\x80\x02}q\x00K\x01q\x01"
    for i in range(1, 60):
        pickled += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    pickled += b"K\x05s."
    whole = saved({"a": torch.zeros(1)}, _use_new_zipfile_serialization=zipped)
    if not zipped:
        begin = io.BytesIO(whole)
        for _ in range(3):
            pickle.load(begin)
        return whole[: begin.tell()] + pickled + pickle.dumps([], 2)
    data = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(data, "w") as new:
        for part in old.infolist():
            new.writestr(part.filename, pickled if part.filename.endswith("data.pkl") else old.read(part))
    return data.getvalue()


BAD_PICKLES = {
    "tuples of tuples": lambda: tuples(True),
    "tuples of tuples of old": lambda: tuples(False),
    "a compressed tensor": bomb,
    "a large pickle": lambda: saved({"a": list(range(1_000_000))}),
    "a large pickle of old": lambda: saved({"a": list(range(1_000_000))}, _use_new_zipfile_serialization=False),
    "a pickle alone": lambda: pickle.dumps({"a": 1}),
    "a recursion": lambda: saved(nested(150)),
    "another shape of key": lambda: saved({("a", "b"): torch.zeros(1)}),
    "a sparse tensor": lambda: saved({**rf.resnet20().state_dict(), "fc.bias": torch.zeros(10).to_sparse()}),
    "a meta tensor": lambda: saved({**rf.resnet20().state_dict(), "bn1.bias": torch.zeros(16, device="meta")}),
    "complex numbers": lambda: saved({**rf.resnet20().state_dict(), "bn1.bias": torch.zeros(16, dtype=torch.cfloat)}),
    "a zip of nothing": lambda: b"PK\5\6" + bytes(18),
    "too many parts": lambda: b"PK\5\6" + bytes(8) + b"\xff\xff\xff\x7f" + bytes(6),
}


def nested(depth: int) -> object:
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("make", BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_a_pickle_of_any_kind_is_one_error(make, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(make())
    model = rf.resnet20()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"w.pth: "):
        transfer.load_weights(model, path, "fc")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_read(zipped, tmp_path):
    source, model = rf.resnet20(), rf.resnet20()
    optimizer = torch.optim.AdamW(source.parameters())
    source(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    content = {"state_dict": source.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    (tmp_path / "w.pth").write_bytes(saved(content, _use_new_zipfile_serialization=zipped))
    assert transfer.load_weights(model, tmp_path / "w.pth", "fc")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_is_no_regular_file_is_refused_at_once(name, tmp_path):
    makers = (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir)
    for number, make in enumerate(makers):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        make(path)
        with pytest.raises(CheckpointError, match="is no regular file"):
            transfer.load_weights(rf.resnet20(), path, "fc")
        with pytest.raises(CheckpointError, match="is no regular file"):
            recipe.load("resnet20", str(path))


# Any bytes.


def mutated(seed: bytes) -> st.SearchStrategy[bytes]:
    """``seed`` with a few of its bytes, mostly of the first thousand, replaced, removed or added."""

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(seed)
        for at, length, new in edits:
            data[at : at + length] = new
        return bytes(data)

    at = st.one_of(st.integers(0, 1000), st.integers(0, len(seed)))
    return st.lists(st.tuples(at, st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=5).map(change)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2, 2))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def seeds() -> list[tuple[str, bytes]]:
    """Files of ``small`` in every form, by their names' endings."""
    tensors = checkpoint.packed(small().state_dict())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "a.safetensors", tensors, FACTS, GOOD)
        run = {f"model.{n}": t for n, t in tensors.items()}
        checkpoint.save(folder / "b.safetensors", Checkpoint(run, {"step": 1}))
        save_file(tensors, folder / "c.safetensors")
        found = [(".safetensors", path.read_bytes()) for path in sorted(folder.iterdir())]
    for zipped in (True, False):
        found.append((".pth", saved(small().state_dict(), _use_new_zipfile_serialization=zipped)))
    return found


SEEDS = seeds()


@given(data=st.data())
def test_bytes_of_any_kind_are_weights_or_one_error(data, scratch):
    ending, whole = data.draw(st.sampled_from(SEEDS))
    path = scratch / f"w{ending}"
    path.write_bytes(data.draw(st.one_of(st.binary(max_size=300), mutated(whole))))
    for read in (
        lambda: transfer.load_weights(small(), path, "2"),
        lambda: checkpoint.load(path),
        lambda: recipe.load(f"{__name__}:small", str(path)),
    ):
        try:
            read()
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 1000


def test_a_checkpoint_of_any_state_is_resumed_or_one_error(tmp_path):
    """One that has a checksum, but not from us: each part of its state replaced in turn by values of other kinds."""
    from resnet_fused.training import Data, Recipe, Trainer
    from resnet_fused.training.data import TensorImages

    images = TensorImages(torch.randn(6, 1, 4, 4), torch.tensor([0, 1] * 3))
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    trainer = Trainer(
        net, Data(images, images, ("a", "b"), "x"), Recipe(epochs=2, batch=3), device=torch.device("cpu")
    )  # fmt: skip
    trainer.run()
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, trainer.checkpoint())
    good = checkpoint.load(path)
    trainer.restore(good, "c")
    for key in good.state:
        for value in (None, -1, 10**9, "x", [], [[]], {}, [{}], {"a": "b"}, [{"lr": "fast"}], float("nan"), True):
            if key == "scaler" or (key, value) == ("history", []):
                continue  # not looked at without fp16; and as before the first epoch's end
            checkpoint.save(path, Checkpoint(good.tensors, good.state | {key: value}))
            with pytest.raises(CheckpointError, match=r"^c: "):
                trainer.restore(checkpoint.load(path), "c")
    for name in good.tensors:
        for value in (torch.zeros(0), torch.zeros(3, 3, 3), torch.zeros(1, dtype=torch.cfloat)):
            with pytest.raises(CheckpointError, match=r"^c: "):
                trainer.restore(Checkpoint(good.tensors | {name: value}, good.state), "c")
