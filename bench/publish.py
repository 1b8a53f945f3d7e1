"""What README.md and docs/ show of the measurements: tables, a sentence and a chart, all taken from one CSV.

A page marks the place with ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; what stands between is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_fused.testing.bench.contenders import COMPILED, EAGER, PEERS
from resnet_fused.testing.bench.store import Row
from resnet_fused.testing.bench.summary import geometric_mean

ROOT = Path(__file__).parent.parent
NAMES = {
    "resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "compile freezing": "torch.compile",
}  # fmt: skip
PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One model, dtype and batch size, in milliseconds per batch."""

    model: str
    dtype: str
    batch: int
    nchw: float
    channels_last: float
    peer: str
    best: float
    fused: float


def cases(rows: Sequence[Row]) -> list[Case]:
    """The whole networks in which eager, a peer and ours were timed; ordered by dtype, model and batch."""
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if (row["suite"], row["cache"], row["status"]) == ("models", "warm", "ok"):
            key = (row["dtype"], row["model"], int(row["batch"]))
            times.setdefault(key, {})[row["contender"]] = float(row["p50_ms"])
    found = []
    for (dtype, model, batch), by_name in times.items():
        peers = {name: by_name[name] for name in (*PEERS, *COMPILED) if name in by_name}
        if peers and {*EAGER, "fused"} <= by_name.keys():
            peer = min(peers, key=lambda name: peers[name])
            eager = (by_name[name] for name in EAGER)
            found.append(Case(model, dtype, batch, *eager, peer, peers[peer], by_name["fused"]))
    order = list(NAMES)
    return sorted(found, key=lambda c: (c.dtype != "float32", order.index(c.model), c.batch))


def short_table(found: Sequence[Case]) -> str:
    """A line per model and dtype; in each cell eager, the best peer and ours."""
    batches = sorted({case.batch for case in found})
    lines = [
        f"| ms per batch | {' | '.join(f'batch {batch}' for batch in batches)} |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for model, dtype in dict.fromkeys((case.model, case.dtype) for case in found):
        mine = {case.batch: case for case in found if (case.model, case.dtype) == (model, dtype)}
        cells = [
            f"{c.nchw:.1f} / {c.best:.1f} / **{c.fused:.1f}** ({c.nchw / c.fused:.2f}×)"
            for c in (mine[batch] for batch in batches)
        ]
        lines.append(f"| {NAMES[model]}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def full_table(found: Sequence[Case]) -> str:
    """A line per case with both of eager's formats and the name of the best peer."""
    lines = [
        "| model | batch | NCHW | channels_last | best peer | fused | × NCHW | × best eager | × peer |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for c in found:
        ratios = " | ".join(f"{time / c.fused:.2f}" for time in (c.nchw, min(c.nchw, c.channels_last), c.best))
        lines.append(
            f"| {NAMES[c.model]}, {c.dtype} | {c.batch} | {c.nchw:.1f} | {c.channels_last:.1f} | "
            f"{NAMES[c.peer]} {c.best:.1f} | **{c.fused:.1f}** | {ratios} |"
        )
    return "\n".join(lines)


def sentence(found: Sequence[Case]) -> str:
    """The means over all cases, and where ours is slowest compared with the best peer."""
    least = min(found, key=lambda c: c.best / c.fused)
    behind = sum(c.best < c.fused for c in found)
    best_eager = [min(c.nchw, c.channels_last) / c.fused for c in found]
    return (
        f"Geometric means over these {len(found)} cases: {geometric_mean(c.nchw / c.fused for c in found):.2f}× eager "
        f"NCHW, {geometric_mean(best_eager):.2f}×\nthe faster of eager's two memory formats, "
        f"{geometric_mean(c.best / c.fused for c in found):.2f}× the best peer. The least gain over the best peer is "
        f"{least.best / least.fused:.2f}×\n({NAMES[least.model]}, {least.dtype}, batch {least.batch}); the best peer "
        f"is faster in {behind} of {len(found)} cases."
    )


TEXTS: dict[str, Callable[[Sequence[Case]], str]] = {
    "short": short_table, "full": full_table, "means": sentence,
}  # fmt: skip


@dataclass(frozen=True)
class Colours:
    suffix: str
    ink: str
    peer: str
    fused: str


CHARTS = (
    Colours("", "#1f2328", "#8a8f98", "#0072b2"),
    Colours("-dark", "#e6e8ea", "#9aa1ab", "#4aa8ff"),
)
WIDTH, LEFT, RIGHT, LINE, TOP = 400, 118, 40, 34, 62


def chart(found: Sequence[Case], colours: Colours) -> str:
    """Bars: how many times faster than eager NCHW the best peer and ours are, in the mean over the batch sizes.

    Written as plain SVG, 400 pixels wide, so that the same CSV gives the same bytes whatever is installed.
    """
    groups = list(dict.fromkeys((case.model, case.dtype) for case in found))
    height = TOP + LINE * len(groups) + 8
    bars = []
    for model, dtype in groups:
        mine = [case for case in found if (case.model, case.dtype) == (model, dtype)]
        ratios = (geometric_mean(c.nchw / c.best for c in mine), geometric_mean(c.nchw / c.fused for c in mine))
        bars.append((f"{NAMES[model]} {'fp32' if dtype == 'float32' else 'bf16'}", ratios))
    scale = (WIDTH - LEFT - RIGHT) / max(max(ratios) for _, ratios in bars)
    batches = ", ".join(str(batch) for batch in sorted({case.batch for case in found}))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" font-size="13" role="img">',
        "<title>Times faster than eager PyTorch: best peer and fused</title>",
        f'<text x="0" y="15" font-weight="600" fill="{colours.ink}">Times faster than eager PyTorch (NCHW)</text>',
        f'<text x="0" y="33" font-size="12" fill="{colours.ink}">CPU, geometric mean of batch {batches}</text>',
    ]
    for x, colour, label in ((0, colours.peer, "best peer"), (92, colours.fused, "resnet_fused")):
        parts.append(f'<rect x="{x}" y="43" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="53" font-size="12" fill="{colours.ink}">{label}</text>')
    for i, (label, ratios) in enumerate(bars):
        y = TOP + LINE * i
        parts.append(f'<text x="{LEFT - 8}" y="{y + 20}" text-anchor="end" fill="{colours.ink}">{label}</text>')
        for k, (ratio, colour) in enumerate(zip(ratios, (colours.peer, colours.fused), strict=True)):
            width, weight = ratio * scale, ' font-weight="600"' if k else ""
            parts.append(f'<rect x="{LEFT}" y="{y + 2 + 14 * k}" width="{width:.1f}" height="12" fill="{colour}"/>')
            parts.append(
                f'<text x="{LEFT + width + 4:.1f}" y="{y + 12 + 14 * k}" font-size="12"{weight} '
                f'fill="{colours.ink}">{ratio:.2f}×</text>'
            )
    x, end = LEFT + scale, TOP + LINE * len(bars)
    parts.append(
        f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{end}" stroke="{colours.ink}" stroke-dasharray="3 3"/>'
    )
    return "\n".join([*parts, "</svg>", ""])


def pages() -> Iterable[Path]:
    """README.md and all pages."""
    return (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def contents(rows: Sequence[Row]) -> dict[Path, str]:
    """What the charts and every page with figures should hold, by path."""
    found = cases(rows)
    if not found:
        raise ValueError("no whole network in these rows has eager, a peer and fused")
    written = {ROOT / "docs/images" / f"speed{c.suffix}.svg": chart(found, c) for c in CHARTS}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if PLACE.search(text):
            written[page] = PLACE.sub(lambda at: f"{at[1]}{TEXTS[at[2]](found)}\n{at[3]}", text)
    return written


def write(rows: Sequence[Row]) -> list[Path]:
    """Write what has changed, and return its paths."""
    changed = []
    for path, text in contents(rows).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed
