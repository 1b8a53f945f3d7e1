"""Compare the choice of ``backend="auto"`` with eager PyTorch, call by call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.ops import packed
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.testing.timing import Sample, Timing, interleaved
from resnet_fused.tuning import layouts, lookup, tuner

LAYOUTS = {"eager NCHW": "nchw", "eager channels_last": "nhwc"}


@dataclass(frozen=True)
class Comparison:
    """One call by "auto" and by eager in either memory format, measured several times over, each time in turns.

    ``choice`` is what the table says, or "static" where it says nothing.
    """

    key: str
    choice: str
    rounds: tuple[Mapping[str, Timing], ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times faster than the faster of eager's formats, in each round."""
        return tuple(min(r[name].p50 for name in LAYOUTS) / r["auto"].p50 for r in self.rounds)

    @property
    def slower(self) -> str:
        """The format in which eager is faster beyond noise in every round; empty where there is none."""
        return next((name for name in LAYOUTS if all(tuner.beats(r[name], r["auto"]) for r in self.rounds)), "")


def verify(
    model: nn.Module,
    *inputs: Any,
    rounds: int = 2,
    repeats: int = 20,
    max_seconds: float = 5.0,
    sample: Sample | None = None,
    progress: Callable[[int, int, Comparison], None] | None = None,
) -> list[Comparison]:
    """Measure each distinct call that ``model(*inputs)`` makes, as "auto" runs it, and eager in both memory formats.

    Eager has its weights in its format, and in NCHW its inputs too, at no cost, as in a model left in that format. In
    channels_last it gets them as they come: they lie so already but for the model's images. Nothing is written.

    Args:
        model, inputs, repeats, max_seconds, sample, progress: as in :func:`resnet_fused.tuning.tuner.tune`.
        rounds: how many times each comparison is measured.

    Raises:
        ValueError: no fused op ran.
    """
    calls = tuner.record(model, *inputs, tuned=True)
    if not calls:
        raise ValueError("model: no fused op ran on this input; fuse it, and call .eval() before verifying")
    found = []
    for done, (key, (op, call)) in enumerate(calls.items(), 1):
        runs = {"auto": _auto(op, call)} | {name: _eager(op, call, layout) for name, layout in LAYOUTS.items()}
        with packed.at_once():
            measured = tuple(
                interleaved(runs, device=call[0].device, repeats=repeats, max_seconds=max_seconds, sample=sample)
                for _ in range(rounds)
            )
        entry = lookup.find(op, call)
        found.append(Comparison(key, "static" if entry is None else tuner.label(entry.entry), measured))
        if progress is not None:
            progress(done, len(calls), found[-1])
    return found


def _auto(op: str, call: Any) -> Callable[[], Tensor]:
    """The call through the registered op."""
    api = importlib.import_module(f"resnet_fused.ops.{op}.api")
    if isinstance(call, BlockCall):
        return functools.partial(api.call_op, call, backends.AUTO)
    return functools.partial(api.call_op if isinstance(call, ConvBNActCall) else api.OP, *call, backends.AUTO)


def _eager(op: str, call: Any, layout: str) -> Callable[[], Tensor]:
    run = tuner.eager(op)
    if isinstance(call, (BlockCall, ConvBNActCall)):
        with torch.no_grad():
            turned = layouts.turned(call, layout)
        call = turned if layout == "nchw" else turned._replace(x=call.x)
    return functools.partial(run, call)
