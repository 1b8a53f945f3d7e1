"""``resnet-fused demo``: real images through eager and fused ResNets: the same predictions, and the time they take."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import resnet_fused
from resnet_fused.cli.common import UserError, console, pick_device, print_json, to_json
from resnet_fused.cli.demo.variants import BASELINES

NEEDED = {"sklearn": "scikit-learn", "PIL": "pillow", "matplotlib": "matplotlib"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="real images through eager and fused models; a chart and figures",
        description="Train a small ResNet on handwritten digits, fuse it, and compare every prediction; then run "
        "ResNet-18 and ResNet-50 over crops of two photographs. Nothing is downloaded. Exit code 1 when a prediction "
        "differs, an error is outside its budget, or the digits are learnt worse than they should be.",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: CUDA where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the demo needs {', '.join(missing)}: pip install 'resnet-fused[bench]'")
    from resnet_fused.cli.demo import digits, photos

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error
    return play(digits.Config(), photos.Config(), args.out, pick_device(args.device), json=args.json)


def play(digits_config: Any, photos_config: Any, folder: Path, device: torch.device, *, json: bool = False) -> int:
    """Run both parts, write ``demo.json`` and ``blocks.png`` to ``folder``, print, and return the exit code."""
    from resnet_fused.cli.demo import chart, digits, photos

    out, start = console(quiet=json), time.perf_counter()
    where = describe(device)
    out.print(f"resnet_fused {resnet_fused.__version__}, torch {torch.__version__}, {where}")
    out.rule("Handwritten digits", align="left")
    digits_result = digits.run(digits_config, device, out)
    print_digits(digits_result, out)
    out.rule("Photographs", align="left")
    photo_results = photos.run(photos_config, device, out)
    print_photos(photo_results, out)
    chart.draw(photo_results, f"{where}, channels_last", folder / "blocks.png")
    failed = digits.failures(digits_result) + photos.failures(photo_results)
    facts = {
        "device": where,
        "versions": {"resnet_fused": resnet_fused.__version__, "torch": torch.__version__},
        "digits": digits_result,
        "photographs": photo_results,
        "failures": failed,
        "seconds": time.perf_counter() - start,
    }
    (folder / "demo.json").write_text(to_json(facts) + "\n", encoding="utf-8")
    if json:
        print_json(facts)
    out.print(f"\n{folder / 'blocks.png'}: time of every block; {folder / 'demo.json'}: all figures", markup=False)
    for line in failed:
        out.print(f"FAILED: {line}", style="bold red", markup=False)
    return 1 if failed else 0


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def print_digits(result: dict[str, Any], out: Console) -> None:
    before, after = _best(result["milliseconds"])
    out.print(f"accuracy on {result['tested_on']} held-out digits: eager {result['accuracy']:.2%}, ", end="")
    out.print(f"fused {result['accuracy_fused']:.2%}")
    out.print(f"predictions equal to eager's: {result['equal_predictions']} of {result['tested_on']}", style="bold")
    out.print(f"all of them take {before:.2f} ms eager, {after:.2f} ms fused: {before / after:.2f}x")


def print_photos(results: list[dict[str, Any]], out: Console) -> None:
    table = Table("model", "dtype", box=None)
    for heading in ("error / budget", "eager ms", "fused ms", "speedup"):
        table.add_column(heading, justify="right")
    for r in results:
        ratio, cells = r["verdict"]["ratio"], ("", "", "")
        if "milliseconds" in r:
            before, after = _best(r["milliseconds"])
            cells = (f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}x")
        table.add_row(r["model"], r["dtype"], "" if ratio is None else f"{ratio:.2f}", *cells)
    out.print(table)
    out.print("Both in their faster memory layout; medians.")


def _best(milliseconds: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Median milliseconds of eager and of fused, each in its faster layout."""
    eager = min(milliseconds[name]["p50"] for name in BASELINES)
    return eager, min(timing["p50"] for name, timing in milliseconds.items() if name not in BASELINES)
