"""The command ``train``: resumed runs are the unbroken run, whatever was killed or damaged; transfer; processes."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optional
import pytest
import torch
from rich.console import Console
from torch import nn

import resnet_fused as rf
from resnet_fused.cli import main
from resnet_fused.cli import train as train_command
from resnet_fused.training import CheckpointError, checkpoint, transfer
from resnet_fused.training import loop as training_loop

optional.torchvision()
optional.needs("PIL", "safetensors")
Image, load_file = importlib.import_module("PIL.Image"), importlib.import_module("safetensors.torch").load_file

ROOT = Path(__file__).parents[1]
SMALL = ("--epochs", "2", "--batch", "4", "--size", "8", "--device", "cpu", "--workers", "0", "--deterministic")


def tiny() -> nn.Module:
    """Two stages with dropout before the head, so that the state of the random generator counts."""
    model = rf.ResNet(rf.FusedBasicBlock, [1, 1], num_classes=5, planes=(8, 16), small_images=True)
    model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(0.3))
    return model


class Planted:
    """Unpickled it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


def headless() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


MODEL = f"{__name__}:tiny"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of coloured noise, ten images each, of sizes that differ."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(10):
            pixels = torch.randint(0, 160, (9 + i, 12, 3), generator=generator, dtype=torch.uint8)
            pixels[..., 2 - label] += 90
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory) -> Path:
    """A run from start to end: 2 epochs of 6 steps."""
    out = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    assert main(["train", MODEL, str(folder), *SMALL, "--out", str(out)]) == 0
    return out


def train(data: object, out: Path, *options: object) -> int:
    return main(["train", MODEL, str(data), *SMALL, "--out", str(out), *map(str, options)])


def same_weights(out: Path, other: Path) -> bool:
    return (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def command(*arguments: object, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "resnet_fused.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


class Killed(BaseException):
    """What no handler of the package catches."""


@pytest.mark.parametrize("after", range(13))
def test_a_run_stopped_after_any_step_goes_on_bit_for_bit(after, folder, unbroken, tmp_path, monkeypatch):
    learn = training_loop.Trainer._learn

    def interrupted(self, x, y):
        if self.step == after:
            raise Killed
        learn(self, x, y)

    monkeypatch.setattr(training_loop.Trainer, "_learn", interrupted)
    every = ("--checkpoint-every", 1 + after % 4)
    if after < 12:
        with pytest.raises(Killed):
            train(folder, tmp_path, *every)
    else:
        assert train(folder, tmp_path, *every) == 0
        (tmp_path / "model.safetensors").unlink()  # killed between the last checkpoint and this
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, __name__, sys.modules[tiny.__module__])
    torch.rand(3)
    assert train(folder, tmp_path, *every, "--resume") == 0
    assert same_weights(tmp_path, unbroken)
    ours, theirs = (checkpoint.load(checkpoint.path_of(out, 12)) for out in (tmp_path, unbroken))
    assert ours.state == theirs.state
    assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())


def test_kill_9_in_the_middle(folder, unbroken, tmp_path):
    arguments = ("train", MODEL, folder, *SMALL, "--out", tmp_path, "--checkpoint-every", 1)
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoint.found(tmp_path)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "model.safetensors").exists()
    assert train(folder, tmp_path, "--resume") == 0
    assert same_weights(tmp_path, unbroken)


@pytest.mark.parametrize("moment", ["writing", "before the new name", "before the old ones go"])
def test_killed_while_saving(moment, folder, unbroken, tmp_path, monkeypatch, capsys):
    saved = []
    if moment == "writing":
        import safetensors.torch as target

        name, real = "save_file", target.save_file
    elif moment == "before the new name":
        target, name, real = os, "replace", os.replace
    else:
        target, name, real = checkpoint, "prune", checkpoint.prune

    def dying(*arguments, **options):
        saved.append(arguments)
        if len(saved) < 3:
            return real(*arguments, **options)
        if moment == "writing":
            real(*arguments, **options)
            whole = Path(arguments[1]).read_bytes()
            Path(arguments[1]).write_bytes(whole[: len(whole) // 2])
        raise Killed

    monkeypatch.setattr(target, name, dying)
    with pytest.raises(Killed):
        train(folder, tmp_path, "--checkpoint-every", 2)
    monkeypatch.setattr(target, name, real)
    assert train(folder, tmp_path, "--checkpoint-every", 2, "--resume") == 0
    assert capsys.readouterr().err == ""  # no checkpoint was damaged
    assert same_weights(tmp_path, unbroken)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-00000010.safetensors", "checkpoint-00000012.safetensors", "model.safetensors"]


def damaged(path: Path, how: str) -> None:
    whole = bytearray(path.read_bytes())
    if how == "truncated":
        del whole[len(whole) // 2 :]
    elif how == "empty":
        whole.clear()
    else:
        whole[-100] ^= 1  # one bit in some tensor
    path.write_bytes(whole)


@pytest.mark.parametrize("how", ["truncated", "empty", "corrupt"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(how, folder, unbroken, tmp_path, capsys):
    assert train(folder, tmp_path) == 0
    damaged(checkpoint.path_of(tmp_path, 12), how)
    (tmp_path / "model.safetensors").unlink()
    assert train(folder, tmp_path, "--resume") == 0
    err = capsys.readouterr().err
    assert "checkpoint-00000012.safetensors: is corrupt" in err and "going on from" in err
    assert "checkpoint-00000006" in err and err.count("\n") == 1
    assert same_weights(tmp_path, unbroken)
    checkpoint.load(checkpoint.path_of(tmp_path, 12))  # written anew


def test_no_sound_checkpoint_is_an_error_that_changes_nothing(folder, tmp_path, capsys):
    assert train(folder, tmp_path) == 0
    for _, path in checkpoint.found(tmp_path):
        damaged(path, "truncated")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert train(folder, tmp_path, "--resume") == 2
    err = capsys.readouterr().err
    assert all(f"{path}: is corrupt or truncated" in err for _, path in checkpoint.found(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_is_neither_overwritten_nor_resumed_as_another(folder, unbroken, capsys):
    assert train(folder, unbroken) == 2
    assert "holds a run, at step 12: go on with --resume" in capsys.readouterr().err
    for options, told in ((("--lr", 0.2), "learning_rate 0.1, this one has 0.2"), (("--seed", 1), "seed 0")):
        assert train(folder, unbroken, "--resume", *options) == 2
        assert told in capsys.readouterr().err


def test_a_disk_that_is_full_keeps_what_was_saved(folder, tmp_path, monkeypatch, capsys):
    import safetensors.torch as target

    real = target.save_file

    def full(tensors, path, metadata=None):
        if "00000012" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(target, "save_file", full)
    assert train(folder, tmp_path) == 2
    assert "checkpoint-00000012.safetensors: cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000006.safetensors"]
    checkpoint.load(checkpoint.path_of(tmp_path, 6))


def copied(folder: Path, to: Path) -> Path:
    for path in sorted(folder.rglob("*.png")):
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_nothing_is_lost(workers, folder, unbroken, tmp_path, capsys):
    data, out = copied(folder, tmp_path / "data"), tmp_path / "out"
    bad = data / "green" / "4.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    assert train(data, out, "--workers", workers) == 2
    err = capsys.readouterr().err
    assert f"{bad}: cannot be read as an image" in err and err.count("\n") == 1
    step = checkpoint.found(out)[0][0]
    assert 0 < step <= 6 and f"saved after step {step}" in err
    bad.write_bytes(whole)
    assert train(data, out, "--resume", "--workers", workers) == 0
    assert same_weights(out, unbroken)


def test_folders_that_are_not_what_they_must_be(folder, tmp_path, capsys):
    def refused(path: Path, *told: str) -> None:
        assert train(path, tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert all(text in err for text in told) and err.count("\n") == 1, err

    data = copied(folder, tmp_path / "data")
    (data / "yellow").mkdir()
    (data / "yellow" / "notes.txt").write_text("no image")
    refused(data, f"{data / 'yellow'}: no image in this class folder")
    Image.new("RGB", (8, 8)).save(data / "yellow" / "one.png")
    refused(data, f"{data / 'yellow'}: one image cannot be split")
    refused(tmp_path / "absent", f"{tmp_path / 'absent'}: no such folder")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", f"{tmp_path / 'bare'}: holds no class folders")
    both = tmp_path / "both"
    copied(folder, both / "train"), copied(folder, both / "val")
    (both / "val" / "red").rename(both / "val" / "pink")
    refused(both, f"{both / 'train' / 'pink'}: no such folder")
    assert not (tmp_path / "out").exists()


def test_train_and_val_folders(folder, tmp_path, capsys):
    copied(folder, tmp_path / "train"), copied(folder, tmp_path / "val")
    assert train(tmp_path, tmp_path / "out", "--eager", "--label-smoothing", 0.1, "--amp", "bf16", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["trained_on"], facts["tested_on"], facts["equal_predictions"]) == (30, 30, 30)
    assert len(facts["epochs"]) == 2 and facts["recipe"]["amp"] == "bf16"
    assert facts["accuracy"] == facts["accuracy_fused"]


def test_digits_are_learnt_fused_as_eager(tmp_path, capsys):
    accuracies = []
    for name, options in (("fused", ()), ("eager", ("--eager",))):
        code = main(["train", "resnet20", "digits", "--epochs", "5", "--size", "8", "--device", "cpu", "--json",
                     "--out", str(tmp_path / name), *options])  # fmt: skip
        facts = json.loads(capsys.readouterr().out)
        assert code == 0 and facts["verdict"]["ok"]
        assert facts["equal_predictions"] == facts["tested_on"] == 360
        accuracies.append(facts["accuracy"])
    assert min(accuracies) > 0.9


@pytest.mark.parametrize("choice", ["activations", "last_conv"])
def test_recomputing_changes_no_weight(choice, folder, unbroken, tmp_path):
    assert train(folder, tmp_path, "--recompute", choice) == 0
    assert same_weights(tmp_path, unbroken)


def test_transfer_replaces_the_head_and_freezes(folder, tmp_path, capsys):
    torch.manual_seed(3)
    source = tiny()
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "source.pth")
    options = ("--init", tmp_path / "source.pth", "--freeze-until", "layer2", "--no-augment")
    assert train(folder, tmp_path / "out", *options) == 0
    assert "but fc, which is new" in capsys.readouterr().out
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == source.state_dict().keys()
    assert weights["fc.weight"].shape == (3, 16)
    for name, value in source.state_dict().items():
        frozen = name.startswith(("conv1", "bn1", "layer1"))  # their running statistics too
        assert name.startswith("fc") or torch.equal(weights[name], value) == frozen, name
    assert any(name.startswith("optimizer.") for name in load_file(checkpoint.path_of(tmp_path / "out", 12)))

    # Weights with as many classes come with their head; a checkpoint serves as well as the weights.
    for file in (tmp_path / "out" / "model.safetensors", checkpoint.path_of(tmp_path / "out", 12)):
        model = tiny()
        assert transfer.fit_head(model, 3) == "fc"
        assert transfer.load_weights(model, file, "fc")
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_weights_that_do_not_serve_are_named(folder, tmp_path, capsys):
    def refused(content: object, told: str, name: str = "w.pth") -> None:
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        model = tiny()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            transfer.load_weights(model, path, "fc")
        assert str(caught.value).startswith(f"{path}: ") and told in str(caught.value), caught.value
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    state = tiny().state_dict()
    refused({k: v for k, v in state.items() if k != "bn1.weight"}, "it lacks bn1.weight")
    refused({**state, "extra": torch.ones(1)}, "it has the unknown extra")
    refused({**state, "conv1.weight": torch.ones(4, 3, 7, 7)}, "it has another shape of conv1.weight")
    refused({"epoch": 3}, "holds no state_dict")
    refused(b"garbage", "is corrupt, or no file of weights")
    refused(b"garbage", "is corrupt or truncated", "w.safetensors")
    refused({"state_dict": state, "and": Planted(str(tmp_path / "ran"))}, "no file of weights alone")
    assert not (tmp_path / "ran").exists()  # a pickle runs what it likes
    assert train(folder, tmp_path / "out", "--init", tmp_path / "absent.pth") == 2
    assert f"{tmp_path / 'absent.pth'}: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--freeze-until", "layer9"), "no part 'layer9' to freeze until; it has conv1, bn1"),
        (("--freeze-until", "conv1"), "nothing in"),
        (("--amp", "fp16"), "--amp fp16: needs a CUDA device"),
        (("--recompute", "last_conv", "--eager"), "--recompute: needs fused blocks"),
        (("--workers", "-1"), "--workers -1: need 0 or more"),
        (("--lr", "1e30"), "no longer finite in epoch 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_in_one_line(options, told, folder, tmp_path, capsys):
    assert train(folder, tmp_path, *options) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_terminal_sees_a_bar_and_a_line_per_epoch(folder, tmp_path, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=120)
    monkeypatch.setattr(train_command, "console", lambda quiet: screen)
    assert train(folder, tmp_path) == 0
    shown = screen.file.getvalue()
    assert "12/12" in shown and "epoch 2/2: loss" in shown


def test_a_wrong_fused_model_turns_it_red(folder, tmp_path, monkeypatch, capsys):
    fuse, calls = rf.fuse, []

    def wrong(model, **options):
        calls.append(fuse(model))
        if len(calls) == 2:  # the trained one
            calls[-1].fc.bias.data += torch.tensor([99.0, 0.0, 0.0])
        return calls[-1]

    monkeypatch.setattr(rf, "fuse", wrong)
    assert train(folder, tmp_path) == 1
    out = capsys.readouterr().out
    assert "predictions equal to eager's: 2 of 6" in out and "FAILED" in out


def test_a_model_without_a_classifier(folder, tmp_path, capsys):
    assert main(["train", f"{__name__}:headless", str(folder), *SMALL, "--out", str(tmp_path)]) == 2
    assert "has no linear layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "together"),
    [(("--freeze-until", "fc"), ()), (("--freeze-until", "layer2"), ("--sync-batchnorm", "--recompute", "last_conv"))],
    ids=["frozen", "synchronised"],
)
def test_two_processes_train_what_one_does(options, together, folder, tmp_path, capsys):
    """Statistics frozen, or those of all images, and no dropout: two processes of batch 2 take the steps of one process
    of batch 4."""
    plain = f"{__name__}:without_dropout"
    arguments = ("train", plain, folder, *SMALL, *options, "--no-augment")
    facts = in_two_processes(*arguments, *together, "--batch", 2, "--out", tmp_path / "two")
    assert (facts["processes"], facts["tested_on"], facts["equal_predictions"]) == (2, 6, 6)
    assert main([*map(str, arguments), "--json", "--out", str(tmp_path / "one")]) == 0
    single = json.loads(capsys.readouterr().out)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)
    for ours, theirs in zip(facts["epochs"], single["epochs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_go_on_bit_for_bit(folder, tmp_path):
    """As after a kill between steps 10 and 12; each process has a random generator of its own for dropout."""
    arguments = ("train", MODEL, folder, *SMALL, "--batch", 2, "--checkpoint-every", 5, "--out", tmp_path)
    in_two_processes(*arguments)
    whole = {path: path.read_bytes() for path in tmp_path.glob("*00012.safetensors")}
    whole[tmp_path / "model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    for path in whole:
        path.unlink()
    assert [step for step, _ in checkpoint.found(tmp_path)] == [10]
    in_two_processes(*arguments, "--resume")
    assert (tmp_path / "model.safetensors").read_bytes() == whole[tmp_path / "model.safetensors"]
    assert load_file(checkpoint.path_of(tmp_path, 12)).keys() >= {"rng.0.cpu", "rng.1.cpu"}


def in_two_processes(*arguments: object) -> dict:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        command(*arguments, "--json", launcher=launcher), env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # the first process alone prints


def without_dropout() -> nn.Module:
    return rf.ResNet(rf.FusedBasicBlock, [1, 1], num_classes=5, planes=(8, 16), small_images=True)
