"""The rows of the harness: the CSV, the environment in each, and what is computed from them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from bench_tools import CPU, FACTS, QUICK, RATES, _case, pool  # noqa: F401, a fixture

from resnet_fused.testing.bench import environment, measure, store, summary
from resnet_fused.testing.bench.machine import Machine

GOOD = dict.fromkeys(store.COLUMNS, "") | {"suite": "kernels", "status": "ok", "batch": 1, "p50_ms": 1.0}


def test_the_environment_is_told_whole():
    facts = environment.describe(CPU)
    assert tuple(facts) == store.ENVIRONMENT
    assert all(facts[key] for key in ("device", "cpu", "python", "torch", "threads"))


def test_a_file_of_before_is_read_and_widened(tmp_path):
    path = tmp_path / "x.csv"
    old = dict.fromkeys(store.OLDER, "") | {
        "suite": "kernels",
        "status": "ok",
        "batch": "1",
        "p50_ms": "1.0",
        "date": "then",
    }
    path.write_text(",".join(store.OLDER) + "\n" + ",".join(old.values()) + "\nbroken\n")
    rows, problems = store.read(path)
    assert [row["tuning"] for row in rows] == [""] and rows[0]["date"] == "then" and len(problems) == 1
    store.append(path, [GOOD | {"p50_ms": 2.0, "tuning": "4 entries"}])
    rows, problems = store.read(path)
    assert [(row["date"], row["tuning"]) for row in rows] == [("then", ""), ("", "4 entries")]
    assert [problem.split(":")[1] for problem in problems] == ["3"]


def test_the_environment_of_a_cuda_device(monkeypatch):
    """As nvidia-smi and PyTorch tell it where there is one."""
    given = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    asked = []

    def answer(*command):
        asked.append(command)
        return "580.1, 1980 MHz, 2619 MHz, 700.00 W" if command[0] == "nvidia-smi" else ""

    monkeypatch.setattr(environment, "_run", answer)
    monkeypatch.setattr(environment.lookup, "summary", lambda device: "3 entries")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    facts = environment.describe(torch.device("cuda", 1))
    assert [*given, "-i", "1"] == list(asked[0])
    wanted = {"device": "A GPU", "driver": "580.1", "clocks": "1980 MHz / 2619 MHz / 700.00 W", "cuda": "13.0"}
    assert {key: facts[key] for key in wanted} == wanted
    assert facts["commit"].startswith("v") and facts["tf32"] in ("True", "False") and facts["tuning"] == "3 entries"
    assert store.path_for(Path("x"), facts).name == f"A-GPU-{torch.__version__}-13.0.csv"


BROKEN = {
    "status": ({"status": "fast"}, "status: got 'fast'"),
    "a word for a time": ({"p50_ms": "soon"}, "p50_ms: got 'soon', need a number"),
    "no time": ({"p50_ms": ""}, "p50_ms: got '', need a time above 0"),
    "a time of none": ({"p50_ms": 0}, "p50_ms: got '0', need a time above 0"),
    "a percentile of none": ({"p20_ms": 0}, "p20_ms: got '0', need a time above 0"),
    "no figure": ({"flops": "nan"}, "flops: got 'nan', need a finite number"),
    "too large": ({"bytes": "1e999"}, "bytes: got '1e999', need a finite number"),
    "below nothing": ({"bytes": -1}, "bytes: got '-1', need a finite number, not below 0"),
    "half an image": ({"batch": 1.5}, "batch: got '1.5', need a whole number above 0"),
    "no images": ({"batch": ""}, "batch: got '', need a whole number above 0"),
}


@pytest.mark.parametrize("change, said", BROKEN.values(), ids=BROKEN)
def test_a_broken_figure_is_told_with_its_line(tmp_path, change, said):
    path = tmp_path / "x.csv"
    store.append(path, [GOOD, GOOD | change, GOOD])
    rows, (problem,) = store.read(path)
    assert len(rows) == 2 and problem.startswith(f"{path}:3: {said}")


CUT = {
    "short": (b"a,b", "2 fields, need 38"),
    "empty": (b"", "0 fields, need 38"),
    "long": (b"%s,more", "39 fields, need 38"),
    "cut within a quote": (b'"%s', "unexpected end of data"),
    "no text": (b"\xff\xfe,", "'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("cut, said", CUT.values(), ids=CUT)
def test_a_broken_line_leaves_the_next_alone(tmp_path, cut, said):
    path = tmp_path / "x.csv"
    store.append(path, [GOOD, GOOD, GOOD])
    lines = path.read_bytes().splitlines()
    lines[2] = cut.replace(b"%s", lines[2])
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows, (problem,) = store.read(path)
    assert len(rows) == 2 and problem.startswith(f"{path}:3: {said}")


@pytest.mark.parametrize("text", [b"", b"a,b\n", b"\xff\n"])
def test_a_file_with_another_header_is_refused(tmp_path, text):
    path = tmp_path / "y.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"y.csv:1: the header"):
        store.read(path)


def test_speedups_are_over_the_faster_eager_layout():
    base = {"suite": "s", "case": "c", "dtype": "float32", "cache": "warm", "status": "ok"}
    rows = [
        base | {"contender": n, "p50_ms": t} for n, t in (("eager NCHW", 4), ("eager channels_last", 2), ("fused", 1))
    ]
    assert summary.speedups(rows) == {
        ("s", "c", "float32", "warm"): {"eager NCHW": 0.5, "eager channels_last": 1, "fused": 2}
    }
    assert summary.geometric_mean([1, 4]) == 2


def test_the_csv_is_plain(case, tmp_path):
    list(
        measure.run(
            [case],
            pool("fused"),
            Machine(CPU),
            RATES,
            FACTS | {"device": 'a "b", c\nd'},
            tmp_path / "x.csv",
            plan=QUICK,
        )
    )
    with (tmp_path / "x.csv").open(newline="") as file:
        (row,) = list(csv.DictReader(file))
    assert row["device"] == 'a "b", c d'
