"""``resnet-fused tune MODEL``: measure every backend on the model's calls, and keep the fastest of each."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from rich.table import Table

import resnet_fused
from resnet_fused import files
from resnet_fused.cli.common import (
    LAYOUTS,
    UserError,
    add_load_option,
    add_model_options,
    console,
    load_plugins,
    positive,
    prepare,
    print_json,
)
from resnet_fused.tuning.tuner import Tuned, check_cache, ship, table_path, tune
from resnet_fused.tuning.verify import Comparison, verify


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure every backend and keep the fastest",
        description="Fuse MODEL and measure, for each distinct op and shape in it, every backend with every launch "
        "config, eager PyTorch in both memory formats among them; what is outside the error budget does not count. "
        "The fastest go to a table in the cache directory ($RESNET_FUSED_CACHE, else ~/.cache/resnet_fused), for this "
        "device, driver and library versions, and on a CPU number of threads; backend='auto' reads it. What is in the "
        "table is not measured again. --verify then measures what 'auto' picks beside eager, twice; exit code 1 where "
        "eager is faster beyond noise both times.",
    )
    add_model_options(parser, batch=8)
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw", help="of the input (default %(default)s)")
    parser.add_argument("--repeats", type=positive, default=20, help="samples of each (default %(default)s)")
    parser.add_argument("--seconds", type=positive, default=5, help="at most this long per call (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the table has")
    parser.add_argument("--verify", action="store_true", help="then compare with eager in both formats, twice")
    parser.add_argument("--ship", type=Path, metavar="FILE", help="also add them to a table for the device alone")
    add_load_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:  # before a model is made, let alone measured
        check_cache()
        if args.ship is not None:
            files.check_writable(args.ship)
    except OSError as error:
        raise UserError(f"the table cannot be written: {error}") from error
    load_plugins(args.load)
    model, x = prepare(args)
    fused = resnet_fused.fuse(model)
    x = x.contiguous(memory_format=LAYOUTS[args.layout])
    out = console(quiet=args.json)

    def told(done: int, total: int, result: Tuned) -> None:
        state = f"{result.speedup:.2f}x eager" if result.measured else "in the table already"
        out.print(f"{done}/{total} {result.key}: {result.choice}, {state}", markup=False)

    def compared(done: int, total: int, result: Comparison) -> None:
        ratios = ", ".join(f"{ratio:.2f}" for ratio in result.ratios)
        out.print(f"{done}/{total} {result.key}: {result.choice}, {ratios}x the faster eager", markup=False)

    path = table_path(x.device)
    comparisons: list[Comparison] = []
    measuring: dict[str, Any] = {"repeats": args.repeats, "max_seconds": args.seconds}
    try:
        results = tune(fused, x, fresh=args.fresh, progress=told, **measuring)
        if args.ship is not None:
            ship(results, x.device, args.ship)
        if args.verify:
            comparisons = verify(fused, x, progress=compared, **measuring)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"the table cannot be written: {error}") from error
    slower = [c for c in comparisons if c.slower]
    if args.json:
        facts: dict[str, Any] = {"table": str(path), "entries": [_entry(result) for result in results]}
        if args.verify:
            facts |= {"ok": not slower, "comparisons": [_comparison(c) for c in comparisons]}
        print_json(facts)
        return 1 if slower else 0
    out.print(tuned_table(results))
    for result in results:
        for name, reason in result.excluded.items():
            out.print(f"left out: {result.key}: {name}: {reason}", style="yellow", markup=False)
    out.print(f"table: {path}", markup=False)
    if args.verify:
        out.print(verified_table(comparisons))
        for c in slower:
            out.print(f"SLOWER than {c.slower}: {c.key}", style="bold red", markup=False)
        out.print(
            f"no slower than eager in either format: {len(comparisons) - len(slower)} of {len(comparisons)} calls"
        )
    return 1 if slower else 0


def _entry(result: Tuned) -> dict[str, Any]:
    return {
        "key": result.key, "choice": result.choice, "speedup": result.speedup, "measured": result.measured,
        "milliseconds": dict(result.entry.milliseconds), "excluded": result.excluded,
    }  # fmt: skip


def _comparison(c: Comparison) -> dict[str, Any]:
    rounds = [{name: timing.to_dict() for name, timing in r.items()} for r in c.rounds]
    return {"key": c.key, "choice": c.choice, "ratios": list(c.ratios), "slower": c.slower, "rounds": rounds}


def verified_table(comparisons: list[Comparison]) -> Table:
    """One line per call: medians in milliseconds and how many times faster than the faster eager format, per round."""
    table = Table("call", "choice", box=None)
    for i in range(len(comparisons[0].rounds)):
        for heading in ("auto ms", "NCHW ms", "channels_last ms", f"× eager, {i + 1}"):
            table.add_column(heading, justify="right")
    for c in comparisons:
        cells = []
        for times, ratio in zip(c.rounds, c.ratios, strict=True):
            cells += [f"{1e3 * timing.p50:.3f}" for timing in times.values()] + [f"{ratio:.2f}"]
        table.add_row(c.key, c.choice, *cells, style="red" if c.slower else "")
    return table


def tuned_table(results: list[Tuned]) -> Table:
    """One line per call: the choice, its median, and how many times faster it is than the faster eager layout."""
    table = Table("call", "choice", box=None)
    for heading in ("p50 ms", "× eager"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(r.key, r.choice, f"{r.entry.milliseconds.get(r.choice, math.nan):.3f}", f"{r.speedup:.2f}")
    return table
