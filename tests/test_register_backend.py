"""A user's own kernel: called by name, gated, timed and reported beside ours, with no edit to the harness."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.cli import main
from resnet_fused.ops.add_relu import reference as add_relu
from resnet_fused.ops.block import run_chain
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.roofline import Device
from resnet_fused.testing.bench import program, store
from resnet_fused.testing.bench.machine import Machine

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    from resnet_fused import registry

    path, loaded = list(sys.path), dict(registry.LOADED)
    yield
    for name in list(registry.names()):
        rf.unregister_backend(name)
    sys.path[:] = path
    registry.LOADED.clear()
    registry.LOADED.update(loaded)


def conv_bn_act(x: Tensor, backend: str, groups: int = 1) -> Tensor:
    c = x.shape[1]
    torch.manual_seed(1)
    vectors = [torch.rand(c) + 0.5 for _ in range(4)]
    return rf.conv_bn_act(x, torch.randn(c, c // groups, 3, 3), *vectors, padding=1, groups=groups, backend=backend)


def test_by_name_it_serves_or_raises():
    with pytest.raises(ValueError, match="backend: got 'mine', need 'auto' or one of"):
        conv_bn_act(torch.randn(1, 4, 5, 5), "mine")

    @rf.register_backend("mine", supports=lambda call: "it has no groups" if call.conv.groups > 1 else None)
    def kernel(call):
        seen.append(call)
        return reference.run(call).contiguous()

    seen: list[Any] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout)
        out, want = conv_bn_act(x, "mine"), conv_bn_act(x, "reference")
        torch.testing.assert_close(out, want)
        assert out.stride() == want.stride()
    assert len(seen) == 2
    with pytest.raises(rf.BackendError, match="backend='mine' cannot run this conv_bn_act: it has no groups"):
        conv_bn_act(torch.randn(2, 4, 5, 5), "mine", groups=2)
    with pytest.raises(rf.BackendError, match="mine has no add_relu"):
        rf.add_relu(torch.ones(2), torch.ones(2), backend="mine")
    assert backends.available()["mine"] is None
    rf.unregister_backend("mine")
    with pytest.raises(ValueError, match="backend: got 'mine'"):
        conv_bn_act(torch.randn(1, 4, 5, 5), "mine")
    with pytest.raises(ValueError, match="name: got 'mine'"):
        rf.unregister_backend("mine")


def test_auto_does_not_take_it_unasked():
    @rf.register_backend("mine")
    def kernel(call):
        raise AssertionError

    conv_bn_act(torch.randn(1, 4, 5, 5), "auto")


@pytest.mark.parametrize("name", ["auto", "cuda", "chain", "", "two words", "a[0]"])
def test_names_that_are_taken_or_none(name):
    with pytest.raises(ValueError, match="name: got"):
        rf.register_backend(name)


def test_an_unknown_op():
    with pytest.raises(ValueError, match="op: got 'conv', need one of"):
        rf.register_backend("mine", "conv")


def test_every_op_and_a_fused_model():
    served = []

    def kernel(op: str, run: Any) -> None:
        rf.register_backend("mine", op)(lambda call: served.append(op) or run(call))

    model = rf.resnet20(num_classes=3).eval()
    fused = rf.fuse(model)
    kernel("conv_bn_act", reference.run)
    fused = rf.fuse(model, backend="mine")
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
        assert served.count("conv_bn_act") == 21  # the stem, nine blocks of two, two projections
        served.clear()
        kernel("basic_block", lambda call: run_chain(call, reference.run))
        torch.testing.assert_close(fused(x), model(x))
        assert served == ["conv_bn_act"] + 9 * ["basic_block"]
    kernel("add_relu", add_relu.run)
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(rf.add_relu(a, b, backend="mine"), torch.relu(a + b))


def test_a_block_that_is_refused_and_has_no_convolutions_says_why():
    rf.register_backend("mine", "basic_block", supports=lambda call: "odd sizes")(lambda call: call.x)
    block = rf.fuse(rf.FusedBasicBlock(4, 4).eval(), backend="mine")
    with pytest.raises(rf.BackendError, match="cannot run this basic_block: odd sizes"), torch.no_grad():
        block(torch.randn(1, 4, 5, 5))


PLUGIN = """
import resnet_fused as rf
from resnet_fused.ops.conv_bn_act import reference

@rf.register_backend("right")
def right(call):
    return reference.run(call)

@rf.register_backend("wrong")
def wrong(call):
    return reference.run(call) * 1.01

@rf.register_backend("raises")
def raises(call):
    raise RuntimeError("no launch:\\n  out of registers")

@rf.register_backend("picky", supports=lambda call: "not today")
def picky(call):
    return reference.run(call)
"""


class Steady(Machine):
    """A machine on which every call takes 2 ms."""

    def sample(self, cache: str) -> Any:
        return lambda call, loops: 2e-3

    def peak_bytes(self, call: Any) -> int | None:
        call()
        return 5_000_000


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "kernels_of_a_user.py"
    path.write_text(PLUGIN)
    return str(path)


@pytest.fixture
def bench(plugin, tmp_path, monkeypatch) -> list[str]:
    """A command that times one convolution, on a steady machine."""
    rates = Device("steady", {torch.float32: 1e12}, 1e11)
    monkeypatch.setattr(program, "measure_rates", lambda *args: rates)
    monkeypatch.setattr(program, "machine_for", Steady)
    command = ["bench", "--suite", "kernels", "--model", "resnet18", "--load", plugin, "--device", "cpu"]
    return [*command, "--size", "32", "--batch", "1", "--case", "K64k3s1-res", "--results", str(tmp_path)]


def test_the_harness_gates_times_and_draws_it(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    plot = importlib.import_module("plot")
    names = ["eager NCHW", "fused", "fused[right]", "fused[wrong]", "fused[raises]", "fused[picky]"]
    assert main([*bench, "--contender", *names]) == 1  # one of those asked for is wrong
    out = capsys.readouterr().out
    assert "RED, not timed" in out and "fused[wrong]" in out
    (path,) = tmp_path.glob("*.csv")
    rows, problems = store.read(path)
    assert not problems
    by_name = {row["contender"]: row for row in rows}
    assert {name: row["status"] for name, row in by_name.items()} == {
        "eager NCHW": "ok", "fused": "ok", "fused[right]": "ok", "fused[wrong]": "red", "fused[raises]": "red",
        "fused[picky]": "absent",
    }  # fmt: skip
    assert by_name["fused[right]"]["p50_ms"] == "2" and by_name["fused[wrong]"]["p50_ms"] == ""
    assert "fused[raises]: raised RuntimeError: no launch: out of registers\n" in out
    assert by_name["fused[raises]"]["p50_ms"] == "" and "kernels_of_a_user " in by_name["fused"]["peers"]
    assert by_name["fused[right]"]["peak_bytes"] == "5000000"
    assert "not today" in by_name["fused[picky]"]["note"]
    assert plot.main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert "fused[right]" in next((tmp_path / "out").glob("*/report.html")).read_text()
    for name in ("plot", "report"):
        sys.modules.pop(name, None)


def test_a_kernel_that_was_edited_is_measured_again(bench, plugin, capsys):
    def added() -> int:
        assert main([*bench, "--json", "--contender", "fused", "fused[right]"]) == 0
        return int(json.loads(capsys.readouterr().out)["added"])

    assert (added(), added()) == (2, 0)
    Path(plugin).write_text(PLUGIN + "# edited")
    assert (added(), added()) == (2, 0)


def test_a_users_file_imports_its_neighbours_and_modules_come_from_the_working_directory(tmp_path, monkeypatch):
    from resnet_fused import registry

    (tmp_path / "helpers_of_a_user.py").write_text("from resnet_fused.ops.conv_bn_act.reference import run\n")
    text = "import resnet_fused as rf\nimport helpers_of_a_user\n"
    text += "rf.register_backend('{}')(helpers_of_a_user.run)\n"
    (tmp_path / "one_of_a_user.py").write_text(text.format("one"))
    registry.load(str(tmp_path / "one_of_a_user.py"))
    assert str(tmp_path) == sys.path[-1], "behind everything else: what lies there hides nothing"
    sys.path.remove(str(tmp_path))
    (tmp_path / "two_of_a_user.py").write_text(text.format("two"))
    monkeypatch.chdir(tmp_path)
    registry.load("two_of_a_user")
    assert {"one", "two"} <= set(registry.names())
    assert {"one_of_a_user", "two_of_a_user"} <= set(registry.LOADED) and all(registry.LOADED.values())


def test_pytest_benchmark_runs_keeps_compares_and_draws_it(plugin, tmp_path):
    kept = f"--benchmark-storage={tmp_path / 'kept'}"
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of ours

    def run(*command: str) -> tuple[int, str]:
        command = (sys.executable, "-m", *command)
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=BENCH.parent, env=alone)
        return done.returncode, done.stdout + done.stderr

    timed = ["pytest", str(BENCH), "--benchmark-only", "-p", "no:cacheprovider", "-p", "no:xdist", kept]
    timed += ["--suite", "kernels", "--model", "resnet18", "--size", "32", "--batch", "1", "--device", "cpu"]
    timed += ["--case", "K64k3s1-res", "--load", plugin]
    timed += ["--benchmark-min-rounds=1", "--benchmark-max-time=0.01", "--benchmark-warmup=off"]
    timed += ["--contender", "eager NCHW", "fused[right]"]
    code, told = run(*timed, "fused[wrong]", "--benchmark-save=first")
    assert code == 1, told
    assert "2 passed" in told and "1 failed" in told and "outside the error budget" in told
    (first,) = (tmp_path / "kept").glob("*/0001_first.json")
    figures = json.loads(first.read_text())["benchmarks"]
    assert {entry["extra_info"]["contender"] for entry in figures} == {"eager NCHW", "fused[right]"}
    (group,) = {entry["group"] for entry in figures}

    histogram = f"--benchmark-histogram={tmp_path / 'second'}"
    code, told = run(*timed, "--benchmark-autosave", "--benchmark-compare", histogram)
    assert code == 0, told
    assert "(0001_first)" in told and "(NOW)" in told
    assert len(list((tmp_path / "kept").glob("*/*.json"))) == 2

    compare = ["pytest_benchmark", "--storage", str(tmp_path / "kept"), "compare", "0001", "0002"]
    code, told = run(*compare, "--group-by=group", f"--histogram={tmp_path / 'both'}")
    assert code == 0, told
    assert told.count("fused[right]] (0001_first)") == 1 and told.count("fused[right]] (0002_") == 1
    for name in ("second", "both"):
        picture = (tmp_path / f"{name}-{group}.svg").read_text(encoding="utf-8")
        assert picture.rstrip().endswith("</svg>") and "fused[right]" in picture and "<script xlink" not in picture
