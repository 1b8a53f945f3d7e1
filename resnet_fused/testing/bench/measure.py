"""One case: gate every contender, then time those that passed, in turns, and make the rows."""

from __future__ import annotations

import copy
import datetime
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import roofline
from resnet_fused.testing.bench import store
from resnet_fused.testing.bench.cases import Case
from resnet_fused.testing.bench.contenders import Absent, Call, Factory, is_ours, laid_out
from resnet_fused.testing.bench.machine import Machine
from resnet_fused.testing.budget import measure
from resnet_fused.testing.timing import interleaved

GRAPH = " + graph"


@dataclass(frozen=True)
class Plan:
    """How figures are taken.

    repeats: samples per contender. min_seconds: least duration of a sample. max_seconds: a case begins no new round
    after this long, once there are three. gate_images: how many images of a batch are compared with float64, the first
    and the last among them; None for all.
    """

    repeats: int = 20
    min_seconds: float = 2e-3
    max_seconds: float = 60.0
    gate_images: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one case: its rows, none when they were in the file already."""

    case: Case
    rows: list[dict[str, Any]]
    resumed: bool = False


@dataclass(frozen=True)
class Entrant:
    """A contender in one case. Without ``call`` it is not timed, and ``note`` says why."""

    status: str
    call: Call | None = None
    gate: float | None = None
    note: str = ""


def run(
    cases: Sequence[Case],
    contenders: Mapping[str, Factory],
    machine: Machine,
    rates: roofline.Device,
    environment: Mapping[str, str],
    path: Path,
    *,
    plan: Plan | None = None,
    fresh: bool = False,
) -> Iterator[Outcome]:
    """Measure the cases one after another and write each one's rows to ``path`` before going on.

    A case whose rows are in the file already, for the same environment and commit, does not run again unless ``fresh``.
    """
    plan = plan or Plan()
    done = set() if fresh else store.measured(path)
    names = [*contenders, *(name + GRAPH for name in contenders if machine.graphs)]
    for case in cases:
        keys = ((case.suite, case.id, name, cache) for name in names for cache in machine.caches)
        if all(store.identity(dict(zip(store.IDENTITY, key, strict=True)), environment) in done for key in keys):
            yield Outcome(case, [], resumed=True)
            continue
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows = [{**row, **environment, "date": date} for row in measure_case(case, contenders, machine, rates, plan)]
        store.append(path, rows)
        yield Outcome(case, rows)


def measure_case(
    case: Case, contenders: Mapping[str, Factory], machine: Machine, rates: roofline.Device, plan: Plan
) -> list[dict[str, Any]]:
    """The rows of one case: figures for whoever passed the gate, a reason for the others."""
    if "torch._dynamo" in sys.modules:  # its limit of compilations holds per forward function, not per module
        torch.compiler.reset()
    module, inputs = case.make(machine.device)
    entrants = enter(case, module, inputs, contenders, machine, plan)
    calls = {name: entrant.call for name, entrant in entrants.items() if entrant.call is not None}
    counts = roofline.count(module, *case.shapes)[case.level]
    bound = counts.bound(rates, case.dtype)
    rows: list[dict[str, Any]] = []
    # A graph's memory is its own, taken when it was captured.
    peaks = {name: machine.peak_bytes(call) for name, call in calls.items() if not name.endswith(GRAPH)}
    for cache in machine.caches:
        timings = interleaved(
            calls,
            device=machine.device,
            repeats=plan.repeats,
            min_seconds=plan.min_seconds,
            max_seconds=plan.max_seconds,
            sample=machine.sample(cache),
        )
        for name, entrant in entrants.items():
            row = dict.fromkeys(store.COLUMNS, "") | {
                "suite": case.suite,
                "case": case.id,
                "contender": name,
                "cache": cache,
                "status": entrant.status,
                "note": entrant.note,
                "model": case.model,
                "batch": case.batch,
                "dtype": str(case.dtype).removeprefix("torch."),
                "shape": "x".join(map(str, case.shapes[0])),
                "gate": "" if entrant.gate is None else entrant.gate,
                "flops": counts.flops,
                "bytes": counts.nbytes(case.dtype),
                "bound_ms": 1e3 * bound.seconds,
                "copy_bytes_per_s": rates.bytes_per_s,
                "matmul_flops_per_s": rates.rate(case.dtype),
            }
            if name in timings:
                timing = timings[name]
                row |= {f"{key}_ms": value for key, value in timing.to_dict().items()}
                peak = peaks.get(name)
                row |= {"peak_bytes": "" if peak is None else str(peak)}
                row |= {"samples": len(timing.samples), "roofline_pct": 100 * bound.seconds / timing.p50}
            rows.append(row)
    return rows


def enter(
    case: Case,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    contenders: Mapping[str, Factory],
    machine: Machine,
    plan: Plan,
) -> dict[str, Entrant]:
    """Make every contender and compare what it gives, on the very inputs that are timed, with the error budget.

    They are made outside of inference mode, as users make models: parameters born in it count no writes, so nothing
    derived from them may be kept.
    """
    some = _picked(case.batch, plan.gate_images)
    layouts = (torch.contiguous_format, torch.channels_last)
    models = [copy.deepcopy(module).double(), *(laid_out(module, layout) for layout in layouts)]
    with torch.inference_mode():
        reference = models[0](*(x[some].double() for x in inputs))
        eager, *others = (
            model(*laid_out(given, layout))[: case.batch]
            for given in (inputs, *_paired(inputs))
            for model, layout in zip(models[1:], layouts, strict=True)
        )
    del models

    def admit(name: str, call: Call) -> Entrant:
        with torch.inference_mode():
            out = call()
        for attribute in ("shape", "dtype", "device"):
            got, want = getattr(out, attribute), getattr(eager, attribute)
            if got != want:
                return Entrant("red", note=f"{attribute} {got}, eager's {want}")
        error = measure(out[some], eager[some], reference, *(other[some] for other in others))
        if error.ok:
            return Entrant("ok", call, error.ratio)
        text = f"error {error.error:.3g}, eager's {error.eager_error:.3g}: {error.ratio:.3g} of the budget"
        return Entrant("red", gate=error.ratio, note=text)

    def guarded(name: str, make: Any) -> Entrant:
        """A baseline that fails is absent; ours that fails is wrong."""
        try:
            return admit(name, make())
        except Absent as reason:
            return Entrant("absent", note=str(reason))
        except Exception as raised:  # one contender's failure does not end the run; it is told in its row
            text = f"raised {type(raised).__name__}: {str(raised)[:300]}"
            return Entrant("red" if is_ours(name) else "absent", note=text)

    found: dict[str, Entrant] = {}
    for name, factory in contenders.items():
        plain = found[name] = guarded(name, lambda factory=factory: factory(case, module, inputs))
        if machine.graphs:
            call = plain.call
            if call is None:
                found[name + GRAPH] = Entrant("absent", note=f"{name} is {plain.status}")
            else:
                found[name + GRAPH] = guarded(name, lambda call=call: machine.graph(call))
    return found


def _paired(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """One image twice: for one alone eager may sum in another order, and both are its error. Nothing for more."""
    return [tuple(torch.cat([x, x]) for x in inputs)] if inputs[0].shape[0] == 1 else []


def _picked(batch: int, images: int | None) -> list[int]:
    """Places in the batch, evenly between the first and the last."""
    if images is None or images >= batch:
        return list(range(batch))
    if images < 2:
        return [batch - 1]
    return sorted({round(i * (batch - 1) / (images - 1)) for i in range(images)})
