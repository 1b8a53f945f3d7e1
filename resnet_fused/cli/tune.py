"""``resnet-fused tune MODEL``: measure every backend on the model's calls, and keep the fastest of each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

import resnet_fused
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
from resnet_fused.tuning.tuner import Tuned, ship, table_path, tune


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure every backend and keep the fastest",
        description="Fuse MODEL and measure, for each distinct op and shape in it, every backend with every launch "
        "config, eager PyTorch in both memory formats among them; what is outside the error budget does not count. "
        "The fastest go to a table in the cache directory ($RESNET_FUSED_CACHE, else ~/.cache/resnet_fused), for this "
        "device, driver and library versions; backend='auto' reads it. What is in the table is not measured again.",
    )
    add_model_options(parser, batch=8)
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw", help="of the input (default %(default)s)")
    parser.add_argument("--repeats", type=positive, default=20, help="samples of each (default %(default)s)")
    parser.add_argument("--seconds", type=positive, default=5, help="at most this long per call (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the table has")
    parser.add_argument("--ship", type=Path, metavar="FILE", help="also add them to a table for the device alone")
    add_load_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    load_plugins(args.load)
    model, x = prepare(args)
    fused = resnet_fused.fuse(model)
    x = x.contiguous(memory_format=LAYOUTS[args.layout])
    out = console(quiet=args.json)

    def told(done: int, total: int, result: Tuned) -> None:
        state = f"{result.speedup:.2f}x eager" if result.measured else "in the table already"
        out.print(f"{done}/{total} {result.key}: {result.choice}, {state}", markup=False)

    path = table_path(x.device)
    try:
        results = tune(fused, x, fresh=args.fresh, repeats=args.repeats, max_seconds=args.seconds, progress=told)
        if args.ship is not None:
            ship(results, x.device, args.ship)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"the table cannot be written: {error}") from error
    if args.json:
        entries = [
            {
                "key": r.key, "choice": r.choice, "speedup": r.speedup, "measured": r.measured,
                "milliseconds": dict(r.entry.milliseconds), "excluded": r.excluded,
            }
            for r in results
        ]  # fmt: skip
        print_json({"table": str(path), "entries": entries})
        return 0
    out.print(tuned_table(results))
    for result in results:
        for name, reason in result.excluded.items():
            out.print(f"left out: {result.key}: {name}: {reason}", style="yellow", markup=False)
    out.print(f"table: {path}", markup=False)
    return 0


def tuned_table(results: list[Tuned]) -> Table:
    """One line per call: the choice, its median, and how many times faster it is than the faster eager layout."""
    table = Table("call", "choice", box=None)
    for heading in ("p50 ms", "× eager"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(r.key, r.choice, f"{r.entry.milliseconds[r.choice]:.3f}", f"{r.speedup:.2f}")
    return table
