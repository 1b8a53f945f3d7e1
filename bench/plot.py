"""Pictures and a report from the CSV alone: the same file gives the same bytes.

    python bench/plot.py bench/results/*.csv --out out/bench

Draws, in a folder per CSV: the speed-up of every case over the faster eager layout, the roofline, throughput by batch
size, memory where the CSV has it; and report.html, one file that needs no network. A broken row is reported with its
line and left out; the exit code is then 1.

    python bench/plot.py --publish bench/results/AMD-EPYC-2.13.0+cpu-none.csv

writes the chart and the tables of README.md and docs/ instead (publish.py).
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import publish
import report
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from resnet_fused.testing.bench import contenders, store, summary
from resnet_fused.testing.bench.measure import GRAPH
from resnet_fused.testing.bench.store import Row

OURS = ("#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#8c510a", "#7b68ee")
PEERS = ("#009e73", "#66a61e", "#01665e", "#a6761d", "#5ab4ac")
MARKERS = "osD^vP*X<>h"  # eleven: with two, five or seven colours no pair comes twice for long
WIDTH, LINE, GAP = 11.0, 0.19, 1.5  # inches: of a picture, of a row of a dot plot or legend, and around the rows


@dataclass(frozen=True)
class Theme:
    """The colours of a picture; ``suffix`` of its file's name."""

    suffix: str
    paper: str
    ink: str
    faint: str
    eager: tuple[str, ...]
    first: str  # of ours


LIGHT = Theme("", "#ffffff", "#1f2328", "#d8dce1", ("#8a8f98", "#555b64"), "#0072b2")
DARK = Theme("-dark", "#14171a", "#e6e8ea", "#383d43", ("#8a8f98", "#c3c8ce"), "#4aa8ff")


@dataclass(frozen=True)
class Picture:
    """A picture that knows how to draw itself: its name, what it says, and the function of figure and theme."""

    name: str
    caption: str
    draw: Callable[[Figure, Theme], None]

    def png(self, theme: Theme) -> bytes:
        """The picture as PNG, without the date and the version that would make two runs differ."""
        figure = Figure(layout="constrained", facecolor=theme.paper)
        self.draw(figure, theme)
        FigureCanvasAgg(figure)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
        return data.getvalue()


@dataclass(frozen=True)
class Style:
    """How a contender is drawn; ``hollow`` where it runs as a CUDA graph."""

    colour: str
    marker: str
    hollow: bool
    ours: bool

    def scatter(self, axes, points: Sequence[tuple[float, float]], name: str, size: float) -> None:
        """``points`` as markers of this style, named in the legend."""
        face, edge = ("none", 1.3) if self.hollow else (self.colour, 0)
        axes.scatter(*zip(*points, strict=True), s=size, marker=self.marker, label=name, facecolors=face,
                     edgecolors=self.colour, linewidths=edge, zorder=3)  # fmt: skip


class Styles:
    """One colour and marker per contender, the same in all pictures of a report; its graph's are hollow."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        bases = list(dict.fromkeys(name.removesuffix(GRAPH) for name in names))
        groups = [[name for name in bases if kind(name) == k] for k in ("eager", "peer", "ours")]
        self._place = {name: (i, i + 2 * g) for g, group in enumerate(groups) for i, name in enumerate(group)}

    def of(self, name: str, theme: Theme) -> Style:
        colours = {"eager": theme.eager, "ours": (theme.first, *OURS), "peer": PEERS}[kind(name)]
        i, at = self._place[name.removesuffix(GRAPH)]
        marker = MARKERS[at % len(MARKERS)]
        return Style(colours[i % len(colours)], marker, name.endswith(GRAPH), kind(name) == "ours")


def kind(contender: str) -> str:
    """ "eager", "ours" or "peer"."""
    if contender.removesuffix(GRAPH) in contenders.EAGER:
        return "eager"
    return "ours" if contenders.is_ours(contender) else "peer"


def pictures(rows: list[Row]) -> list[Picture]:
    """Every picture that these rows of one device give, in a fixed order."""
    timed = [row for row in rows if row["status"] == "ok"]
    styles = Styles(list(dict.fromkeys(row["contender"] for row in timed)))
    found = []
    ratios = summary.speedups(timed)
    for suite, dtype, cache in dict.fromkeys((row["suite"], row["dtype"], row["cache"]) for row in timed):
        some = {key[1]: value for key, value in ratios.items() if (key[0], key[2], key[3]) == (suite, dtype, cache)}
        if some:
            what = f"{suite}, {dtype}, cache {cache}"
            title = f"Times faster than the faster eager layout: {what}"
            found.append(Picture(_name("speedup", suite, dtype, cache), title, _dots(some, title, "×", styles, 1.0)))
    for dtype, cache in dict.fromkeys((row["dtype"], row["cache"]) for row in timed):
        some_rows = [r for r in timed if (r["dtype"], r["cache"]) == (dtype, cache) and float(r["flops"] or 0) > 0]
        if some_rows:
            title = f"Roofline: {dtype}, cache {cache}"
            caption = f"{title}. FLOPs are those of the direct sum: what needs fewer (Winograd) may lie above the line."
            found.append(Picture(_name("roofline", dtype, cache), caption, _roofline(some_rows, title, styles)))
    for dtype, cache in dict.fromkeys((r["dtype"], r["cache"]) for r in timed if r["suite"] == "models"):
        some_rows = [r for r in timed if (r["suite"], r["dtype"], r["cache"]) == ("models", dtype, cache)]
        title = f"Images per second by batch size: {dtype}, cache {cache}"
        found.append(Picture(_name("batch", dtype, cache), title, _batches(some_rows, title, styles)))
    for suite, dtype in dict.fromkeys((r["suite"], r["dtype"]) for r in timed if float(r["peak_bytes"] or 0) > 0):
        peaks: dict[str, dict[str, float]] = {}
        for row in timed:
            if (row["suite"], row["dtype"]) == (suite, dtype) and float(row["peak_bytes"] or 0) > 0:
                peaks.setdefault(row["case"], {})[row["contender"]] = float(row["peak_bytes"]) / 2**20
        kept = any("kept for the gradient" in row["note"] for row in timed if row["suite"] == suite)
        title = "Kept for the gradient" if kept else "Memory at its peak, beyond weights and inputs"
        title += f", MiB: {suite}, {dtype}"
        found.append(Picture(_name("memory", suite, dtype), title, _dots(peaks, title, "", styles, None)))
    return found


def _name(*words: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", word) for word in words)


def _dots(values: dict[str, dict[str, float]], title: str, unit: str, styles: Styles, mark: float | None):
    """One line per case, one marker per contender, on a logarithmic axis; ``mark`` is a line to stand right of."""

    def draw(figure: Figure, theme: Theme) -> None:
        names = [name for name in styles.names if any(name in value for value in values.values())]
        figure.set_size_inches(WIDTH, GAP + LINE * (len(values) + _lines(names)))
        axes = figure.add_subplot()
        _plain(axes, theme)
        for y, value in enumerate(values.values()):
            axes.axhline(y, color=theme.faint, linewidth=0.6, zorder=0)
            axes.plot([min(value.values()), max(value.values())], [y, y], color=theme.faint, linewidth=2, zorder=1)
        for name in names:
            style = styles.of(name, theme)
            points = [(value[name], y) for y, value in enumerate(values.values()) if name in value]
            style.scatter(axes, points, name, 46 if style.ours else 26)
        axes.set_xscale("log")
        _numbers(axes.xaxis, axes.get_xlim(), unit)
        if mark is not None:
            axes.axvline(mark, color=theme.ink, linewidth=1, zorder=2)
        axes.set_yticks(range(len(values)), list(values), fontsize=7.5)
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_title(title, fontsize=11, loc="left", color=theme.ink)
        _legend(figure, theme)

    return draw


def _roofline(rows: list[Row], title: str, styles: Styles):
    """FLOP/s reached over FLOPs per byte, under the device's two limits as they were measured with the figures."""

    def draw(figure: Figure, theme: Theme) -> None:
        names = [name for name in styles.names if any(row["contender"] == name for row in rows)]
        figure.set_size_inches(WIDTH, 6.0 + LINE * _lines(names))
        axes = figure.add_subplot()
        _plain(axes, theme)
        limits = [(float(r["copy_bytes_per_s"] or 0), float(r["matmul_flops_per_s"] or 0)) for r in rows]
        bandwidth, rate = max(limit[0] for limit in limits), max(limit[1] for limit in limits)
        scale, unit = (1e12, "TFLOP/s") if rate >= 1e13 else (1e9, "GFLOP/s")
        reached: list[tuple[float, float]] = []
        for name in names:
            points = [
                (float(r["flops"]) / float(r["bytes"]), 1e3 * float(r["flops"]) / float(r["p50_ms"]) / scale)
                for r in rows
                if r["contender"] == name and float(r["bytes"] or 0) > 0
            ]
            if points:
                reached += points
                styles.of(name, theme).scatter(axes, points, name, 26)
        if bandwidth and rate and reached:
            ridge, top = rate / bandwidth, rate / scale
            low, high = min(ridge, *(x for x, _ in reached)) / 1.5, max(ridge, *(x for x, _ in reached)) * 1.5
            start = low * bandwidth / scale
            axes.plot([low, ridge, high], [start, top, top], color=theme.ink, linewidth=1.4, zorder=2)
            copied = f"{bandwidth / 1e12:.3g} TB/s" if bandwidth >= 1e12 else f"{bandwidth / 1e9:.3g} GB/s"
            above = {"fontsize": 8, "textcoords": "offset points", "color": theme.ink, "zorder": 4,
                     "bbox": {"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8, "pad": 1}}  # fmt: skip
            axes.annotate(f"matrix product {top:.4g} {unit}", (ridge, top), (4, 6), ha="left", **above)
            axes.annotate(f"copy {copied}", (low, start), (14, 0), va="top", ha="left", **above)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _numbers(axes.xaxis, axes.get_xlim(), "")
        _numbers(axes.yaxis, axes.get_ylim(), "")
        axes.grid(color=theme.faint, linewidth=0.6)
        axes.set_xlabel("FLOPs per byte that must be moved", color=theme.ink)
        axes.set_ylabel(unit, color=theme.ink)
        axes.set_title(title, fontsize=11, loc="left", color=theme.ink)
        _legend(figure, theme)

    return draw


def _batches(rows: list[Row], title: str, styles: Styles):
    """One panel per model and image, one line per contender; the band is from the 20th to the 80th percentile."""

    def draw(figure: Figure, theme: Theme) -> None:
        panels: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            panels.setdefault((row["model"], row["shape"].partition("x")[2]), []).append(row)
        models = [model for model, _ in panels]
        names = [name for name in styles.names if any(row["contender"] == name for row in rows)]
        across = min(2, len(panels))
        down = math.ceil(len(panels) / across)
        figure.set_size_inches(WIDTH, 0.8 + 3.4 * down + LINE * _lines(names))
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=theme.ink)
        for i, ((model, image), mine) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(down, across, i)
            _plain(axes, theme)
            for name in names:
                line = sorted((row for row in mine if row["contender"] == name), key=lambda row: int(row["batch"]))
                if not line:
                    continue
                sizes = [int(row["batch"]) for row in line]
                rates = [[1e3 * int(r["batch"]) / float(r[p] or r["p50_ms"]) for r in line]
                         for p in ("p50_ms", "p80_ms", "p20_ms")]  # fmt: skip
                style = styles.of(name, theme)
                axes.plot(sizes, rates[0], color=style.colour, marker=style.marker, markersize=5, label=name,
                          linewidth=2 if style.ours else 1.2, linestyle="--" if style.hollow else "-",
                          markerfacecolor=theme.paper if style.hollow else style.colour)  # fmt: skip
                axes.fill_between(sizes, rates[1], rates[2], color=style.colour, alpha=0.15, linewidth=0)
            sizes = sorted({int(row["batch"]) for row in mine})
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(0)
            axes.grid(color=theme.faint, linewidth=0.6)
            axes.set_title(model if models.count(model) == 1 else f"{model}, {image}", fontsize=10, color=theme.ink)
            axes.set_xlabel("batch", color=theme.ink)
            axes.set_ylabel("images/s", color=theme.ink)
        _legend(figure, theme)

    return draw


def _plain(axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.ink, which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint)


def _numbers(axis, limits: tuple[float, float], unit: str) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, closer where the axis is short, as plain numbers."""
    low, high = limits
    steps: tuple[float, ...] = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
    for least, fewer in ((3, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)), (15, (1, 2, 5)), (1000, (1,))):
        steps = fewer if high / low > least else steps
    places = [s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    axis.set_ticks([place for place in places if low <= place <= high])
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: (f"{x:.4g}" if x < 1000 else f"{x:,.0f}") + unit))


def _columns(names: Sequence[str]) -> int:
    """As many in a legend as its width takes, in lines of like length."""
    most = max(1, int(WIDTH / (0.45 + 0.06 * max(map(len, names), default=0))))
    return math.ceil(len(names) / math.ceil(len(names) / most)) if names else 1


def _lines(names: Sequence[str]) -> float:
    """The height of a legend, in lines of a dot plot."""
    return 1.2 * math.ceil(len(names) / _columns(names))


def _legend(figure: Figure, theme: Theme) -> None:
    """One for all panels, below them, in the order of the first panel that has a name."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend([*found.values()], [*found], loc="outside lower center", ncols=_columns([*found]), fontsize=8,
                  frameon=False, labelcolor=theme.ink)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("csv", type=Path, nargs="+", help="results of run.py")
    options.add_argument("--out", type=Path, default=Path("out/bench"), help="where a folder per CSV is made")
    options.add_argument("--publish", action="store_true", help="write the figures of README.md and docs/ instead")
    args = options.parse_args(argv)
    if args.publish and len(args.csv) > 1:
        options.error("--publish takes one CSV")
    code = 0
    for path in args.csv:
        try:
            rows, problems = store.read(path)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            code = 1
            continue
        for problem in problems:
            print(problem, file=sys.stderr)
        code = 1 if problems else code
        if args.publish:
            print(*publish.write(store.latest(rows)), sep="\n")
            continue
        for folder in write(store.latest(rows), problems, args.out / path.stem):
            print(folder)
    return code


def write(rows: list[Row], problems: list[str], folder: Path) -> list[Path]:
    """The pictures and the report of one CSV; a file with several devices or thread counts gives a report for each."""
    machines = list(dict.fromkeys((row["device"], row["threads"]) for row in rows))
    written = []
    for device, threads in machines:
        mine = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        target = folder if len(machines) == 1 else folder / _name(device, threads)
        target.mkdir(parents=True, exist_ok=True)
        drawn = []
        for picture in pictures(mine):
            files = {theme: picture.png(theme) for theme in (LIGHT, DARK)}
            for theme, data in files.items():
                (target / f"{picture.name}{theme.suffix}.png").write_bytes(data)
            drawn.append((picture.caption, files[LIGHT], files[DARK]))
        (target / "report.html").write_text(report.page(mine, drawn, problems), encoding="utf-8")
        written.append(target / "report.html")
    return written


if __name__ == "__main__":
    sys.exit(main())
