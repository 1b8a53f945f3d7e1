"""tools/gpu_first: a rehearsal on this machine, and steps that fail, hang or are absent without stopping the others."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import devices
import optional
import pytest
import torch

from resnet_fused import extension
from resnet_fused.ops.conv_bn_act import triton_config as cfg

ROOT = Path(__file__).parents[1]
STEPS = ("versions", "build", "kernels", "rates", "profile", "memcheck", "racecheck", "tests", "networks", "blocks",
         "compiled")  # fmt: skip


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the tool."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    names = ("steps", "runner", "device", "measure", "trials", "kernels", "__main__")
    return SimpleNamespace(**{n.strip("_"): importlib.import_module(f"gpu_first.{n}") for n in names})


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "tools" / "gpu_first.sh"), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "OUT": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)


def test_a_rehearsal_walks_through_every_step(tmp_path: Path) -> None:
    done = program("--dry-run", "--out", str(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-4000:]
    rows = [line.split(maxsplit=3) for line in (tmp_path / "summary.txt").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == list(STEPS) and done.stdout.endswith((tmp_path / "summary.txt").read_text())
    shown = {row[0] for row in rows if row[1] == "shown"}
    assert shown == {"profile", "memcheck", "racecheck"} and {row[1] for row in rows} == {"ok", "shown"}
    assert "$ compute-sanitizer --tool racecheck" in log or "compute-sanitizer --tool racecheck" in log
    assert all(len(row) == 4 and row[3] for row in rows), "each has a key figure"
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8 and all((tmp_path / name).stat().st_size < 16 << 20 for name in files)
    assert {"kernels.csv", "log.txt", "rates.csv", "summary.txt", "versions.json"} <= set(files)
    assert json.loads((tmp_path / "versions.json").read_text())["packages"]["torch"] == version("torch")
    with (tmp_path / "kernels.csv").open(newline="") as file:
        kernels = list(csv.DictReader(file))
    assert {row["status"] for row in kernels} == {"ok", "stand-in"}
    assert {row["op"] for row in kernels if row["status"] == "ok"} == {
        "conv_bn_act", "bottleneck", "add_relu", "batch_norm_act",
    }  # fmt: skip
    stood_in = {row["kernel"] for row in kernels if row["status"] == "stand-in"}
    assert "cudnn_convolution_add_relu" in stood_in
    if extension.missing() is None:
        assert {row["name"] for row in extension.module().conv_bn_act_kernels()} <= stood_in
    (measured,) = [name for name in files if name.endswith(".csv") and name not in ("kernels.csv", "rates.csv")]
    with (tmp_path / measured).open(newline="") as file:
        timed = list(csv.DictReader(file))
    assert {(row["suite"], row["status"]) for row in timed} == {("models", "ok"), ("blocks", "ok")}
    assert {"compile max-autotune freezing", "fused", "eager NCHW"} <= {row["contender"] for row in timed}


def test_three_runs_of_ten_minutes_hold_every_step(tool: SimpleNamespace) -> None:
    assert tuple(step.name for step in tool.steps.STEPS) == STEPS
    for part in tool.steps.PARTS:
        limits = [step.seconds for step in tool.steps.STEPS if part in step.parts]
        assert 0 < sum(limits) <= 600
        assert [step.name for step in tool.steps.STEPS if part in step.parts][:2] == ["versions", "build"]
    assert all(step.parts for step in tool.steps.STEPS)
    assert [step.name for step in tool.steps.STEPS if step.optional] == ["profile"]


def step(of: SimpleNamespace, name: str, code: str, seconds: int = 60, **options: Any) -> Any:
    command = lambda context: [sys.executable, "-c", code]  # noqa: E731
    return of.steps.Step(name, (1,), seconds, "a step of a test", command, command, **options)


def test_a_failing_or_hanging_step_does_not_stop_the_others(tool: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    child = tmp_path / "child"
    hang = (
        "import subprocess, sys, time, pathlib\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(p.pid)); print('figure: so far', flush=True); time.sleep(600)\n"
    )
    context = tool.steps.Context(tmp_path / "out")
    steps = [
        step(tool, "hangs", hang, 4),
        step(tool, "fails", "print('figure: 7'); raise SystemExit(3)"),
        step(tool, "dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        step(tool, "breaks", "raise ValueError('what it was')"),
        step(tool, "lacks", "", tool="no-such-program"),
        step(tool, "goes", "print('figure: 12 TB/s')"),
    ]
    began = time.monotonic()
    assert tool.runner.run(steps, context) == 1
    assert time.monotonic() - began < 60
    rows = [line.split(maxsplit=3) for line in (context.out / "summary.txt").read_text().splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [
        ("hangs", "timed"), ("fails", "failed"), ("dies", "failed"), ("breaks", "failed"), ("lacks", "absent"),
        ("goes", "ok"),
    ]  # fmt: skip
    assert "so far" in rows[0][3] and rows[1][3] == "7" and rows[3][3] == "ValueError: what it was"
    assert rows[5][3] == "12 TB/s"
    for _ in range(50):
        if not alive(int(child.read_text())):
            break
        time.sleep(0.1)
    assert not alive(int(child.read_text())), "what a step started ends with it"
    assert "what it was" in (context.out / "log.txt").read_text()
    assert "timed out" in capsys.readouterr().out


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_good_is_exit_code_0_and_a_missing_profiler_is_no_fault(tool: SimpleNamespace, tmp_path: Path) -> None:
    steps = [step(tool, "goes", ""), step(tool, "profile", "", tool="no-such-program", optional=True)]
    assert tool.runner.run(steps, tool.steps.Context(tmp_path)) == 0
    assert tool.runner.run([step(tool, "sanitizer", "", tool="no-such-program")], tool.steps.Context(tmp_path)) == 1


def test_what_a_step_leaves_of_its_time_goes_to_the_next(tool: SimpleNamespace, tmp_path: Path) -> None:
    steps = [step(tool, "quick", "", 30), step(tool, "long", "import time; time.sleep(2)", 1)]
    assert tool.runner.run(steps, tool.steps.Context(tmp_path)) == 0
    assert tool.runner.run(steps[1:], tool.steps.Context(tmp_path)) == 1


def test_the_log_keeps_the_end_of_a_steps_output(
    tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.runner, "MOST_LOGGED", 1000)
    assert (
        tool.runner.run([step(tool, "talks", "print('x' * 9999); print('the end')")], tool.steps.Context(tmp_path)) == 0
    )
    assert (tmp_path / "log.txt").stat().st_size < 1500 and (tmp_path / "log.txt").read_text().endswith("the end\n")


def test_options(tool: SimpleNamespace, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = tool.main.main
    with pytest.raises(SystemExit):
        main(["--only", "rates,speed"])
    assert "got speed, need some of versions, build" in capsys.readouterr().err
    assert main(["--list", "--part", "2"]) == 0
    told = capsys.readouterr().out
    assert "pytest -p no:cacheprovider -m gpu -n 12" in told and "kernels.csv" not in told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "none")]) == 2
    assert "no CUDA device; --dry-run" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "absent", [{}, {"cuda": "the compiled library was built without CUDA kernels: no nvcc"}], ids=["all", "one"]
)
def test_the_build_is_for_the_device_and_asserts_its_backends(
    tool: SimpleNamespace, absent: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        asked.append((command[1:], options["env"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tool.device.subprocess, "run", run)
    monkeypatch.setattr(tool.device, "refusals", lambda: absent)
    assert tool.device.build(False) == len(absent)
    ((command, environment),) = asked
    assert command == ["setup.py", "--quiet", "build_ext", "--inplace"]
    assert (environment["RESNET_FUSED_BUILD"], environment["TORCH_CUDA_ARCH_LIST"]) == ("cuda", "9.0")
    told = capsys.readouterr().out
    assert "for sm_90" in told and ("cuda: the compiled library" in told) == bool(absent)
    assert f"available: {'triton, cudnn' if absent else 'cuda, triton, cudnn'}" in told


def test_refusals_come_from_a_fresh_process(tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = tool.device.refusals()
    assert devices.HERE or (set(found) >= {"cuda", "cudnn"} and found["cudnn"] == "no CUDA device")


def test_the_harness_is_asked_for_everything(tool: SimpleNamespace, tmp_path: Path) -> None:
    found, absent = tool.measure.options("networks", tmp_path, False)
    assert (found.models, set(found.batches)) == (("resnet50",), {1, 32, 256})
    assert set(found.dtypes) == {torch.bfloat16, torch.float16} and str(found.device) == "cuda:0"
    asked = {*found.contender, *absent}
    assert asked == {"eager NCHW", "eager channels_last", "fused", "fused[cuda]", "fused[triton]", "fused[cudnn]"}
    compiled, _ = tool.measure.options("compiled", tmp_path, False)
    assert "compile max-autotune freezing" in compiled.contender and set(compiled.batches) == {1, 32, 256}
    blocks, _ = tool.measure.options("blocks", tmp_path, False)
    assert blocks.suites == ("blocks",) and blocks.models == ("resnet18", "resnet50")


@pytest.mark.parametrize("small", [True, False])
def test_the_trials_take_every_cuda_kernel(tool: SimpleNamespace, small: bool) -> None:
    optional.needs_the_library()
    library = extension.module()
    taken = {trial.kernel.rpartition("-split")[0] for trial in tool.trials.conv_trials("cuda", "cpu", small)}
    assert taken == {row["name"] for row in library.conv_bn_act_kernels()}
    blocks = {(row["cin"], row["mid"], row["stride"], row["project"]) for row in library.bottleneck_kernels()}
    asked = {(c, mid, s, bool(more) or c != 4 * mid) for c, mid, s, *more in tool.trials.BLOCKS}
    assert blocks <= asked


def test_the_trials_take_every_triton_config(tool: SimpleNamespace) -> None:
    optional.needs("triton")
    taken = {trial.kernel for trial in tool.trials.conv_trials("triton", "cpu", False)}
    classes = [(dtype, how) for dtype in tool.trials.DTYPES for how in tool.trials.precisions(dtype)]
    shipped = {str(c) for d, how in classes for c in cfg.shipped(d, how) if cfg.fits(c, d, cfg.INTERPRETER)}
    assert taken == shipped
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_a_kernel_that_fails_or_is_wrong_is_a_row(tool: SimpleNamespace, tmp_path: Path) -> None:
    x = torch.randn(9)

    def trial(run: Any) -> Any:
        return tool.trials.Trial("op", "cuda", "k", "fp32", "case", run, lambda: [x], lambda: x.double())

    def broken() -> torch.Tensor:
        raise RuntimeError("misaligned address")

    wanted = [trial(lambda: x.clone()), trial(lambda: x + 1), trial(broken)]
    rows = tool.kernels.write(tmp_path / "k.csv", map(tool.kernels.row, wanted))
    assert [row["status"] for row in rows] == ["ok", "outside", "failed"]
    assert rows[2]["note"] == "RuntimeError: misaligned address" and float(rows[0]["ratio"]) == 0
    with (tmp_path / "k.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["ok", "outside", "failed"]
