"""The report as one HTML file: pictures inside, tables that sort, light and dark, nothing from the network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from resnet_fused.testing.bench import store, summary
from resnet_fused.testing.bench.contenders import is_ours
from resnet_fused.testing.bench.store import Row

NUMBERS = ("batch", "p20_ms", "p50_ms", "p80_ms", "× eager", "% roofline", "gate", "peak MiB")
HEADINGS = ("case", "contender", "dtype", "cache", *NUMBERS, "note")

STYLE = """
:root { --paper: #fff; --ink: #1f2328; --faint: #d8dce1; --ours: #0072b2; --red: #b42318; --row: #f5f7f9 }
:root[data-theme=dark] { --paper: #14171a; --ink: #e6e8ea; --faint: #383d43; --ours: #56b4e9; --red: #ff8a7a;
  --row: #1d2125 }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem }
h2 { margin-top: 2.5rem } figure { margin: 1.5rem 0 } figcaption { font-size: 90% }
img { max-width: 100%; height: auto }
:root:not([data-theme=dark]) img.dark, :root[data-theme=dark] img.light { display: none }
table { border-collapse: collapse; font-size: 13px; width: 100% } .wide { overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--faint); white-space: nowrap }
td:last-child { white-space: normal; min-width: 12rem } tbody tr:hover { background: var(--row) }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid var(--ours) }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr.ours td:nth-child(2) { color: var(--ours); font-weight: 600 } tr.red td, .problem { color: var(--red) }
#theme { float: right; background: none; color: inherit; border: 1px solid var(--faint); border-radius: 4px;
  padding: .3rem .7rem }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem } dd { margin: 0 }
"""

SCRIPT = """
const root = document.documentElement;
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").onclick = () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  };
  for (const button of document.querySelectorAll("th button")) button.onclick = () => {
    const head = button.parentElement, place = head.cellIndex, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[place].textContent;
    const number = head.classList.contains("number");
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (!number) return down ? y.localeCompare(x) : x.localeCompare(y);
      const without = text => text === "" || isNaN(text);
      if (without(x) || without(y)) return without(x) - without(y);  // what has no figure stays last
      return down ? y - x : x - y;
    };
    body.append(...[...body.rows].sort(order));
  };
});
"""


def page(rows: Sequence[Row], pictures: Sequence[tuple[str, bytes, bytes]], problems: Sequence[str]) -> str:
    """The whole file. ``pictures`` are caption, light PNG, dark PNG; ``problems`` are the CSV's broken rows."""
    device = rows[-1]["device"]
    told = {key: list(dict.fromkeys(row[key] for row in rows if row[key])) for key in (*store.ENVIRONMENT, "date")}
    dates = sorted(told["date"])
    told["date"] = list(dict.fromkeys([*dates[:1], *dates[-1:]]))  # the first and the last
    facts = {key: " – ".join(values) if key == "date" else ", ".join(values) for key, values in told.items() if values}
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text('resnet_fused on ' + device)}</title>",
        f"<style>{STYLE}</style><script>{SCRIPT}</script></head><body>",
        '<button id="theme" type="button">light / dark</button>',
        f"<h1>resnet_fused on {_text(device)}</h1>",
        "<dl>" + "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items()) + "</dl>",
        *(f'<p class="problem">{_text(problem)}</p>' for problem in problems),
        _means(rows),
    ]
    for caption, light, dark in pictures:
        images = "".join(
            f'<img class="{name}" alt="{_text(caption)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
            for name, data in (("light", light), ("dark", dark))
        )
        parts.append(f"<figure>{images}<figcaption>{_text(caption)}</figcaption></figure>")
    for suite in dict.fromkeys(row["suite"] for row in rows):
        parts += [f"<h2>{_text(suite)}</h2>", _figures([row for row in rows if row["suite"] == suite])]
    return "\n".join([*parts, "</body></html>", ""])


def _means(rows: Sequence[Row]) -> str:
    """Geometric means of the speed-ups, per suite, dtype and cache."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for (suite, _, dtype, cache), ratios in summary.speedups(rows).items():
        for contender, ratio in ratios.items():
            groups.setdefault((contender, suite, dtype, cache), []).append(ratio)
    lines = [
        (contender, [key[0], contender, *key[1:]], [f"{summary.geometric_mean(values):.3f}", str(len(values))])
        for (contender, *key), values in groups.items()
    ]
    headings = ("suite", "contender", "dtype", "cache")
    body = [(is_ours(contender), "", words, numbers, "") for contender, words, numbers in lines]
    title = "<h2>Geometric mean: times faster than the faster eager layout</h2>"
    return title + _table(headings, ("× eager", "cases"), (), body)


def _figures(rows: Sequence[Row]) -> str:
    ratios = summary.speedups(rows)
    body = []
    for row in rows:
        key = (row["suite"], row["case"], row["dtype"], row["cache"])
        ratio = ratios.get(key, {}).get(row["contender"]) if row["status"] == "ok" else None
        numbers = [
            *(row["batch"], row["p20_ms"], row["p50_ms"], row["p80_ms"]),
            "" if ratio is None else f"{ratio:.3f}",
            *(row["roofline_pct"], row["gate"]),
            f"{float(row['peak_bytes']) / 2**20:.2f}" if row["peak_bytes"] else "",
        ]
        words = [row["case"], row["contender"], row["dtype"], row["cache"]]
        note = row["note"] if row["status"] == "ok" else f"{row['status']}: {row['note']}"
        body.append((is_ours(row["contender"]), row["status"], words, numbers, note))
    return _table(HEADINGS[:4], NUMBERS, HEADINGS[-1:], body)


def _table(words: Sequence[str], numbers: Sequence[str], notes: Sequence[str], body: Sequence[tuple]) -> str:
    def head(name: str, kind: str) -> str:
        return f'<th{kind}><button type="button">{_text(name)}</button></th>'

    number = ' class="number"'
    heads = [*(head(n, "") for n in words), *(head(n, number) for n in numbers), *(head(n, "") for n in notes)]
    lines = []
    for ours, status, texts, figures, note in body:
        kind = " ".join(["ours"] * ours + ["red"] * (status == "red"))
        cells = [f"<td>{_text(text)}</td>" for text in texts]
        cells += [f"<td{number}>{_text(figure)}</td>" for figure in figures]
        cells += [f"<td>{_text(note)}</td>"] * len(notes)
        lines.append(f'<tr class="{kind}">{"".join(cells)}</tr>' if kind else f"<tr>{''.join(cells)}</tr>")
    rows = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _text(value: str) -> str:
    return html.escape(value)
