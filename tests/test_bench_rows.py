"""The rows of the harness: the CSV, the environment in each, and what is computed from them."""

from __future__ import annotations

import csv

import pytest
from bench_tools import CPU, FACTS, QUICK, RATES, _case, pool  # noqa: F401, a fixture

from resnet_fused.testing.bench import environment, measure, store, summary
from resnet_fused.testing.bench.machine import Machine

GOOD = dict.fromkeys(store.COLUMNS, "") | {"suite": "kernels", "status": "ok", "batch": 1, "p50_ms": 1.0}


def test_the_environment_is_told_whole():
    facts = environment.describe(CPU)
    assert tuple(facts) == store.ENVIRONMENT
    assert all(facts[key] for key in ("device", "cpu", "python", "torch", "threads"))


@pytest.mark.parametrize("columns", [store.OLDER, store.COLUMNS[:-1]], ids=["first", "last"])
def test_a_file_of_before_is_read_and_widened(tmp_path, columns):
    path = tmp_path / "x.csv"
    old = dict.fromkeys(columns, "") | {
        "suite": "kernels",
        "status": "ok",
        "batch": "1",
        "p50_ms": "1.0",
        "date": "then",
    }
    path.write_text(",".join(columns) + "\n" + ",".join(old.values()) + "\nbroken\n")
    rows, problems = store.read(path)
    assert [row["tuning"] for row in rows] == [""] and rows[0]["date"] == "then" and len(problems) == 1
    store.append(path, [GOOD | {"p50_ms": 2.0, "tuning": "4 entries"}])
    rows, problems = store.read(path)
    assert [(row["date"], row["tuning"]) for row in rows] == [("then", ""), ("", "4 entries")]
    assert [problem.split(":")[1] for problem in problems] == ["3"]


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
    "short": (b"a,b", f"2 fields, need {len(store.COLUMNS)}"),
    "empty": (b"", f"0 fields, need {len(store.COLUMNS)}"),
    "long": (b"%s,more", f"{len(store.COLUMNS) + 1} fields, need {len(store.COLUMNS)}"),
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


@pytest.mark.parametrize("peak", ["", 2**20])
def test_the_error_of_what_is_red_stands_in_its_own_column(peak):
    rows = [
        GOOD | {"contender": f"fused[{i}]", "case": "c", "cache": "warm", "gate": 3.5, "peak_bytes": peak}
        | ({"status": "red", "p50_ms": "", "peak_bytes": ""} if i == 1 else {"roofline_pct": 50})
        for i in range(8)
    ]  # fmt: skip
    drawn = summary.table(rows, [row["contender"] for row in rows], "warm")
    (errors,) = (column for column in drawn.columns if column.header == "error / budget")
    assert [*errors.cells][:8] == ["3.50", "3.5", *["3.50"] * 6]


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
