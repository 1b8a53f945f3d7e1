"""The model families that users have, and what ``fuse`` does to them: the measurements behind the support table."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.fusion import fuse, report, unfuse
from resnet_fused.ops import packed
from resnet_fused.testing.budget import measure
from resnet_fused.testing.compare import flatten
from resnet_fused.testing.family_models import FAMILIES, Candidate
from resnet_fused.testing.statistics import calibrate


@dataclass
class Row:
    """What was found in one family.

    fused and stems count blocks and stems; partly counts, by what stays eager, those among the fused blocks that have
    eager modules in them; alone counts, by reason, the blocks and stems left alone; worst is the largest error over its
    budget among all outputs, of the model ``worst_model``; problems are the models whose outputs or keys differ.
    """

    family: str
    models: int = 0
    fused: int = 0
    stems: int = 0
    partly: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    worst_model: str = ""
    problems: list[str] = field(default_factory=list)
    absent: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "partly": dict(self.partly), "alone": dict(self.alone)}


def survey(names: Iterable[str] = FAMILIES, limit: int | None = None) -> Iterator[tuple[Row, Candidate | None]]:
    """Measure the models of these families, one by one; after each, the family's row so far and the model.

    Args:
        names: keys of ``FAMILIES``. A family whose package is not installed gives a row that says so.
        limit: at most this many models of each family, spread over its list.
    """
    for name in names:
        family = FAMILIES[name]
        row = Row(name)
        missing = [package for package in family.packages if importlib.util.find_spec(package) is None]
        if missing:
            row.absent = f"{', '.join(missing)} is not installed"
            yield row, None
            continue
        candidates = family.models()
        if limit is not None and limit < len(candidates):
            candidates = [candidates[i * len(candidates) // limit] for i in range(limit)]
        for candidate in candidates:
            start = time.perf_counter()
            add(row, candidate)
            row.seconds += time.perf_counter() - start
            yield row, candidate


@torch.no_grad()
@packed.at_once()
def add(row: Row, candidate: Candidate) -> None:
    """Fuse one model, compare everything with eager, and count it in ``row``.

    On two batches at once, and eager's error is its largest over all images, in either memory format. The norms have
    the statistics of these very images: on others a deep model of random weights may grow by any factor, and with it
    the rounding errors of a single image, which are then compared with no others.
    """
    torch.manual_seed(0)
    model = candidate.make().eval()
    x = torch.randn(2 * candidate.shape[0], *candidate.shape[1:])
    calibrate(_Run(model, candidate.run), x, perturb=True)
    keys, before = list(model.state_dict()), candidate.run(model, x)
    fused = fuse(model)
    row.models += 1
    for entry in report(fused):
        reason = entry.reason
        if entry.status != "fused":
            row.alone[reason] += 1
        elif entry.kind == "stem":
            row.stems += 1
        else:
            row.fused += 1
            if reason:
                row.partly[reason] += 1
    after = flatten(candidate.run(fused, x))
    if list(fused.state_dict()) != keys:
        row.problems.append(f"{candidate.name}: other keys in its state_dict")
    eager, other = flatten(before), None
    if x.dim() == 4:
        turned = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        other = flatten(candidate.run(turned, x.contiguous(memory_format=torch.channels_last)))
        del turned
    undone = flatten(candidate.run(unfuse(fused, inplace=True), x))
    del fused
    reference = flatten(candidate.run(model.double(), x.double()))
    if not eager.keys() == after.keys() == reference.keys():
        row.problems.append(f"{candidate.name}: other outputs")
        return
    for key, expected in eager.items():
        if not torch.equal(torch.nan_to_num(undone[key]), torch.nan_to_num(expected)):
            row.problems.append(f"{candidate.name}: {key or 'its output'} differs after unfuse")
        error = measure(after[key], expected, reference[key].double(), *([] if other is None else [other[key]]))
        if not error.ok:
            row.problems.append(f"{candidate.name}: {key or 'its output'} has {error.ratio:.2f} times the budget")
        if error.ratio > row.worst:
            row.worst, row.worst_model = error.ratio, candidate.name


class _Run(nn.Module):
    """A model with another call."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.model, x)


def markdown(rows: Iterable[Row]) -> str:
    """The support table."""
    lines = [
        "| family | models | blocks fused | stems fused | partly eager | left alone | worst error / budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.absent:
            lines.append(f"| {row.family} | 0 | | | | {row.absent} | |")
            continue
        worst = "outside" if row.problems else f"{row.worst:.2f}"
        cells = (row.family, row.models, row.fused, row.stems, _counted(row.partly), _counted(row.alone), worst)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _counted(counter: Counter[str]) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in counter.most_common())
