"""bench/plot.py on invented figures: pictures and the report from the CSV alone."""

from __future__ import annotations

import html.parser
import importlib
import itertools
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.testing.bench import store

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
BENCH = str(Path(__file__).parents[1] / "bench")
CONTENDERS = {
    "eager NCHW": 3.0, "eager channels_last": 2.6, "folded channels_last": 2.2, "openvino": 1.6, "fused": 1.3,
    "fused[onednn]": 1.4, "fused[mine]": 1.9,
}  # fmt: skip


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("plot")
    for name in ("plot", "report"):
        sys.modules.pop(name, None)


def row(suite: str, name: str, contender: str, batch: int, dtype: str, ms: float, **changes: Any) -> dict[str, Any]:
    return dict.fromkeys(store.COLUMNS, "") | {
        "suite": suite, "case": f"{name}-{dtype}-N{batch}", "contender": contender, "cache": "warm", "status": "ok",
        "model": name.split(".")[0], "dtype": dtype, "shape": f"{batch}x64x56x56", "batch": batch, "gate": 0.4,
        "samples": 20, "p20_ms": 0.97 * ms, "p50_ms": ms, "p80_ms": 1.06 * ms, "flops": 2e8 * batch,
        "bytes": 1e6 * batch + 3e5 * len(name), "roofline_pct": 40 / ms, "copy_bytes_per_s": 2e10,
        "matmul_flops_per_s": 4e11, "peak_bytes": int(1e6 * batch * ms), "device": "A <CPU>", "threads": "2",
        "torch": "2.0", "date": "2020-01-01",
    } | changes  # fmt: skip


def figures() -> list[dict[str, Any]]:
    found = []
    for dtype, batch in itertools.product(("float32", "bfloat16"), (1, 8, 32)):
        for i, layer in enumerate(("layer1.0", "layer2.0", "layer3.1")):
            for contender, ms in CONTENDERS.items():
                found.append(
                    row("blocks", f"resnet50.{layer}", contender, batch, dtype, ms * (batch + 0.5) * (1 + i / 7))
                )
        for model in ("resnet18", "resnet50"):
            for contender, ms in CONTENDERS.items():
                found.append(row("models", model, contender, batch, dtype, 9 * ms * (batch + 1)))
    red = {"status": "red", "note": "error 1 & more", "p20_ms": "", "p50_ms": "", "p80_ms": ""}
    found.append(row("blocks", "resnet50.layer1.0", "fused[cpu]", 1, "float32", 1.0, **red))
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    store.append(path, rows)
    return path


def pixels(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


NAMES = {
    *(f"speedup-{suite}-{dtype}-warm" for suite in ("blocks", "models") for dtype in ("float32", "bfloat16")),
    *(f"{kind}-{dtype}-warm" for kind in ("roofline", "batch") for dtype in ("float32", "bfloat16")),
    *(f"memory-{suite}-{dtype}" for suite in ("blocks", "models") for dtype in ("float32", "bfloat16")),
}


def test_pictures_and_report_from_the_csv_alone_twice_the_same_bytes(plot, tmp_path, capsys):
    source = write(tmp_path / "cpu.csv", figures())
    for out in ("one", "two"):
        assert plot.main([str(source), "--out", str(tmp_path / out)]) == 0
    one, two = (tmp_path / out / "cpu" for out in ("one", "two"))
    assert {p.stem.removesuffix("-dark") for p in one.glob("*.png")} == NAMES
    assert len(list(one.iterdir())) == 2 * len(NAMES) + 1
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
        if path.suffix == ".png":
            width, height = pixels(path)
            assert width > 900 and height > 200
    assert str(one / "report.html") in capsys.readouterr().out
    check_page(one / "report.html")


class Page(html.parser.HTMLParser):
    """Addresses, images and tables of a page; and that its tags are in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.rows += tag == "tr"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.open
    assert len(page.sources) == 2 * len(NAMES) and all(s.startswith("data:image/png;base64,") for s in page.sources)
    for network in ("http:", "https:", "//cdn", "@import", "url("):
        assert network not in text
    assert "A &lt;CPU&gt;" in text and "<CPU>" not in text
    assert "red: error 1 &amp; more" in text
    assert "prefers-color-scheme" in text and "aria-sort" in text
    count = len(figures())
    means = 4 * len(CONTENDERS)  # two suites, two dtypes
    assert page.rows == count + means + 3  # and the headings


def test_the_report_has_the_figures(plot, tmp_path):
    rows = [
        row("blocks", "resnet50.layer1.0", name, 1, "float32", ms)
        for name, ms in (("eager NCHW", 4.0), ("eager channels_last", 3.0), ("fused", 1.5))
    ]
    source = write(tmp_path / "a.csv", rows)
    assert plot.main([str(source), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith('<tr class="ours">') and "layer1.0" in line)
    assert ">2.000<" in line and ">1.5<" in line


def test_a_users_backend_is_drawn_beside_ours(plot):
    rows = [dict(zip(store.COLUMNS, map(str, r.values()), strict=True)) for r in figures()]
    styles = plot.Styles(list(CONTENDERS))
    assert len({styles.of(name, plot.LIGHT) for name in CONTENDERS}) == len(CONTENDERS)
    assert plot.kind("fused[mine]") == "ours" and plot.kind("openvino") == "peer"
    drawn = plot.pictures(rows)[0]
    figure = plot.Figure(layout="constrained")
    drawn.draw(figure, plot.LIGHT)
    assert "fused[mine]" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_broken_row_is_reported_with_its_line(plot, tmp_path, capsys):
    source = write(tmp_path / "b.csv", figures()[:20])
    lines = source.read_text().splitlines()
    lines[4] = lines[4].replace(",ok,", ",perhaps,")
    lines[7] = "cut short"
    source.write_text("\n".join(lines))
    assert plot.main([str(source), "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert f"{source}:5: status: got 'perhaps'" in told and f"{source}:8: 1 fields" in told
    assert f"{source}:8" in (tmp_path / "b" / "report.html").read_text()
    source.write_text("name,figure\n")
    assert plot.main([str(source), str(tmp_path / "none.csv"), "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert f"{source}:1: the header" in told and "none.csv" in told


@pytest.mark.parametrize(
    "rows",
    [[], [row("blocks", "a", "fused", 1, "float32", 1.0, flops="", peak_bytes="", bytes="")],
     [row("models", "a", "eager NCHW", 1, "float32", 1.0, p80_ms="", copy_bytes_per_s="", matmul_flops_per_s="")],
     [row("kernels", "a", "fused", 1, "float32", 1.0, status="absent", p50_ms="")]],
    ids=["none", "no counts", "one point", "nothing timed"],
)  # fmt: skip
def test_little_is_drawn_from_little(plot, tmp_path, rows):
    source = write(tmp_path / "c.csv", rows)
    assert plot.main([str(source), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "c" / "report.html").exists() == bool(rows)


def test_two_machines_in_one_file_give_two_reports(plot, tmp_path):
    rows = [row("blocks", "a", "fused", 1, "float32", 1.0, threads=threads) for threads in ("1", "2")]
    assert plot.main([str(write(tmp_path / "d.csv", rows)), "--out", str(tmp_path)]) == 0
    assert len(list((tmp_path / "d").glob("*/report.html"))) == 2
