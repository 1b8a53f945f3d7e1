"""Time kernels, blocks and models beside the strongest baselines, after their numbers have been compared.

    python bench/run.py --suite kernels blocks models --device cpu --batch 1 8 --dtype float32 bfloat16

Rows go to bench/results/<device>-<torch>-<cuda>.csv, and only from here; an interrupted run goes on where it stopped.
The exit code is 1 when the gate of one of ours was red.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from resnet_fused import registry, roofline
from resnet_fused.testing.bench import cases, contenders, environment, measure, store, summary
from resnet_fused.testing.bench.machine import Machine, machine_for, measure_rates

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(description: str, suites: Sequence[str], batches: Sequence[int]) -> argparse.ArgumentParser:
    """The options that this program and models.py share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--suite", nargs="+", choices=cases.SUITES, default=list(suites))
    options.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …"
    )
    options.add_argument("--batch", nargs="+", type=int, default=list(batches))
    options.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    options.add_argument("--model", nargs="+", help="torchvision's names (default: those of the suite)")
    options.add_argument("--size", type=int, default=224, help="height and width of the images")
    options.add_argument("--case", help="only cases whose id contains this text")
    options.add_argument("--contender", nargs="+", help="only these (names as in the tables)")
    options.add_argument("--load", action="append", default=[], help="import first: a FILE.py or MODULE with backends")
    options.add_argument("--compile", action="store_true", help="torch.compile too; it builds for minutes")
    options.add_argument("--repeats", type=int, default=20, help="samples per contender")
    options.add_argument("--seconds", type=float, default=60.0, help="no case samples for longer than this")
    options.add_argument("--gate-images", type=int, help="images per batch compared with float64 (default: 4 on a CPU)")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options.add_argument("--fresh", action="store_true", help="measure again what the file has already")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return execute(parser(__doc__ or "", ("blocks", "models"), (1, 8)).parse_args(argv))


def execute(args: argparse.Namespace, machine: Machine | None = None) -> int:
    """Run what the options ask for and print the tables."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for plugin in args.load:
        registry.load(plugin)
    device = torch.device(args.device)
    machine = machine or machine_for(device)
    present, absent = contenders.table(device, compiled=args.compile)
    if args.contender:
        unknown = [name for name in args.contender if name not in present]
        if unknown:
            reasons = "; ".join(f"{name}: {absent.get(name, 'unknown')}" for name in unknown)
            out.print(f"--contender: {reasons}. Here are: {', '.join(present)}", style="red", markup=False)
            return 2
        present = {name: present[name] for name in args.contender}
        absent = {}
    dtypes = [DTYPES[name] for name in args.dtype]
    wanted = [
        case
        for suite in args.suite
        for case in cases.cases(suite, batches=args.batch, dtypes=dtypes, models=args.model, size=args.size)
        if not args.case or args.case in case.id
    ]
    facts = environment.describe(device)
    path = store.path_for(args.results, facts)
    out.print(" · ".join(f"{key} {value}" for key, value in facts.items() if value), markup=False)
    for name, reason in absent.items():
        out.print(f"absent: {name}: {reason}", style="dim", markup=False)
    rates = measure_rates(machine, facts["device"], tuple(dtypes))
    out.print(_rates(rates), markup=False)
    default_images = 4 if device.type == "cpu" else None
    plan = measure.Plan(args.repeats, max_seconds=args.seconds, gate_images=args.gate_images or default_images)
    rows = _measure(wanted, present, machine, rates, facts, path, plan, args.fresh, out)
    return _report(rows, wanted, machine, facts, path, out)


def _measure(wanted, present, machine, rates, facts, path, plan, fresh, out) -> list[dict]:
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    rows: list[dict] = []
    with Progress(*columns, console=out, disable=not out.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=len(wanted))
        for outcome in measure.run(wanted, present, machine, rates, facts, path, plan=plan, fresh=fresh):
            rows += outcome.rows
            progress.update(task, advance=1, description=outcome.case.id)
            if not out.is_terminal:
                state = "in the file already" if outcome.resumed else f"{len(outcome.rows)} rows"
                out.print(f"{outcome.case.suite}: {outcome.case.id}: {state}", markup=False)
            for row in outcome.rows:
                if row["status"] == "red":
                    out.print(
                        f"RED, not timed: {row['case']} {row['contender']}: {row['note']}", style="red", markup=False
                    )
    return rows


def _report(rows, wanted, machine, facts, path, out) -> int:
    """Tables of all the cases asked for, those that an earlier run had measured included."""
    ids = {(case.suite, case.id) for case in wanted}
    known, problems = store.read(path) if path.exists() else ([], [])
    here = [row for row in known if all(row[key] == facts[key] for key in store.ENVIRONMENT)]
    chosen = [row for row in store.latest(here) if (row["suite"], row["case"]) in ids]
    names = list(dict.fromkeys(row["contender"] for row in chosen if row["status"] != "absent"))
    for suite in dict.fromkeys(suite for suite, _ in ids):
        for cache in machine.caches:
            out.print(summary.table([row for row in chosen if row["suite"] == suite], names, cache))
    for problem in problems:
        out.print(problem, style="yellow", markup=False)
    out.print(f"{path}: {len(rows)} rows added", markup=False)
    return 1 if any(row["status"] == "red" and contenders.is_ours(row["contender"]) for row in chosen) else 0


def _rates(rates: roofline.Device) -> str:
    products = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {str(d).removeprefix('torch.')}" for d, rate in rates.flops_per_s.items()
    )
    return f"roofline, measured now: copy {rates.bytes_per_s / 1e9:.1f} GB/s, matrix product {products}"


if __name__ == "__main__":
    sys.exit(main())
