"""``resnet-fused families``: every known family of models, fused and compared with eager: the support table."""

from __future__ import annotations

import argparse
from typing import Any

from resnet_fused.cli.common import add_json_option, console, positive, print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "families",
        help="fuse and check every known family of models",
        description="Make the models of each family with random weights, fuse them, and compare every output with "
        "eager's in float64 budgets. Prints the support table as Markdown: blocks fused, blocks left alone by reason, "
        "the worst error over its budget. Exit code 1 when a model is outside its budget, or its keys or its outputs "
        "after unfuse are not eager's. Families whose packages are missing are said to be.",
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="part of a family's name (default: all families)")
    parser.add_argument("--limit", type=positive, help="at most this many models of each family")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from resnet_fused.cli.common import UserError
    from resnet_fused.testing.families import markdown, survey
    from resnet_fused.testing.family_models import FAMILIES

    wanted = [part.lower() for part in args.families]
    names = [name for name in FAMILIES if not wanted or any(part in name.lower() for part in wanted)]
    if not names:
        raise UserError(f"no family is called {' or '.join(args.families)}; there are: {', '.join(FAMILIES)}")
    out = console(quiet=args.json)
    rows = {}
    for row, candidate in survey(names, args.limit):
        rows[row.family] = row
        if out.is_terminal and candidate is not None:
            out.print(f"{row.family}: {candidate.name}", markup=False)
    problems = [problem for row in rows.values() for problem in row.problems]
    if args.json:
        print_json({"ok": not problems, "families": [row.to_dict() for row in rows.values()]})
    else:
        print(markdown(rows.values()))
        print(f"\n{sum(row.models for row in rows.values())} models in {sum(r.seconds for r in rows.values()):.0f} s")
        for problem in problems:
            print(f"FAILED: {problem}")
    return 1 if problems else 0
