"""Reports: fused parts with their backends, and parts left alone with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

FUSED = "fused"
SKIPPED = "skipped"


@dataclass(frozen=True)
class FusionEntry:
    """One block, stem or chain.

    name is its path in the model ("layer1.0"; a stem's ends in "stem"; a chain of the generic path has its
    convolution's); kind is "basic_block", "bottleneck", "stem", "conv_bn_act", "add_relu" or "block"; status is "fused"
    or "skipped"; reason says why it was skipped, or which part of a fused block stays eager; backend computes
    it, and is empty when skipped.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    backend: str = ""


@dataclass(frozen=True)
class FusionReport:
    """The entries of a model, in the model's order. ``str()`` gives a table."""

    entries: tuple[FusionEntry, ...]

    def __iter__(self) -> Iterator[FusionEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> FusionEntry:
        """The entry of this name; KeyError when there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    @property
    def fused(self) -> tuple[FusionEntry, ...]:
        """The entries that are fused."""
        return tuple(e for e in self.entries if e.status == FUSED)

    @property
    def skipped(self) -> tuple[FusionEntry, ...]:
        """The entries left alone."""
        return tuple(e for e in self.entries if e.status == SKIPPED)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``{"fused": 16, "skipped": 1, "entries": [{"name": …, …}, …]}``."""
        return {
            "fused": len(self.fused),
            "skipped": len(self.skipped),
            "entries": [asdict(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        if not self.entries:
            return "no residual block of a known class (register your own with resnet_fused.register_adapter)"
        rows = [("name", "kind", "status", "backend", "reason")]
        rows += [(e.name or "(model)", e.kind, e.status, e.backend, e.reason) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        total = f"{len(self.fused)} fused, {len(self.skipped)} left alone"
        return "\n".join([line.rstrip() for line in lines] + [total])
