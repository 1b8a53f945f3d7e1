"""The demo's chart: milliseconds of every block, eager and fused, one panel per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EAGER, FUSED = "#8a8f98", "#1f77b4"


def draw(results: list[dict[str, Any]], subtitle: str, path: Path) -> None:
    """Write the bar chart of those ``results`` (of photos.run) that hold times of blocks to ``path``, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [r for r in results if r.get("blocks")]
    figure = Figure(figsize=(12, 1 + 3.6 * max(len(panels), 1)), layout="constrained")
    figure.suptitle(f"Time per residual block, eager and fused\n{subtitle}", fontsize=12)
    for i, result in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, i)
        blocks = result["blocks"]
        places = range(len(blocks))
        eager, fused = ([block[key] for block in blocks] for key in ("eager", "fused"))
        axes.bar([p - 0.2 for p in places], eager, 0.4, color=EAGER, label="eager")
        axes.bar([p + 0.2 for p in places], fused, 0.4, color=FUSED, label="fused")
        top = max((*eager, *fused))
        for p, before, after in zip(places, eager, fused, strict=True):
            axes.text(p, max(before, after) + 0.02 * top, f"{before / after:.2f}×", ha="center", fontsize=8)
        axes.set_xticks(list(places), [block["name"] for block in blocks], rotation=35, ha="right", fontsize=8)
        axes.set_ylim(0, 1.15 * top)
        axes.set_ylabel("milliseconds (median)")
        total = f"all blocks: {sum(eager):.1f} → {sum(fused):.1f} ms"
        axes.set_title(f"{result['model']}, {result['dtype']}, batch {result['batch']}; {total}", fontsize=10)
        axes.legend(loc="upper right", frameon=False, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110)
