"""``resnet-fused bench``: kernels, blocks, models and training steps, compared with the strongest baselines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnet_fused.cli.common import (
    DTYPES,
    UserError,
    add_json_option,
    add_load_option,
    console,
    load_plugins,
    pick_device,
    positive,
    print_json,
)
from resnet_fused.testing import models

SUITES = ("kernels", "blocks", "models", "training")  # testing.bench.suites has them; it is imported on use


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time kernels, blocks and models beside the strongest baselines",
        description="Compare every contender with float64 and time those within the error budget, in turns: eager in "
        "both memory formats, batch norm folded, torch.compile, on a CPU ONNX Runtime and OpenVINO, and ours. Rows go "
        "to one CSV file per device; an interrupted run goes on where it stopped. Exit code 1 when one of ours is "
        "outside the budget.",
    )
    help = f"{models.FORMS}; a bare name is torchvision's where that is installed (default: those of the suite)"
    parser.add_argument("model", nargs="*", metavar="MODEL", help=help)
    parser.add_argument("--model", nargs="+", dest="more", default=[], metavar="MODEL", help="the same")
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="(default: models where MODEL is named, else all)")
    parser.add_argument("--batch", nargs="+", type=positive, default=[8], help="images per batch (default 8)")
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=["float32"], metavar="DTYPE",
                        help=" | ".join(DTYPES))  # fmt: skip
    parser.add_argument("--size", type=positive, help="height and width of an image (default: the model's own)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose id contains this text")
    parser.add_argument(
        "--contender", nargs="+", default=[], metavar="NAME",
        help="only these: names as in the tables, or eager, peers, compiled for several (default: all but compiled)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile too; it builds for minutes")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: CUDA where there is one)")
    parser.add_argument("--repeats", type=positive, default=20, help="samples per contender (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="no case samples for longer (default %(default)s)")
    parser.add_argument("--gate-images", type=positive, help="images per batch that are compared (default: 4 on a CPU)")
    parser.add_argument("--results", type=Path, default=Path("out/bench"), help="folder of the CSV (default out/bench)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has already")
    add_load_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from resnet_fused.testing.bench import program

    load_plugins(args.load)
    names = [*args.model, *args.more]
    options = program.Options(
        pick_device(args.device),
        args.results,
        args.suite or (("models",) if names else SUITES),
        names or None,
        args.batch,
        tuple(dict.fromkeys(DTYPES[name] for name in args.dtype)),
        args.size,
        args.case,
        args.contender,
        args.compile,
        args.repeats,
        args.seconds,
        args.gate_images,
        args.fresh,
    )
    try:
        result = program.execute(options, console(quiet=args.json))
    except models.ModelError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if args.json:
        print_json({"ok": result.ok, "file": str(result.path), "added": result.added, "rows": result.rows})
    return 0 if result.ok else 1
