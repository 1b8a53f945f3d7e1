"""One case: gate every contender, then time those that passed, in turns, and make the rows."""

from __future__ import annotations

import copy
import datetime
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import roofline
from resnet_fused.ops import packed
from resnet_fused.testing.bench import store
from resnet_fused.testing.bench.cases import Call, Case
from resnet_fused.testing.bench.contenders import Absent, Factory, is_ours, laid_out
from resnet_fused.testing.bench.machine import Machine
from resnet_fused.testing.bench.training_cases import Step
from resnet_fused.testing.budget import measure
from resnet_fused.testing.compare import ComparisonError, flatten
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
    """The result of one case: its rows, none when they were in the file already."""

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
    told: Callable[[str], None] = lambda text: None,
) -> Iterator[Outcome]:
    """Measure the cases one after another and write each one's rows to ``path`` before going on.

    A case whose rows are in the file already, for the same environment and commit, does not run again unless ``fresh``.
    ``told`` is called with the progress within a case.
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
        found = measure_case(case, contenders, machine, rates, plan, told)
        rows = [{**row, **environment, "date": date} for row in found]
        store.append(path, rows)
        yield Outcome(case, rows)


def measure_case(
    case: Case,
    contenders: Mapping[str, Factory],
    machine: Machine,
    rates: roofline.Device,
    plan: Plan,
    told: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """The rows of one case: figures for the contenders that passed the gate, a reason for the others."""
    if "torch._dynamo" in sys.modules:  # its limit of compilations holds per forward function, not per module
        torch.compiler.reset()
    try:
        module, inputs = case.make(machine.device)
        entrants = enter(case, module, inputs, contenders, machine, plan, told)
    except torch.OutOfMemoryError:
        reason = Entrant("absent", note="eager runs out of memory")
        names = [*contenders, *(name + GRAPH for name in contenders if machine.graphs)]
        return [_row(case, name, reason, cache) for name in names for cache in machine.caches]
    cost = case.cost(module, rates)
    del module, inputs
    calls = {name: entrant.call for name, entrant in entrants.items() if entrant.call is not None}
    peaks = {name: _peak(call, machine) for name, call in calls.items() if not name.endswith(GRAPH)}
    rows: list[dict[str, Any]] = []
    for cache in machine.caches:
        told(f"timing, cache {cache}")
        timings = interleaved(
            calls,
            device=machine.device,
            repeats=plan.repeats,
            min_seconds=plan.min_seconds,
            max_seconds=plan.max_seconds,
            sample=machine.sample(cache),
        )
        for name, entrant in entrants.items():
            row = _row(case, name, entrant, cache) | cost
            row |= {"copy_bytes_per_s": rates.bytes_per_s, "matmul_flops_per_s": rates.rate(case.dtype)}
            if name in timings:
                timing = timings[name]
                row |= {f"{key}_ms": value for key, value in timing.to_dict().items()}
                row |= {"samples": len(timing.samples), "roofline_pct": 0.1 * cost["bound_ms"] / timing.p50}
                peak, note = peaks.get(name, (None, ""))
                row |= {"peak_bytes": "" if peak is None else str(peak), "note": note or row["note"]}
            rows.append(row)
    calls.clear()
    entrants.clear()
    gc.collect()  # compiled models and their weights lie in cycles
    return rows


def _row(case: Case, name: str, entrant: Entrant, cache: str) -> dict[str, Any]:
    """A row without figures."""
    return dict.fromkeys(store.COLUMNS, "") | {
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
    }


def _peak(call: Call, machine: Machine) -> tuple[int | None, str]:
    """Memory at its peak, or where that is not counted what a training step keeps for the gradient, and a note on it.

    A graph's memory is its own, taken when it was captured.
    """
    peak = machine.peak_bytes(call)
    if peak is None and isinstance(call, Step):
        return call.kept_bytes(), "memory: kept for the gradient"
    return peak, ""


def enter(
    case: Case,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    contenders: Mapping[str, Factory],
    machine: Machine,
    plan: Plan,
    told: Callable[[str], None] = lambda text: None,
) -> dict[str, Entrant]:
    """Make every contender and compare what it gives, on the very inputs that are timed, with the error budget.

    They are made outside of inference mode, as users make models: parameters born in it count no writes, so nothing
    derived from them may be kept.

    Raises:
        ComparisonError: eager itself fails.
    """
    told("gate")
    gate = _Gate(case, module, inputs, plan.gate_images)

    def guarded(name: str, make: Callable[[], Call], step: Call | None = None) -> Entrant:
        """A baseline that fails is absent; ours that fails is wrong. ``step`` is what a graph was captured of."""
        told(name)
        try:
            call = make()
            for one in (call, step):
                if isinstance(one, Step):
                    one.rewind()
            return gate.admit(call)
        except Absent as reason:
            return Entrant("absent", note=str(reason))
        except torch.OutOfMemoryError:
            return Entrant("absent", note="out of memory")
        except Exception as raised:  # one contender's failure does not end the run; its row reports it
            text = f"raised {type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
            return Entrant("red" if is_ours(name) else "absent", note=text)

    found: dict[str, Entrant] = {}
    for name, factory in contenders.items():
        plain = found[name] = guarded(name, functools.partial(factory, case, module, inputs))
        if machine.graphs:
            call = plain.call
            if call is None:
                found[name + GRAPH] = Entrant("absent", note=f"{name} is {plain.status}")
                continue
            found[name + GRAPH] = guarded(name + GRAPH, functools.partial(machine.graph, call), call)
    return found


class _Gate:
    """Compares contenders with float64, in eager's error in either memory format."""

    def __init__(self, case: Case, module: nn.Module, inputs: tuple[Tensor, ...], images: int | None) -> None:
        # Batch statistics, and gradients by them, depend on every image: in training there is no picking.
        self.some = None if case.training else _picked(case.batch, images)
        layouts = (torch.contiguous_format, torch.channels_last)
        exact = copy.deepcopy(module).double()
        with torch.no_grad():  # a step cannot take what inference mode makes
            few = inputs if self.some is None else tuple(x[self.some] for x in inputs)
            self.reference = _of_eager(case.call(exact, tuple(x.double() for x in few), exact), " in float64")
            eager = []
            for layout in layouts:
                model = laid_out(module, layout)
                for given in (inputs, *([] if case.training else _paired(inputs))):
                    eager.append(_of_eager(case.call(model, laid_out(given, layout), model)))
        self.whole = [torch.empty_like(y, device="meta") for y in eager[0]]
        self.device = eager[0][0].device
        self.eager, *self.others = [self._chosen(outputs) for outputs in eager]

    def _chosen(self, outputs: list[Tensor]) -> list[Tensor]:
        return [y.clone() if self.some is None else y[self.some] for y in outputs]

    def admit(self, call: Call) -> Entrant:
        """The contender that ``call`` is, or why it is none."""
        with torch.inference_mode(), packed.at_once():
            outputs = _outputs(call)
        if len(outputs) != len(self.whole):
            return Entrant("red", note=f"{len(outputs)} tensors, eager's {len(self.whole)}")
        for out, want in zip(outputs, self.whole, strict=True):
            for attribute in ("shape", "dtype"):
                if getattr(out, attribute) != getattr(want, attribute):
                    text = f"{attribute} {getattr(out, attribute)}, eager's {getattr(want, attribute)}"
                    return Entrant("red", note=text)
            if out.device != self.device:
                return Entrant("red", note=f"device {out.device}, eager's {self.device}")
        errors = [
            measure(out, eager, reference, *others)
            for out, eager, reference, *others in zip(
                self._chosen(outputs), self.eager, self.reference, *self.others, strict=True
            )
        ]
        error = max(errors, key=lambda e: e.ratio)
        if error.ok:
            return Entrant("ok", call, error.ratio)
        text = f"error {error.error:.3g}, eager's {error.eager_error:.3g}: {error.ratio:.3g} of the budget"
        return Entrant("red", gate=error.ratio, note=text)


def _of_eager(call: Call, how: str = "") -> list[Tensor]:
    try:
        return _outputs(call)
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:  # a user's model may raise anything
        raise ComparisonError(f"eager raised {type(raised).__name__}{how}: {raised}") from raised


def _outputs(call: Call) -> list[Tensor]:
    """The tensors that a call gives, in their order."""
    found = [tensor for tensor in flatten(call()).values() if tensor.is_floating_point()]
    if not found:
        raise ValueError("gives no tensors to compare")
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
