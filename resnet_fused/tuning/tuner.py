"""Measure every backend on the calls that a model makes, and keep the fastest of each in the user's table."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import backends, files, registry
from resnet_fused.modules.warmup import warmup
from resnet_fused.ops import block, packed
from resnet_fused.ops.block import BlockCall, run_chain
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.ops.layout import with_strides
from resnet_fused.testing.budget import measure
from resnet_fused.testing.timing import Sample, Timing, interleaved
from resnet_fused.tuning import environment, layouts, lookup, table
from resnet_fused.tuning.table import Entry

EAGER = backends.Backend.REFERENCE.value
MARGIN = 0.02  # a median nearer than this to another is no win: repeated runs differ by as much
_INPUTS = ("x", "a", "b", "residual", "identity")

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Tuned:
    """The result for one call: the table's entry, and why candidates were left out of the comparison.

    ``measured`` is False where the table had the entry already.
    """

    key: str
    entry: Entry
    excluded: dict[str, str] = field(default_factory=dict)
    measured: bool = True

    @property
    def choice(self) -> str:
        """The fastest: a backend, with its config if it has any."""
        return label(self.entry)

    @property
    def speedup(self) -> float:
        """How many times faster than the faster of eager's layouts; NaN where one of both was not timed."""
        times = self.entry.milliseconds
        eager = min((time for name, time in times.items() if name.split(" ")[0] == EAGER), default=math.nan)
        own = times.get(self.choice, math.nan)
        return eager / own if own else math.nan


def label(entry: Entry) -> str:
    """``triton ['pointer', 128, …]``: what a candidate is called."""
    return entry.backend if entry.config is None else f"{entry.backend} {entry.config}"


def tune(
    model: nn.Module,
    *inputs: Any,
    fresh: bool = False,
    repeats: int = 20,
    max_seconds: float = 5.0,
    sample: Sample | None = None,
    progress: Callable[[int, int, Tuned], None] | None = None,
) -> list[Tuned]:
    """Measure all that can serve each distinct call of ``model(*inputs)``, and write the user's table.

    The calls are those of the fused parts, once per op and shapes; the tensors that are timed are random, with the
    model's own weights. A candidate whose error is outside of the budget, or that raises, is left out. The fastest
    wins that beats the static rule's choice beyond noise (:func:`beats`), eager PyTorch in either memory format being
    among the candidates; else that choice stays. ``backend="auto"`` follows the table from then on, in this process and
    in later ones. On a CPU each number of threads has a table of its own: at another one the static rule holds until
    it is tuned too.

    Args:
        model: a fused model in eval mode.
        inputs: what it is called with: shapes, dtype, memory format and device are what is tuned for.
        fresh: measure again what the table has already; else only where a registered backend has come since.
        repeats, max_seconds: samples of each candidate, and how long one call may take them.
        sample: takes one sample, in place of the device's clock, see testing.timing.
        progress: called with the number done, the number of all, and each result.

    Raises:
        ValueError: no fused op ran.
        OSError: the table cannot be written; raised before anything is measured.
    """
    check_cache()
    calls = record(model, *inputs)
    if not calls:
        raise ValueError("model: no fused op ran on this input; fuse it, and call .eval() before tuning")
    device = next(iter(calls.values()))[1][0].device
    facts = environment.describe(device)
    path = environment.path_for(facts)
    table.check_writable(path)  # now rather than after the first call was measured
    known = {} if fresh else table.load(path, facts)
    results = []
    try:
        for done, (key, (op, call)) in enumerate(calls.items(), 1):
            if key in known and not _has_new(op, call, known[key]):
                result = Tuned(key, known[key], measured=False)
            else:
                result = tune_call(op, call, repeats=repeats, max_seconds=max_seconds, sample=sample)
                table.merge(path, facts, {key: result.entry})
                lookup.forget()  # a block's chain is measured with its convolutions as just chosen
            results.append(result)
            if progress is not None:
                progress(done, len(calls), result)
    finally:
        lookup.forget()
    return results


def check_cache() -> None:
    """See that tables can be written in the cache directory, which is made.

    Raises:
        OSError: they cannot.
    """
    files.check_writable(environment.path_for({"device": "check"}))


def table_path(device: torch.device) -> Path:
    """Where the user's table for this device lies."""
    return environment.path_for(environment.describe(device))


def ship(results: Sequence[Tuned], device: torch.device, path: Path) -> None:
    """Add results to a table that holds for every driver and library version: one to ship in resnet_fused/tuning."""
    bound = environment.device_alone(environment.describe(device))
    table.merge(path, bound, {result.key: result.entry for result in results})


def record(model: nn.Module, *inputs: Any, tuned: bool = False) -> dict[str, tuple[str, Any]]:
    """The op and call behind each distinct key of ``model(*inputs)``: first single ops, then blocks. Inputs of the
    calls are random.

    With the convolutions of every block, or where ``tuned`` with those alone that run by themselves, as the tables say.
    """
    singles: dict[str, tuple[str, Any]] = {}
    blocks: dict[str, tuple[str, Any]] = {}

    def keep(op: str, call: Any) -> None:
        found = blocks if isinstance(call, BlockCall) else singles
        key = lookup.key(op, call)
        if key is None or key in found:
            return
        found[key] = (op, _detached(call))

    with lookup.recording(keep, read=tuned):
        warmup(model, *inputs)
        with torch.no_grad():
            for _, call in () if tuned else list(blocks.values()):
                run_chain(call, lambda c: _kept(c, keep))
    return singles | blocks


def _kept(call: ConvBNActCall, keep: Callable[[str, Any], None]) -> Tensor:
    keep("conv_bn_act", call)
    return reference.run(call)


def _detached(call: Any) -> Any:
    """The call with inputs of its own: those of the model are written over by what comes after."""

    def random(like: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return like.new_empty_strided(like.shape, like.stride()).normal_()

    with torch.random.fork_rng([call[0].device.index or 0] if call[0].is_cuda else []):
        torch.manual_seed(0)
        return _with_inputs(call, random)


def _with_inputs(call: Any, change: Callable[[Tensor], Tensor]) -> Any:
    inputs = {name: getattr(call, name) for name in _INPUTS if getattr(call, name, None) is not None}
    return call._replace(**{name: change(tensor) for name, tensor in inputs.items()})


def candidates(op: str, call: Any) -> list[Entry]:
    """All that can serve the call, in the order in which equal ones are taken: the static rule's choice first."""
    found = []
    for name in backends.all_names():
        if name == EAGER and isinstance(call, BlockCall):
            found.append(Entry(EAGER))
        elif backends.refusal(op, name, call) is None:
            found.append(Entry(name))
            configs = getattr(backends.implementation(op, name), "configs", lambda call: ())
            found += [Entry(name, lookup.plain(config)) for config in configs(call)]
    if isinstance(call, (ConvBNActCall, BlockCall)):
        found += [Entry(EAGER, layout) for layout in layouts.configs(call)]
    if isinstance(call, BlockCall):
        found.append(Entry(lookup.CHAIN))
    order = _static(op, call)
    return sorted(found, key=lambda entry: order.index(entry.backend) if entry.backend in order else len(order))


def _static(op: str, call: Any) -> tuple[str, ...]:
    if isinstance(call, BlockCall):
        return ("cpu", "onednn", lookup.CHAIN) if call.x.device.type == "cpu" else (lookup.CHAIN,)
    api = importlib.import_module(f"resnet_fused.ops.{op}.api")
    arguments = (call.x, call.conv) if isinstance(call, ConvBNActCall) else (call.a,)
    return api.candidates(*arguments)  # type: ignore[no-any-return]


def tune_call(op: str, call: Any, *, repeats: int, max_seconds: float, sample: Sample | None = None) -> Tuned:
    """Gate and time every candidate for one call."""
    with packed.at_once():
        return _tune_call(op, call, repeats, max_seconds, sample)


def _tune_call(op: str, call: Any, repeats: int, max_seconds: float, sample: Sample | None) -> Tuned:
    gate = _Gate(op, call)
    excluded: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    runs: dict[str, Call] = {}
    for entry in candidates(op, call):
        try:
            run = runner(op, call, entry)
            problem = gate.problem(run)
        except Exception as error:  # one candidate's failure does not end the run; the result reports it
            problem = f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if problem is None:
            entries[label(entry)], runs[label(entry)] = entry, run
        else:
            excluded[label(entry)] = problem
    timings = interleaved(runs, device=call[0].device, repeats=repeats, max_seconds=max_seconds, sample=sample)
    times = {name: round(1e3 * timing.p50, 6) for name, timing in timings.items()}
    if not timings:
        raise RuntimeError(f"{op}: no backend is within the error budget: {excluded}")
    best = pick(timings)
    key = lookup.key(op, call)
    assert key is not None
    return Tuned(key, Entry(entries[best].backend, entries[best].config, times), excluded)


def beats(one: Timing, other: Timing) -> bool:
    """Whether ``one`` is faster beyond noise: by more than MARGIN, and in four samples of five below the median."""
    return one.p50 < (1 - MARGIN) * other.p50 and one.p80 < other.p50


def pick(timings: Mapping[str, Timing]) -> str:
    """The fastest of those that beat the first, the static rule's choice; where none does, that. Of equal ones the
    earlier wins, so the same timings give the same choice."""
    first = next(iter(timings.values()))
    challengers = [name for name, timing in timings.items() if beats(timing, first)]
    return min(challengers, key=lambda name: timings[name].p50, default=next(iter(timings)))


def _has_new(op: str, call: Any, entry: Entry) -> bool:
    """Whether a backend of a user's can serve the call that was not there, or not within the budget, before."""
    measured = {name.split(" ")[0] for name in entry.milliseconds}
    return any(name not in measured and backends.refusal(op, name, call) is None for name in registry.names())


def runner(op: str, call: Any, entry: Entry) -> Call:
    """The call as ``backend="auto"`` runs it once the table says ``entry``, checks and layout of the result included.

    Raises:
        BackendError: it would not be ``entry`` that runs.
    """
    of_block = isinstance(call, BlockCall) and entry.backend in (EAGER, lookup.CHAIN)
    found = lookup.Found(entry)
    if not of_block and backends.tuned(op, call, found) is None:
        raise backends.BackendError(f"{label(entry)} does not serve this call")
    if isinstance(call, BlockCall):
        with lookup.trial(op, found):
            plan = block._plan(op, call, backends.AUTO)
        return lambda: with_strides(plan.run(call), plan.strides)
    compute = importlib.import_module(f"resnet_fused.ops.{op}.api").compute

    def run() -> Tensor:
        with lookup.trial(op, found):
            return compute(call, backends.AUTO)  # type: ignore[no-any-return]

    return run


class _Gate:
    """Compares candidates with float64, on the first and the last image of the batch, in eager's error in either memory
    format. One image alone counts twice as well: eager may then sum in another order, and both are its error."""

    def __init__(self, op: str, call: Any) -> None:
        run = eager(op)
        self.some = sorted({0, call[0].shape[0] - 1})
        few = _with_inputs(call, lambda x: x[self.some].clone(memory_format=torch.preserve_format))
        given = [few]
        if len(self.some) == 1:
            given.append(_with_inputs(few, lambda x: torch.cat([x, x])))
        with torch.no_grad():
            self.reference = run(_map(few, Tensor.double))
            self.eager = run(few)
            self.others = [
                run(layouts.turned(one, name))[: len(self.some)]
                for one in given
                for name in lookup.LAYOUTS
                if op != "add_relu"
            ]
            self.whole = run(_map(call, lambda x: x.to("meta")))

    def problem(self, run: Call) -> str | None:
        with torch.inference_mode():
            out = run()
        for attribute in ("shape", "dtype"):
            if getattr(out, attribute) != getattr(self.whole, attribute):
                return f"{attribute} {getattr(out, attribute)}, eager's {getattr(self.whole, attribute)}"
        error = measure(out[self.some], self.eager, self.reference, *self.others)
        return None if error.ok else f"error is {error.ratio:.3g} of the budget"


def eager(op: str) -> Callable[[Any], Tensor]:
    """Eager PyTorch on a call of this op."""
    if op in ("basic_block", "bottleneck"):
        return lambda call: run_chain(call, reference.run)
    return importlib.import_module(f"resnet_fused.ops.{op}.reference").run  # type: ignore[no-any-return]


def _map(call: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The call with each tensor changed."""
    if isinstance(call, Tensor):
        return change(call)
    if isinstance(call, tuple):
        values = [_map(value, change) for value in call]
        return type(call)(*values) if hasattr(call, "_fields") else tuple(values)
    return call
