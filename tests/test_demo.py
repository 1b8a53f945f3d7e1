"""The demo's parts on a small configuration. That the digits are learnt is proved by the demo itself, in full."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json

import pytest
import torch
from rich.console import Console

import resnet_fused as rf
from resnet_fused.cli import main

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from resnet_fused.cli import demo
from resnet_fused.cli.demo import chart, digits, photos
from resnet_fused.testing.compare import Verdict
from resnet_fused.training.data import Data, TensorImages

CPU = torch.device("cpu")
DIGITS = digits.Config(epochs=1, size=8, batch=512, repeats=2)
PHOTOS = photos.Config(models=("resnet20",), size=32, rows=1, columns=2, repeats=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def test_digits_are_split_without_overlap():
    data, held_out = digits.load(16, seed=0)
    assert data.train.x.shape == (1437, 3, 16, 16)
    assert held_out.x.shape == (360, 3, 16, 16)
    assert abs(float(data.train.x.mean())) < 1e-4
    assert abs(float(data.train.x.std()) - 1) < 1e-4
    assert set(held_out.y.bincount().tolist()) <= {35, 36, 37}  # of each digit alike
    seen = {x.numpy().tobytes() for x in data.train.x}
    assert not any(x.numpy().tobytes() in seen for x in held_out.x)
    assert torch.equal(digits.load(16, seed=0)[1].x, held_out.x)


def test_crops_are_what_the_photographs_hold():
    from sklearn.datasets import load_sample_images

    x = photos.crops(224, 2, 2)
    assert x.shape == (8, 3, 224, 224)
    corner = torch.tensor(load_sample_images().images[1])[-224:, -224:].permute(2, 0, 1) / 255
    restored = x[7] * torch.tensor(photos.DEVIATION).view(3, 1, 1) + torch.tensor(photos.MEAN).view(3, 1, 1)
    torch.testing.assert_close(restored, corner, rtol=0, atol=1e-5)
    assert len(photos.crops(400, 1, 1)) == 2
    with pytest.raises(ValueError, match="size: got 500, need at most the photograph's 427"):
        photos.crops(500, 1, 1)


def test_training_lowers_the_loss():
    whole, held_out = digits.load(8, seed=0)
    some = TensorImages(whole.train.x[:512], whole.train.y[:512], whole.train.transform)
    data = Data(some, held_out, whole.classes, "")
    torch.manual_seed(0)
    model = rf.resnet20(planes=(8, 16, 32))
    plain = Console(file=io.StringIO(), width=80)
    digits.train(model, data, digits.Config(epochs=4, size=8), plain)
    lines = plain.file.getvalue().splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training
    assert int(model.bn1.num_batches_tracked) == 4 * 8


def test_the_whole_demo(tmp_path, capsys):
    """One epoch learns too little: that alone is what fails."""
    code = demo.play(DIGITS, PHOTOS, tmp_path, CPU)
    facts = json.loads((tmp_path / "demo.json").read_text())
    out = capsys.readouterr().out
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("FAILED")] == [f"FAILED: {facts['failures'][0]}"]
    assert facts["failures"][0].startswith("accuracy on held-out digits")
    assert facts["digits"]["equal_predictions"] == facts["digits"]["tested_on"] == 360
    assert [(r["model"], r["dtype"]) for r in facts["photographs"]] == [
        ("resnet20", "float32"),
        ("resnet20", "bfloat16"),
    ]
    assert all(r["verdict"]["ok"] for r in facts["photographs"])
    blocks = facts["photographs"][0]["blocks"]
    assert len(blocks) == 10
    assert all(block["eager"] > 0 and block["fused"] > 0 for block in blocks)
    assert "predictions equal to eager's: 360 of 360" in out
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_the_chart_shows_every_block(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    blocks = [{"name": "layer1.0", "eager": 2.0, "fused": 1.0}, {"name": "layer2.0", "eager": 3.0, "fused": 4.0}]
    results = [{"model": "resnet18", "dtype": "float32", "batch": 8, "blocks": blocks}, {"model": "left out"}]
    chart.draw(results, "a CPU", tmp_path / "chart.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["layer1.0", "layer2.0"]
    assert [bar.get_height() for bar in axes.patches] == [2, 3, 1, 4]
    assert {text.get_text() for text in axes.texts} == {"2.00×", "0.75×"}
    assert "milliseconds" in axes.get_ylabel()


def test_every_failure_is_told():
    good = {
        "accuracy": 0.99,
        "equal_predictions": 360,
        "tested_on": 360,
        "verdict": {"ok": True},
    }
    assert digits.failures(good) == []
    for change in ({"accuracy": 0.9699}, {"equal_predictions": 359}, {"verdict": {"ok": False}}):
        assert len(digits.failures({**good, **change})) == 1
    photo = {"model": "resnet18", "dtype": "bfloat16", "verdict": {"ok": True}}
    assert photos.failures([photo]) == []
    assert len(photos.failures([photo, {**photo, "verdict": {"ok": False}}])) == 1


def test_a_photograph_outside_the_budget_is_not_timed(quiet, monkeypatch):
    bad = Verdict("resnet20", "", "", None, "made up")
    monkeypatch.setattr(photos, "check", lambda *args: bad)
    (result,) = photos.run(
        photos.Config(models=("resnet20",), dtypes=("float32",), size=32, rows=1, columns=1), CPU, quiet
    )
    assert "milliseconds" not in result
    assert not result["verdict"]["ok"]


def test_the_command_tells_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err == (
        "resnet-fused: error: the demo needs scikit-learn, pillow, matplotlib: pip install 'resnet-fused[bench]'\n"
    )


def test_the_folder_must_be_one(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err
