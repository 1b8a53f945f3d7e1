"""A run of the benchmark: the chosen cases, measured one by one into the results file, and printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from resnet_fused import roofline
from resnet_fused.testing.bench import contenders, environment, measure, store, suites, summary
from resnet_fused.testing.bench.cases import Case
from resnet_fused.testing.bench.machine import Machine, machine_for, measure_rates


@dataclass(frozen=True)
class Options:
    """What to measure. ``contender`` names contenders or groups of them; empty for all but those that are compiled,
    which ``compiled`` adds. ``case`` is a text that ids must contain. ``results`` is the folder of the CSV files."""

    device: torch.device
    results: Path
    suites: Sequence[str] = ("models",)
    models: Sequence[str] | None = None
    batches: Sequence[int] = (8,)
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    size: int | None = None
    case: str = ""
    contender: Sequence[str] = ()
    compiled: bool = False
    repeats: int = 20
    seconds: float = 60.0
    gate_images: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Result:
    """The rows of every chosen case, an earlier run's included; how many are new, and the file that they are in."""

    rows: list[store.Row]
    added: int
    path: Path

    @property
    def ok(self) -> bool:
        """Whether the gate of all of ours was green."""
        return not any(row["status"] == "red" and contenders.is_ours(row["contender"]) for row in self.rows)


def execute(options: Options, out: Console, machine: Machine | None = None) -> Result:
    """Measure what the options ask for, write it, and print the tables.

    Raises:
        ValueError: there is no such contender or suite, or no case is left.
        ModelError: there is no such model.
    """
    with environment.pinned(options.device):
        return _execute(options, out, machine)


def _execute(options: Options, out: Console, machine: Machine | None) -> Result:
    device = options.device
    machine = machine or machine_for(device)
    present, absent = contenders.choose(device, options.contender, compiled=options.compiled)
    wanted = [
        case
        for suite in options.suites
        for case in suites.cases(
            suite, batches=options.batches, dtypes=options.dtypes, models=options.models, size=options.size
        )
        if options.case in case.id
    ]
    if not wanted:
        raise ValueError(f"no case of {', '.join(options.suites)} has {options.case!r} in its name")
    facts = environment.describe(device)
    path = store.path_for(options.results, facts)
    out.print(" · ".join(f"{key} {value}" for key, value in facts.items() if value), markup=False)
    for name, reason in absent.items():
        out.print(f"absent: {name}: {reason}", style="dim", markup=False)
    rates = measure_rates(machine, facts["device"], tuple(options.dtypes))
    out.print(_rates(rates), markup=False)
    images = options.gate_images or (4 if device.type == "cpu" else None)
    plan = measure.Plan(options.repeats, max_seconds=options.seconds, gate_images=images)
    added = 0
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=out, disable=not out.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=len(wanted))

        def told(text: str) -> None:
            progress.update(task, description=text)

        steps = measure.run(wanted, present, machine, rates, facts, path, plan=plan, fresh=options.fresh, told=told)
        for outcome in steps:
            added += len(outcome.rows)
            progress.update(task, advance=1, description=outcome.case.id)
            _tell(outcome, out)
    return _report(wanted, {*present, *(name + measure.GRAPH for name in present)}, machine, facts, path, added, out)


def _tell(outcome: measure.Outcome, out: Console) -> None:
    """Print a line where no bar shows, the red contenders, and the unsupported ones."""
    if not out.is_terminal:
        state = "in the file already" if outcome.resumed else f"{len(outcome.rows)} rows"
        out.print(f"{outcome.case.suite}: {outcome.case.id}: {state}", markup=False)
    for row in outcome.rows:
        if row["status"] == "red":
            out.print(f"RED, not timed: {row['case']} {row['contender']}: {row['note']}", style="red", markup=False)


def _report(
    wanted: Sequence[Case], who: set[str], machine: Machine, facts: dict[str, str], path: Path, added: int, out: Console
) -> Result:
    ids = {(case.suite, case.id) for case in wanted}
    known, problems = store.read(path)
    here = [row for row in known if all(row[key] == facts[key] for key in store.ENVIRONMENT)]
    chosen = [row for row in store.latest(here) if (row["suite"], row["case"]) in ids and row["contender"] in who]
    for suite in dict.fromkeys(case.suite for case in wanted):
        rows = [row for row in chosen if row["suite"] == suite]
        names = list(dict.fromkeys(row["contender"] for row in rows if row["status"] != "absent"))
        for cache in machine.caches:
            out.print(summary.table(rows, names, cache))
        if summary.fits(names) and any(row["peak_bytes"] for row in rows):
            out.print(summary.memory(rows, names))
    for line in summary.left_out(chosen):
        out.print(line, style="dim", markup=False)
    for problem in problems:
        out.print(problem, style="yellow", markup=False)
    out.print(f"{path}: {added} rows added", markup=False)
    return Result(chosen, added, path)


def _rates(rates: roofline.Device) -> str:
    products = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {str(d).removeprefix('torch.')}" for d, rate in rates.flops_per_s.items()
    )
    return f"roofline, measured now: copy {rates.bytes_per_s / 1e9:.1f} GB/s, matrix product {products}"
