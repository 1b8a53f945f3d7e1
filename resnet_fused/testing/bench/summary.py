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


def table(rows: Rows, contenders: Sequence[str], cache: str) -> Table:
    """One line per case: p50 in milliseconds of each contender, then how many times faster than eager ours are.

    The ratio is to the faster of the two eager layouts; the last line is the geometric mean per dtype. A contender
    whose gate was red has no time.
    """
    ours = [name for name in contenders if is_ours(name)]
    drawn = Table("case", title=f"p50 ms, cache {cache}; × faster than the faster eager layout", title_justify="left")
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
    for dtype in dict.fromkeys(key[2] for key in ratios):
        means = [
            geometric_mean(value[name] for key, value in ratios.items() if key[2] == dtype and name in value)
            for name in ours
        ]
        drawn.add_row(f"geometric mean, {dtype}", *[""] * len(contenders), *map(_ratio, means))
    return drawn


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
