"""Tables of what was measured, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from resnet_fused.testing.bench.contenders import EAGER, is_ours

Rows = Sequence[Mapping[str, Any]]


def best_eager(rows: Rows) -> float | None:
    """The faster eager layout's p50 in milliseconds, of one case and cache; None when neither was timed."""
    times = [float(row["p50_ms"]) for row in rows if row["contender"] in EAGER and row["status"] == "ok"]
    return min(times, default=None)


def speedups(rows: Rows) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """How many times faster than the faster eager layout: by (suite, case, dtype, cache), then by contender."""
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["suite"], row["case"], row["dtype"], row["cache"]), []).append(row)
    found = {}
    for key, group in groups.items():
        eager = best_eager(group)
        if eager is not None:
            found[key] = {str(row["contender"]): eager / float(row["p50_ms"]) for row in group if row["status"] == "ok"}
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """NaN for no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


WIDE = 7  # columns of figures beside one another, on a terminal of common width


def table(rows: Rows, contenders: Sequence[str], cache: str) -> Table:
    """The figures in this state of the cache: a line per case where contenders are few, else one for each of them."""
    return _wide(rows, contenders, cache) if fits(contenders) else _long(rows, contenders, cache)


def fits(contenders: Sequence[str]) -> bool:
    """Whether there is room for a column for each, and one more for each of ours."""
    return len(contenders) + sum(map(is_ours, contenders)) <= WIDE


def _long(rows: Rows, contenders: Sequence[str], cache: str) -> Table:
    """One line per case and contender."""
    drawn = Table(title=f"cache {cache}", title_justify="left")
    drawn.add_column("case", no_wrap=True)
    drawn.add_column("contender")
    here = [row for row in rows if row["cache"] == cache and row["status"] != "absent"]
    figures = ("p20 ms", "p50 ms", "p80 ms", "images/s", "× eager", "% roofline", "error / budget")
    for heading in (*figures, *["MiB"] * any(row["peak_bytes"] for row in here)):
        drawn.add_column(heading, justify="right")
    ratios = speedups(rows)
    for case in dict.fromkeys(row["case"] for row in here):
        drawn.add_section()
        by_name = {row["contender"]: row for row in here if row["case"] == case}
        for i, name in enumerate(name for name in contenders if name in by_name):
            row = by_name[name]
            label = Text(name, style="bold" if is_ours(name) else "")
            if row["status"] == "red":
                gate = f"{float(row['gate']):.3g}" if row["gate"] else ""
                drawn.add_row("" if i else case, label, "", Text("RED", style="bold red"), *[""] * 4, gate)
                continue
            p20, p50, p80 = (float(row[f"{p}_ms"] or "nan") for p in ("p20", "p50", "p80"))
            ratio = ratios.get((row["suite"], case, row["dtype"], cache), {}).get(name)
            cells = [f"{value:.3f}" for value in (p20, p50, p80)] + [f"{1e3 * int(row['batch']) / p50:.1f}"]
            shown = [f"{float(row[key]):.{digits}f}" for key, digits in (("roofline_pct", 1), ("gate", 2))]
            shown += [f"{float(row['peak_bytes']) / 2**20:.2f}"] if row["peak_bytes"] else []
            drawn.add_row("" if i else case, label, *cells, _ratio(ratio), *shown)
    drawn.add_section()
    for dtype, means in _means(ratios, [name for name in contenders if name not in EAGER], cache).items():
        for i, (name, mean) in enumerate(means.items()):
            drawn.add_row("" if i else f"geometric mean, {dtype}", Text(name), *[""] * 4, _ratio(mean), "", "")
    return drawn


def _means(ratios: Mapping[Any, Mapping[str, float]], names: Sequence[str], cache: str) -> dict[str, dict[str, float]]:
    """By dtype, then by contender."""
    here = {key: value for key, value in ratios.items() if key[3] == cache}
    return {
        dtype: {
            name: geometric_mean(value[name] for key, value in here.items() if key[2] == dtype and name in value)
            for name in names
        }
        for dtype in dict.fromkeys(key[2] for key in here)
    }


def _wide(rows: Rows, contenders: Sequence[str], cache: str) -> Table:
    """One line per case: p50 in milliseconds of each contender, then how many times faster than eager ours are.

    The ratio is to the faster of the two eager layouts; the last line is the geometric mean per dtype. A contender
    whose gate was red has no time.
    """
    ours = [name for name in contenders if is_ours(name)]
    drawn = Table(title=f"p50 ms, cache {cache}; × faster than the faster eager layout", title_justify="left")
    drawn.add_column("case", no_wrap=True)
    for name in contenders:
        drawn.add_column(Text(name), justify="right")
    for name in ours:
        drawn.add_column(Text(f"× {name}"), justify="right", style="bold")
    ratios = {key: value for key, value in speedups(rows).items() if key[3] == cache}
    cases = dict.fromkeys((row["suite"], row["case"], row["dtype"], row["cache"]) for row in rows)
    for key in (key for key in cases if key[3] == cache):
        cells: list[Text] = []
        by_name = {
            row["contender"]: row for row in rows if (row["suite"], row["case"], row["cache"]) == (*key[:2], cache)
        }
        for name in contenders:
            row = by_name.get(name)
            cells.append(_cell(row))
        cells += [_ratio(ratios.get(key, {}).get(name)) for name in ours]
        drawn.add_row(key[1], *cells)
    drawn.add_section()
    for dtype, means in _means(ratios, ours, cache).items():
        drawn.add_row(f"geometric mean, {dtype}", *[""] * len(contenders), *map(_ratio, means.values()))
    return drawn


def memory(rows: Rows, contenders: Sequence[str]) -> Table:
    """One line per case: MiB of each contender, and as a share of the smaller of eager's."""
    first = next(row for row in rows if row["peak_bytes"])
    title = first["note"].removeprefix("memory: ") or "memory at its peak, beyond weights and inputs"
    drawn = Table(title=f"MiB: {title}", title_justify="left")
    drawn.add_column("case", no_wrap=True)
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["peak_bytes"]:
            by_case.setdefault(row["case"], {})[row["contender"]] = float(row["peak_bytes"]) / 2**20
    names = [name for name in contenders if any(name in peaks for peaks in by_case.values())]
    for name in names:
        drawn.add_column(Text(name), justify="right")
    for case, peaks in by_case.items():
        eager = min((peaks[name] for name in EAGER if peaks.get(name)), default=None)
        cells = []
        for name in names:
            share = f" ({peaks[name] / eager:.0%})" if name in peaks and eager and name not in EAGER else ""
            cells.append(f"{peaks[name]:.2f}{share}" if name in peaks else "–")
        drawn.add_row(case, *cells)
    return drawn


def left_out(rows: Rows) -> list[str]:
    """Why contenders have no time, once per reason: ``onnxruntime: unsupported … (4 cases)``."""
    reasons: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["status"] == "absent":
            reasons.setdefault((row["contender"], row["note"]), set()).add(row["case"])
    return [f"{name}: {note} ({len(cases)} case{'s' * (len(cases) > 1)})" for (name, note), cases in reasons.items()]


def _cell(row: Mapping[str, Any] | None) -> Text:
    if row is None or row["status"] == "absent":
        return Text("–", style="dim")
    if row["status"] == "red":
        return Text("RED", style="bold red")
    return Text(f"{float(row['p50_ms']):.3f}")


def _ratio(value: float | None) -> Text:
    if value is None or math.isnan(value):
        return Text("–", style="dim")
    return Text(f"{value:.2f}", style="" if value >= 1 else "yellow")
