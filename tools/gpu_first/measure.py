"""Times through the project's harness (resnet_fused.testing.bench): networks, blocks, and what torch.compile makes."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from gpu_first.device import BACKENDS
from resnet_fused.testing.bench import contenders, program, summary

EAGER = ("eager NCHW", "eager channels_last")
OURS = ("fused", *(f"fused[{name}]" for name in BACKENDS))
HALVES = (torch.bfloat16, torch.float16)
KINDS = ("networks", "blocks", "compiled")


def options(kind: str, out: Path, dry: bool) -> tuple[program.Options, dict[str, str]]:
    """What the harness is asked for, and the contenders that are absent here, with the reason."""
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    wanted = (*EAGER, "compile max-autotune freezing") if kind == "compiled" else (*EAGER, *OURS)
    present, missing = contenders.table(device)
    asked = tuple(name for name in wanted if name in present)
    absent = {name: missing[name] for name in wanted if name not in present}
    suite = "blocks" if kind == "blocks" else "models"
    if dry:
        return program.Options(
            device, out, (suite,), ("resnet18",), (2,), HALVES[:1], 32, "layer1.0" if kind == "blocks" else "", asked,
            repeats=3, seconds=1.0, gate_images=2,
        ), absent  # fmt: skip
    models, batches, dtypes = {
        "networks": (("resnet50",), (32, 1, 256), HALVES),
        "blocks": (("resnet18", "resnet50"), (32,), HALVES[:1]),
        "compiled": (("resnet50",), (32, 1, 256), HALVES),
    }[kind]
    return program.Options(
        device, out, (suite,), models, batches, dtypes, None, "", asked, repeats=10, seconds=6.0, gate_images=8
    ), absent


def run(kind: str, out: Path, dry: bool) -> int:
    """Measure and print; 1 where one of ours is outside the budget, or absent on a GPU."""
    chosen, absent = options(kind, out, dry)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    result = program.execute(chosen, Console(width=200, highlight=False))
    who = "compile max-autotune freezing" if kind == "compiled" else "fused"
    ratios = [found[who] for found in summary.speedups(result.rows).values() if who in found]
    mean = summary.geometric_mean(ratios)
    print(f"figure: {who} {mean:.2f} times the faster eager, {len(ratios)} figures; {result.added} rows added")
    return 0 if result.ok and ratios and (dry or not absent) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.dry_run:  # the way is walked: what a CPU's figures are does not matter
        program.measure_rates = functools.partial(program.measure_rates, size=128)
    if args.dry_run and args.what == "compiled":
        torch.compiler.set_stance("force_eager")  # compiling for a CPU would take a minute
    return run(args.what, args.out, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
