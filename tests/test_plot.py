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

from resnet_fused import backends
from resnet_fused.ops.residual_block import RECOMPUTE
from resnet_fused.testing.bench import contenders, store

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
    for name in ("plot", "publish", "report"):
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
    assert plot.kind("fused[mine]") == "ours" and plot.kind("openvino") == "peer"
    drawn = plot.pictures(rows)[0]
    figure = plot.Figure(layout="constrained")
    drawn.draw(figure, plot.LIGHT)
    assert "fused[mine]" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("theme", ["LIGHT", "DARK"])
def test_no_two_contenders_look_alike(plot, theme):
    """All that there are on any device, with backends of users, each also as a graph."""
    names = [*contenders.EAGER, "folded channels_last", *contenders.COMPILED, *contenders.PEERS, "fused", "fused NCHW"]
    names += [f"fused recompute={way}" for way in RECOMPUTE]
    names += [f"fused[{name}]" for name in (*backends.NAMES, "mine", "yours", "theirs")]
    both = [name + tail for name in names for tail in ("", plot.GRAPH)]
    styles, theme = plot.Styles(both), getattr(plot, theme)
    assert len({styles.of(name, theme) for name in both}) == len(both)
    for name in names:
        plain, graph = styles.of(name, theme), styles.of(name + plot.GRAPH, theme)
        assert (plain.colour, plain.marker) == (graph.colour, graph.marker) and graph.hollow and not plain.hollow


def drawn(plot: Any, rows: list[dict[str, Any]], name: str) -> Any:
    texts = [dict(zip(store.COLUMNS, map(str, r.values()), strict=True)) for r in rows]
    picture = next(p for p in plot.pictures(texts) if p.name.startswith(name))
    figure = plot.Figure(layout="constrained")
    picture.draw(figure, plot.LIGHT)
    return figure


def test_the_legend_names_whoever_is_in_any_panel(plot):
    rows = [row("models", "a", "eager NCHW", batch, "float32", 2.0) for batch in (1, 8)]
    rows += [row("models", "b", "fused", 1, "float32", 1.0), row("models", "b", "fused + graph", 1, "float32", 1.0)]
    rows += [row("models", "b", "fused", 1, "float32", 1.0, shape="1x3x32x32")]
    figure = drawn(plot, rows, "batch")
    names = ["eager NCHW", "fused", "fused + graph"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert [axes.get_title() for axes in figure.axes] == ["a", "b, 64x56x56", "b, 3x32x32"]


def test_a_legend_is_no_wider_than_the_picture(plot):
    figure = drawn(plot, figures(), "speedup")
    long = [f"{name}{i}" for name in (*contenders.COMPILED, contenders.COMPILED[-1] + plot.GRAPH) for i in range(6)]
    for names in (list(CONTENDERS), long, ["a"]):
        figure.legends.clear()
        for axes in figure.axes:
            axes.clear()
            for name in names:
                axes.scatter([1], [1], label=name)
        plot._legend(figure, plot.LIGHT)
        plot.FigureCanvasAgg(figure).draw()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, names


@pytest.mark.parametrize("rate, copy, unit, said", [
    (4e11, 2e10, "GFLOP/s", {"matrix product 400 GFLOP/s", "copy 20 GB/s"}),
    (7.9e14, 4.3e12, "TFLOP/s", {"matrix product 790 TFLOP/s", "copy 4.3 TB/s"}),
])  # fmt: skip
def test_rates_are_in_units_that_can_be_read(plot, rate, copy, unit, said):
    rows = [row("kernels", "a", "fused", n, "float32", 1e11 / rate, matmul_flops_per_s=rate, copy_bytes_per_s=copy)
            for n in (1, 8, 4000)]  # fmt: skip
    figure = drawn(plot, rows, "roofline")
    plot.FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.get_ylabel() == unit and {text.get_text() for text in axes.texts} == said
    labels = [tick.get_text() for tick in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert len(labels) > 4 and not any("e" in label for label in labels)


def test_the_report_names_every_commit(plot, tmp_path):
    rows = [
        row("blocks", "a", name, 1, "float32", 1.0, commit=commit, date=date)
        for name, commit, date in (("eager NCHW", "c1", "2020"), ("fused", "c2", "2019"), ("fused NCHW", "c1", "2021"))
    ]
    assert plot.main([str(write(tmp_path / "e.csv", rows)), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert "<dt>commit</dt><dd>c1, c2</dd>" in text and "<dt>date</dt><dd>2019 – 2021</dd>" in text


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


def test_published_figures_come_from_the_rows(plot: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A page's figures are replaced between its marks, and nothing else of it."""
    publish = importlib.import_module("publish")
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures: short -->\nold\n<!-- end of figures -->\nafter\n")
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    rows = [row("models", "resnet18", name, 8, "float32", ms) for name, ms in CONTENDERS.items()]
    csv = write(tmp_path / "rows.csv", rows)
    assert plot.main(["--publish", str(csv)]) == 0
    assert readme.read_text() == (
        "before\n<!-- figures: short -->\n| ms per batch | batch 8 |\n|---|---|\n"
        "| ResNet-18, float32 | 3.0 / 1.6 / **1.3** (2.31×) |\n<!-- end of figures -->\nafter\n"
    )
    for suffix in ("", "-dark"):
        assert "2.31×" in (tmp_path / f"docs/images/speed{suffix}.svg").read_text()
    assert publish.write(store.latest(store.read(csv)[0])) == []  # nothing has changed
    with pytest.raises(ValueError, match="no whole network"):
        publish.contents([row("blocks", "resnet18", "fused", 8, "float32", 1.0)])
