"""Training: how a small network learns, eager beside fused, and then the suite ``training`` of run.py.

    python bench/training.py --out out --batch 8

Handwritten digits are learnt from one seed by eager, fused, and fused with each ``recompute``; the loss curves go to
OUT/training.png. The exit code is 1, and nothing is timed, when a fused network learns otherwise than eager: by more
than half a point of accuracy. What the digits do not take of the options goes to run.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from run import main as suites

import resnet_fused as rf
from resnet_fused.testing.training import Run, learn, small_digits, twins

COLOURS = {"eager": "#8a8f98", "fused": "#1f77b4", "fused, activations": "#2ca02c", "fused, last_conv": "#d62728"}


def digits(epochs: int, folder: Path, device: torch.device, out: Console) -> bool:
    """Eager and fused from one seed; whether they learn alike."""
    torch.manual_seed(0)
    data, runs = small_digits(), {}
    for name, model in twins(rf.resnet20().to(device)).items():
        runs[name] = learn(model, *data, epochs)
    eager = runs["eager"]
    title = f"resnet20 on handwritten digits, {epochs} epochs, {device.type}, float32"
    table = Table("run", "last loss", "accuracy", "running statistics", title=title)
    for name, run in runs.items():
        worst = max(
            float((value.double() - eager.statistics[key].double()).norm() / eager.statistics[key].double().norm())
            for key, value in run.statistics.items()
        )
        alike = "" if run is eager else "eager's to the bit" if worst == 0 else f"{worst:.1e} off, relative"
        table.add_row(name, f"{run.losses[-1]:.4f}", f"{run.accuracy:.2%}", alike)
    out.print(table)
    folder.mkdir(parents=True, exist_ok=True)
    draw(runs, title, folder / "training.png")
    out.print(f"loss curves: {folder / 'training.png'}")
    return all(abs(run.accuracy - eager.accuracy) <= 0.005 for run in runs.values())


def draw(runs: dict[str, Run], title: str, path: Path) -> None:
    """The loss of every step in one picture; eager broad, the others dashed, so that equal curves all show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, run) in enumerate(runs.items()):
        style = (4 * i, (4, 8)) if i else "-"
        axes.plot(
            run.losses,
            color=COLOURS[name],
            label=f"{name}: {run.accuracy:.1%}",
            linestyle=style,
            linewidth=2 if i else 7,
        )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=3, help="of the digits; 0 leaves them out")
    options.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    args, rest = options.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.epochs and not digits(args.epochs, args.out, device, Console(highlight=False)):
        return 1
    return suites(["--suite", "training", *rest])


if __name__ == "__main__":
    sys.exit(main())
