"""Training, eager beside fused: memory kept for the gradient, how a small network learns, and speed where a GPU is.

    python bench/training.py --out out

The first two parts need no GPU and give the same figures everywhere; the loss curves go to OUT/training.png. The exit
code is 1 when a fused network learns otherwise than eager: by more than half a point of accuracy.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import resnet_fused as rf
from resnet_fused.testing.training import Run, learn, saved_bytes, small_digits, twins

COLOURS = {"eager": "#8a8f98", "fused": "#1f77b4", "fused, activations": "#2ca02c", "fused, last_conv": "#d62728"}
MODELS = {
    "BasicBlock, 64 channels": (lambda: nn.Sequential(*[rf.FusedBasicBlock(64, 64) for _ in range(4)]), (64, 28, 28)),
    "Bottleneck, 256 channels": (
        lambda: nn.Sequential(*[rf.FusedBottleneck(256, 64) for _ in range(4)]),
        (256, 28, 28),
    ),
    "ResNet-18": (rf.resnet18, (3, 224, 224)),
    "ResNet-50": (rf.resnet50, (3, 224, 224)),
}


def memory(out: Console) -> None:
    """Bytes that autograd keeps, by saved-tensor hooks; four identity blocks in a row stand for a block."""
    table = Table("model", "eager, MB per image", "fused", "activations", "last_conv", title="kept for the gradient")
    for name, (make, shape) in MODELS.items():
        x = torch.randn(2, *shape).contiguous(memory_format=torch.channels_last)
        eager, *rest = [saved_bytes(model.train(), x) for model in twins(make()).values()]
        table.add_row(name, f"{eager / 2e6:.2f}", *(f"{kept / eager:.1%}" for kept in rest))
    out.print(table)


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


def speed(batches: Sequence[int], steps: int, compiled: bool, out: Console) -> None:
    """Images per second and peak memory of ResNet-50 training steps in mixed precision."""
    if not torch.cuda.is_available():
        out.print("speed: not measured, no CUDA device")
        return
    table = Table("run", "batch", "images/s", "peak GB", title=f"ResNet-50, bf16 AMP, {torch.cuda.get_device_name()}")
    for batch in batches:
        x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
        y = torch.randint(1000, (batch,), device="cuda")
        models = twins(rf.resnet50().cuda())
        if compiled:
            models["torch.compile"] = torch.compile(models["eager"])  # type: ignore[assignment]
        for name, model in models.items():
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

            def step(model: nn.Module = model, optimizer: torch.optim.SGD = optimizer) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = F.cross_entropy(model(x), y)  # noqa: B023
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

            for _ in range(5):
                step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            peak = torch.cuda.max_memory_allocated() / 1e9
            table.add_row(name, str(batch), f"{batch * steps / seconds:.0f}", f"{peak:.2f}")
            optimizer.zero_grad(set_to_none=True)
    out.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--part", nargs="+", choices=("memory", "digits", "speed"), default=["memory", "digits", "speed"]
    )
    options.add_argument("--epochs", type=int, default=3, help="of the digits")
    options.add_argument("--batch", type=int, nargs="+", default=[64, 256], help="of the speed measurement")
    options.add_argument("--steps", type=int, default=20, help="timed steps")
    options.add_argument("--compile", action="store_true", help="torch.compile too")
    options.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    args = options.parse_args(argv)
    out = Console(highlight=False)
    alike = True
    if "memory" in args.part:
        memory(out)
    if "digits" in args.part:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        alike = digits(args.epochs, args.out, device, out)
    if "speed" in args.part:
        speed(args.batch, args.steps, args.compile, out)
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
