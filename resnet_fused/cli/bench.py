"""``resnet-fused bench MODEL``: eager beside fused, timed in turns, once their numbers have been compared."""

from __future__ import annotations

import argparse
import copy
import functools
import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import resnet_fused
from resnet_fused.cli.common import add_model_options, console, positive, prepare, print_json, steps
from resnet_fused.testing.compare import Verdict, check
from resnet_fused.testing.eager import eager_copy
from resnet_fused.testing.timing import Timing, interleaved

BASELINES = ("eager NCHW", "eager channels_last")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time a fused model beside eager",
        description="Fuse MODEL, compare it with eager, and only when it is within the error budget time both, in "
        "turns, in both memory layouts. Exit code 1, and no times, when it is not.",
    )
    add_model_options(parser, batch=8)
    parser.add_argument("--repeats", type=positive, default=20, help="samples of each (default %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    model, x = prepare(args)
    out = console(quiet=args.json)
    candidates = variants(model, x)
    facts: dict[str, Any] = {
        "model": args.model,
        "input": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    out.print(" · ".join(str(value) for value in facts.values()))
    gate = [
        check(name, "", "", eager_copy(model, like=fused), fused, (image,))
        for name, (fused, image) in candidates.items()
        if name not in BASELINES
    ]
    facts["gate"] = [v.to_dict() for v in gate]
    facts["ok"] = all(v.ok for v in gate)
    if not facts["ok"]:
        if args.json:
            print_json(facts)
        for v in gate:
            if not v.ok:
                out.print(f"FAILED, so nothing is timed: {describe(v)}", style="bold red", markup=False)
        return 1
    timings = time_variants(candidates, args.repeats, out)
    best = min(timings[name].p50 for name in BASELINES)
    facts["milliseconds"] = {name: timing.to_dict() for name, timing in timings.items()}
    facts["speedup"] = {name: best / timing.p50 for name, timing in timings.items()}
    if args.json:
        print_json(facts)
        return 0
    out.print(timing_table(timings, args.batch))
    out.print("\n".join(f"{v.name}: error is {v.error.ratio:.2f} of the budget" for v in gate if v.error is not None))
    return 0


def variants(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Model and input of every candidate: eager and fused, in both layouts."""
    eager, fused = eager_copy(model), resnet_fused.fuse(model)
    last = torch.channels_last

    def turned(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(memory_format=last)  # type: ignore[call-overload, no-any-return]

    return {
        "eager NCHW": (eager, x),
        "eager channels_last": (turned(eager), x.contiguous(memory_format=last)),
        "fused NCHW": (fused, x),
        "fused channels_last": (turned(fused), x.contiguous(memory_format=last)),
    }


def time_variants(
    candidates: dict[str, tuple[nn.Module, Tensor]], repeats: int, out: Console, max_seconds: float = math.inf
) -> dict[str, Timing]:
    """Time each candidate on its own input, in turns."""
    calls = {name: functools.partial(model, image) for name, (model, image) in candidates.items()}
    device = next(iter(candidates.values()))[1].device
    with steps(out, "timing", repeats) as advance:
        return interleaved(calls, device=device, repeats=repeats, max_seconds=max_seconds, progress=advance)


def timing_table(timings: dict[str, Timing], batch: int) -> Table:
    """Milliseconds, images per second, and how many times faster than the faster eager layout."""
    table = Table("", box=None)
    for heading in ("p20 ms", "p50 ms", "p80 ms", "images/s", "speedup"):
        table.add_column(heading, justify="right")
    best = min(timings[name].p50 for name in BASELINES)
    for name, timing in timings.items():
        figures = [f"{1e3 * value:.3f}" for value in (timing.p20, timing.p50, timing.p80)]
        table.add_row(name, *figures, f"{batch / timing.p50:.1f}", f"{best / timing.p50:.2f}x")
    return table


def describe(verdict: Verdict) -> str:
    """One line on why a comparison failed."""
    if verdict.problem is not None or verdict.error is None:
        return f"{verdict.name}: {verdict.problem}"
    error = verdict.error
    return (
        f"{verdict.name}: error is {error.ratio:.3g} of the budget ({error.error:.3g}, eager's {error.eager_error:.3g})"
    )
