"""``python tools/gpu_first [--part 1|2|3] [--only a,b] [--list] [--dry-run] [--out FOLDER]``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_first import runner
from gpu_first.steps import PARTS, STEPS, Context


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_first",
        description="Build, check, test and measure on a machine with a GPU and no network. A step that fails or takes "
        "too long does not stop the others. Exit code 1 when one did. Files: summary.txt, log.txt, versions.json, "
        "kernels.csv, rates.csv, ncu.csv and the harness's CSV.",
    )
    parser.add_argument("--part", type=int, choices=PARTS, help="the steps of one run of ten minutes (default: all)")
    parser.add_argument("--only", default="", metavar="NAME,…", help="only these steps")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, the CPU standing in for the GPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu_first"), metavar="FOLDER",
                        help="(default: $OUT, else out/gpu_first)")  # fmt: skip
    args = parser.parse_args(argv)
    names = [name for name in args.only.split(",") if name]
    unknown = [name for name in names if name not in {step.name for step in STEPS}]
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}, need some of {', '.join(step.name for step in STEPS)}")
    chosen = [step for step in STEPS if (step.name in names if names else args.part is None or args.part in step.parts)]
    context = Context(args.out.resolve(), args.dry_run)
    if args.list:
        print(runner.listing(chosen, context))
        return 0
    if not args.dry_run and not _device_present():
        print("gpu_first: no CUDA device; --dry-run lets the CPU stand in", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a step ends with this program
    return runner.run(chosen, context)


def _device_present() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
