"""The command line: what it prints, its exit codes, its errors, and that a broken block turns it red."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.cli import bench as bench_command
from resnet_fused.cli import main
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.roofline import Device
from resnet_fused.testing import models
from resnet_fused.testing.bench import environment, program, suites
from resnet_fused.testing.compare import check, fused_parts
from resnet_fused.testing.eager import eager_copy
from resnet_fused.testing.statistics import calibrate
from resnet_fused.testing.timing import Timing, interleaved


class Tiny(nn.Module):
    """A stem that does not fuse, and two blocks that do."""

    def __init__(self) -> None:
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(rf.FusedBasicBlock(8, 8), rf.FusedBasicBlock(8, 12, 2, shortcut))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


class Plain(nn.Module):
    """Nothing to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": self.conv(x), "b": x.sum((2, 3))}


def tiny() -> nn.Module:
    return Tiny()


class Tuned(Tiny):
    """A model that gives what ``finish`` makes of its output."""

    def finish(self, y: torch.Tensor) -> object:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> object:
        return self.finish(super().forward(x))


class Wrapped(Tuned):
    def finish(self, y):
        return SimpleNamespace(logits=y)


class Silent(Tuned):
    def finish(self, y):
        return None


class Data(Tuned):
    """As many rows as its dtype says."""

    def finish(self, y):
        return y[: 1 + (y.dtype == torch.float64)]


class FloatOnly(Tiny):
    def forward(self, x):
        return super().forward(x.float())


def number() -> int:
    return 3


def broken() -> nn.Module:
    raise KeyError("no such layer")


instance = Plain()
HERE = f"{__name__}:"
SMALL = ("--size", "16", "--device", "cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def wrong_reference(monkeypatch):
    """The reference backend, which eager does not use, forgets β."""
    right = reference.run

    def run(call):
        conv = call.conv
        return right(call._replace(conv=conv._replace(bn_bias=torch.zeros_like(conv.bn_bias))))

    monkeypatch.setattr(reference, "run", run)


def printed(capsys) -> dict:
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def refused(capsys, *argv: str) -> str:
    """The one line that the command prints on stderr when it ends with code 2."""
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = printed(capsys)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == backends.available()
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_info_says_why_a_backend_is_absent(capsys, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: "no such luck" if name == "cudnn" else None)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("cudnn" in line and "no such luck" in line for line in lines)
    assert any(line.split()[:2] == ["reference", "yes"] for line in lines)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_check_passes(capsys, dtype, layout):
    assert main(["check", f"{HERE}tiny", *SMALL, "--dtype", dtype, "--layout", layout, "--json"]) == 0
    facts = printed(capsys)
    assert facts["ok"]
    assert [v["name"] for v in facts["verdicts"]] == ["blocks.0", "blocks.1", "(whole model)"]
    assert all(v["ok"] and 0 < v["ratio"] <= 1 for v in facts["verdicts"])
    assert facts["input"] == [2, 3, 16, 16]


def test_check_covers_the_stem(capsys):
    assert main(["check", "resnet20", *SMALL, "--batch", "1", "--json"]) == 0
    names = [v["name"] for v in printed(capsys)["verdicts"]]
    assert names[0] == "stem"
    assert len(names) == 1 + 9 + 1


def test_check_prints_a_table(capsys):
    assert main(["check", f"{HERE}tiny", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "blocks.1" in out
    assert "2 fused parts and the whole model are within the budget" in out


def test_check_goes_red_on_a_wrong_block(capsys, wrong_reference):
    assert main(["check", f"{HERE}tiny", *SMALL, "--backend", "reference", "--json"]) == 1
    facts = printed(capsys)
    assert not facts["ok"]
    assert not any(v["ok"] for v in facts["verdicts"])
    assert main(["check", f"{HERE}tiny", *SMALL, "--backend", "reference"]) == 1
    assert "FAILED: blocks.0, blocks.1, (whole model)" in capsys.readouterr().out


def test_check_tells_what_a_block_raises(capsys, monkeypatch):
    def run(call):
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(reference, "run", run)
    assert main(["check", f"{HERE}tiny", *SMALL, "--backend", "reference", "--json"]) == 1
    assert printed(capsys)["verdicts"][0]["problem"] == "raised RuntimeError: out of ideas"


def test_check_of_a_model_with_nothing_to_fuse(capsys):
    assert main(["check", f"{HERE}instance", *SMALL]) == 0
    assert "nothing was fused" in capsys.readouterr().out


def test_check_lists_what_is_left_alone(capsys):
    assert main(["check", "torchvision:resnet18", "--size", "32", "--device", "cpu", "--json"]) == 0
    assert printed(capsys)["skipped"] == []
    assert main(["check", "timm:resnet18d", "--size", "32", "--batch", "4", "--device", "cpu", "--json"]) == 0
    assert printed(capsys)["ok"]


def test_keep_statistics_leaves_the_norms_alone(monkeypatch):
    model = Tiny().eval()
    monkeypatch.setattr(models, "load", lambda spec: model)
    assert main(["check", "resnet20", *SMALL, "--keep-statistics"]) == 0
    assert all(m.running_mean.eq(0).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert main(["check", "resnet20", *SMALL]) == 0
    assert all(m.running_mean.ne(0).any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda y: y[:, :-1], "shape"),
        (lambda y: y.double(), "dtype"),
        (lambda y: y.contiguous(memory_format=torch.channels_last), "strides"),
        (lambda y: (y, y), "outputs"),
    ],
)
def test_a_verdict_sees_more_than_values(change, problem):
    eager, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)
    assert check("", "", "", eager, eager, (x,)).ok
    verdict = check("", "", "", eager, lambda t: change(eager(t)), (x,))
    assert not verdict.ok
    assert verdict.problem is not None
    assert verdict.problem.startswith(problem)


def test_a_verdict_counts_the_worst_output():
    eager, x = Plain().eval(), torch.randn(1, 3, 8, 8)
    assert check("", "", "", eager, eager, (x,)).ok
    for key in ("a", "b"):
        assert not check("", "", "", eager, lambda t, key=key: {**eager(t), key: eager(t)[key] + 1e-3}, (x,)).ok
    assert not check("", "", "", eager, lambda t: {k: v * float("nan") for k, v in eager(t).items()}, (x,)).ok


def test_blocks_are_fed_what_eager_feeds_them():
    model = Tiny().eval()
    x = torch.randn(1, 3, 8, 8)
    first, second = fused_parts(eager_copy(model), rf.fuse(model), x)
    with torch.no_grad():
        torch.testing.assert_close(first.inputs[0], model.stem(x), rtol=0, atol=0)
        torch.testing.assert_close(second.inputs[0], first.eager(first.inputs[0]), rtol=0, atol=0)
    assert not any(m._forward_pre_hooks for m in first.eager.modules())


def test_the_eager_twin_calls_no_op_of_ours(monkeypatch):
    model = rf.resnet20().eval()
    calibrate(model, torch.randn(2, 3, 16, 16), perturb=True)
    eager, x = eager_copy(model), torch.randn(1, 3, 16, 16)
    expected = model(x)

    def refuse(*args, **kwargs):
        raise AssertionError("called an op of ours")

    monkeypatch.setattr(backends, "choose", refuse)
    with torch.no_grad():
        torch.testing.assert_close(eager(x), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(AssertionError, match="an op of ours"):
            model(x)


def test_verify_is_not_vacuous_for_modules_of_ours(wrong_reference):
    block = rf.FusedBasicBlock(4, 4).eval()
    nn.init.ones_(block.bn2.bias)
    x = torch.randn(1, 4, 6, 6)
    assert rf.verify(block, x, backend="onednn").ok
    assert not rf.verify(block, x, backend="reference").ok


def test_calibrated_norms_normalise():
    model, x = Tiny().eval(), torch.randn(4, 3, 16, 16)
    calibrate(model, x)
    seen = {}
    norm = model.blocks[1].bn1
    norm.register_forward_hook(lambda m, args, y: seen.update(y=y.clone()))  # ReLU follows in place
    model(x)
    torch.testing.assert_close(seen["y"].mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen["y"].var((0, 2, 3), correction=0), torch.ones(12), rtol=1e-2, atol=1e-2)
    calibrate(model, x, perturb=True)
    assert norm.weight.std() > 0.05
    assert norm.bias.std() > 0.05


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """``resnet-fused bench`` into a folder of the test's own, with rates that are not measured."""
    rates = Device("here", {torch.float32: 1e11, torch.bfloat16: 2e11}, 2e10)
    monkeypatch.setattr(program, "measure_rates", lambda *args: rates)
    monkeypatch.setattr(environment, "commit", lambda root: "0123")
    return ["bench", "--results", str(tmp_path), "--repeats", "3"]


def test_bench_of_a_users_model_and_again_from_the_file(capsys, bench):
    command = [*bench, f"{HERE}tiny", *SMALL, "--batch", "2", "--contender", "eager", "fused", "fused NCHW"]
    assert main([*command, "--json"]) == 0
    facts = printed(capsys)
    assert facts["ok"] and facts["added"] == 4
    assert {row["contender"]: row["status"] for row in facts["rows"]} == {
        "eager NCHW": "ok", "eager channels_last": "ok", "fused": "ok", "fused NCHW": "ok"
    }  # fmt: skip
    for row in facts["rows"]:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["commit"] == "0123" and row["device"] and row["model"] == f"{HERE}tiny"
    assert main([*command, "--json"]) == 0
    again = printed(capsys)
    assert again["added"] == 0 and again["rows"] == facts["rows"]
    assert main([*command, "--fresh"]) == 0
    assert "4 rows added" in capsys.readouterr().out


def test_bench_prints_a_table_and_every_contender_has_its_place(capsys, bench):
    command = [*bench, "resnet20", "--size", "16", "--batch", "2", "--contender"]
    names = ["eager", "folded channels_last", "fused", "fused NCHW", "fused[onednn]", "fused[reference]"]
    assert main([*command, *names]) == 0
    out = capsys.readouterr().out
    for text in ("× eager", "images/s", "fused[reference]", "geometric mean, float32"):
        assert text in out, text
    assert main([*command, "eager", "fused"]) == 0
    out = capsys.readouterr().out
    assert "resnet20-fp32-N2-C3x16x16" in out and "× fused" in out


def test_a_red_gate_prints_no_speed(capsys, bench, monkeypatch):
    fuse = rf.fuse

    def spoiled(model, **options):
        fused = fuse(model, **options)
        with torch.no_grad():
            fused.stem.bias += 0.1
        return fused

    monkeypatch.setattr(rf, "fuse", spoiled)
    command = [*bench, f"{HERE}tiny", *SMALL, "--batch", "1", "--contender", "eager", "fused"]
    assert main([*command, "--json"]) == 1
    facts = printed(capsys)
    assert not facts["ok"]
    assert {row["contender"]: bool(row["p50_ms"]) for row in facts["rows"]} == {
        "eager NCHW": True, "eager channels_last": True, "fused": False
    }  # fmt: skip
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "RED, not timed" in out and "│   RED │" in out


def test_the_suites_are_those_of_the_harness():
    assert bench_command.SUITES == suites.SUITES


def test_timing_takes_turns():
    calls: list[str] = []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = interleaved(candidates, device=torch.device("cpu"), repeats=3, warmup=1, min_seconds=0)
    assert "".join(calls) == "aabb" + "aabb" * 3  # each turn: once untimed, once timed
    assert [len(t.samples) for t in timings.values()] == [3, 3]
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)).p20 == 2.0
    short = interleaved(candidates, device=torch.device("cpu"), repeats=9, min_seconds=0, max_seconds=0)
    assert len(short["a"].samples) == 3
    with pytest.raises(ValueError, match="repeats: got 0"):
        interleaved(candidates, device=torch.device("cpu"), repeats=0)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["check", "resnet5O"], "close: resnet"),
        (["check", "torchvision:resnet5"], "torchvision has no model 'resnet5' (close: resnet50"),
        (["check", "timm:resnett18"], "timm has no model 'resnett18' (close: resnet18"),
        (["check", "no_such_package:model"], "cannot import no_such_package"),
        (["check", f"{HERE}tinny"], "(close: tiny"),
        (["check", f"{HERE}number"], "it returned int, need a torch.nn.Module"),
        (["check", f"{HERE}SMALL"], "got tuple, need a callable"),
        (["check", f"{HERE}broken"], "calling it raised KeyError: 'no such layer'"),
        (["check", ":x"], "package.module:callable"),
        (["bench", "resnet20", "--batch", "0"], "got '0', need an integer of at least 1"),
        (["bench", f"{HERE}instance", "--size", "1", "--json"], "does not run on an input (8, 3, 1, 1)"),
        (["check", "resnet20", "--batch", str(10**12)], "does not run on an input (1000000000000, 3, 32, 32)"),
        (["bench", "resnet5O"], "close: resnet"),
        (["bench", "resnet20", "--contender", "onyx"], "onyx: unknown. Here are: eager, peers"),
        (["bench", "resnet20", "--case", "layer9"], "no case of models has 'layer9' in its name"),
        (["check", "resnet20", "--seed", str(2**63)], "need an integer from 0 to 2**63 - 1"),
        (["check", "resnet20", "--seed", "-1"], "got '-1'"),
        (["check", f"{HERE}Wrapped", *SMALL], "eager raised TypeError: the output is a SimpleNamespace"),
        (["check", f"{HERE}Silent", *SMALL], "eager gives no tensors to compare"),
        (["check", f"{HERE}Data", *SMALL], "the shapes of eager's outputs change with its rounding"),
        (["check", f"{HERE}FloatOnly", *SMALL], "eager raised RuntimeError in float64: "),
        (["check", f"{HERE}FloatOnly", *SMALL, "--dtype", "bf16"], "eager raised RuntimeError: "),
        (["bench", f"{HERE}FloatOnly", *SMALL, "--dtype", "bf16", "--json"], "eager raised RuntimeError in float64: "),
        (["check", "resnet20", "--device", "tpu9"], "--device tpu9"),
        (["check", "resnet20", "--device", "meta"], "only cpu and cuda"),
        (["check", "resnet20", "--device", "cuda:99"], "CUDA devices here"),
        (["check", "resnet20", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["no_such_command"], "invalid choice"),
        ([], "required"),
    ],
)
def test_errors_are_one_line(capsys, bench, argv, text):
    assert text in refused(capsys, *argv)


def test_an_absent_backend_is_refused_with_its_reason(capsys, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: "it is on holiday")
    assert "--backend cudnn: it is on holiday" in refused(capsys, "check", "resnet20", "--backend", "cudnn")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_says_how_to_install_it(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = refused(capsys, "check", f"{package}:resnet18")
    assert f"{package} is not installed: pip install 'resnet-fused[models]'" in text


def test_every_builder_that_is_listed_exists():
    assert all(callable(getattr(rf, name)) for name in models.BUILDERS)
    assert models.input_shape("resnet20", rf.resnet20()) == (3, 32)
    assert models.input_shape("x:y", nn.Sequential(nn.Conv2d(1, 2, 3))) == (1, 224)


def test_the_script_runs_and_survives_a_closed_pipe():
    command = f"{sys.executable} -m resnet_fused.cli info --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{\n"
    assert done.stderr == ""
