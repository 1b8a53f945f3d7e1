"""``resnet-fused check MODEL``: the fused model against eager, block by block and end to end, in float64 budgets."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

import resnet_fused
from resnet_fused import backends
from resnet_fused.cli.common import LAYOUTS, add_model_options, check_backend, console, prepare, print_json
from resnet_fused.testing.compare import Verdict, check, fused_parts
from resnet_fused.testing.eager import eager_copy


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="compare a fused model with eager, block by block",
        description="Fuse MODEL and compare it with eager, block by block (each fed what eager feeds it) and end to "
        "end. The error against a float64 run may be twice eager's own plus one rounding step; shapes, dtypes and "
        "strides must agree. Exit code 1 when something does not.",
    )
    add_model_options(parser, batch=2)
    parser.add_argument(
        "--backend", choices=(backends.AUTO, *backends.NAMES), default=backends.AUTO, help="who computes (%(choices)s)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw", help="of the input (default %(default)s)")
    parser.add_argument("--keep-statistics", action="store_true", help="leave the batch norms as the model has them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    backend = check_backend(args.backend)
    model, x = prepare(args, keep_statistics=args.keep_statistics)
    fused = resnet_fused.fuse(model, backend=backend)
    eager = eager_copy(model, channels_last=resnet_fused.is_fused(fused))
    x = x.contiguous(memory_format=LAYOUTS[args.layout])
    verdicts = [
        check(part.name, part.kind, part.backend, part.eager, part.fused, part.inputs)
        for part in fused_parts(eager, fused, x)
    ]
    verdicts.append(check("(whole model)", type(model).__name__, "", eager, fused, (x,)))
    skipped = resnet_fused.report(fused).skipped
    ok = all(v.ok for v in verdicts)
    if args.json:
        print_json(
            {
                "model": args.model,
                "input": list(x.shape),
                "dtype": str(x.dtype).removeprefix("torch."),
                "device": str(x.device),
                "ok": ok,
                "verdicts": [v.to_dict() for v in verdicts],
                "skipped": [{"name": e.name, "kind": e.kind, "reason": e.reason} for e in skipped],
            }
        )
        return 0 if ok else 1
    out = console()
    out.print(f"{args.model}, {tuple(x.shape)}, {x.dtype}, {x.device}".replace("torch.", ""))
    out.print(verdict_table(verdicts))
    for entry in skipped:
        out.print(f"left alone: {entry.name} ({entry.kind}): {entry.reason}", markup=False)
    bad = [v for v in verdicts if not v.ok]
    fused_count = len(verdicts) - 1
    if bad:
        out.print(f"FAILED: {', '.join(v.name for v in bad)}", style="bold red", markup=False)
    elif not fused_count:
        out.print("nothing was fused: the model is what it was", style="yellow")
    else:
        out.print(f"{fused_count} fused parts and the whole model are within the budget", style="green")
    return 0 if ok else 1


def verdict_table(verdicts: list[Verdict]) -> Table:
    """Verdicts as a rich table."""
    table = Table("block", "kind", "backend", box=None)
    table.add_column("error / budget", justify="right")
    table.add_column("error", justify="right")
    table.add_column("eager's", justify="right")
    table.add_column("verdict")
    for v in verdicts:
        figures = ("", "", "")
        if v.error is not None:
            figures = (f"{v.error.ratio:.3f}", f"{v.error.error:.2e}", f"{v.error.eager_error:.2e}")
        text = "ok" if v.ok else v.problem or "outside the budget"
        table.add_row(v.name, v.kind, v.backend, *figures, text, style=None if v.ok else "red")
    return table
