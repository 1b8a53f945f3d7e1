"""Three ways to cut a trace into passes over memory, and what each pass moves and computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from resnet_fused.roofline.bound import Bound, Device
from resnet_fused.roofline.trace import Op, Trace, trace

LEVELS = ("op", "conv", "block")

# What may follow a convolution in its pass when the other operands are constants.
_AFFINE = ("bn", "mul", "div", "add", "sub")


@dataclass(frozen=True)
class Piece:
    """One pass over memory: elements of activations read and written, elements of constants read, FLOPs."""

    name: str
    kind: str
    reads: int
    writes: int
    weights: int
    flops: int

    def elements(self, *, weights: bool = True) -> int:
        """Elements moved."""
        return self.reads + self.writes + (self.weights if weights else 0)


@dataclass(frozen=True)
class Counts:
    """The passes of one forward at one level, for ``batch`` images."""

    level: str
    pieces: tuple[Piece, ...]
    batch: int

    @property
    def flops(self) -> int:
        return sum(piece.flops for piece in self.pieces)

    def elements(self, *, weights: bool = True) -> int:
        """Elements moved by all passes; with ``weights=False`` the activations alone."""
        return sum(piece.elements(weights=weights) for piece in self.pieces)

    def nbytes(self, dtype: torch.dtype, *, weights: bool = True) -> int:
        """Bytes moved when everything is of ``dtype``."""
        return self.elements(weights=weights) * dtype.itemsize

    def within(self, *names: str) -> Counts:
        """Only the passes of the modules with these names, submodules included."""
        return self._keep(piece for piece in self.pieces if _under(piece.name, names))

    def without(self, *names: str) -> Counts:
        """All but the passes of the modules with these names, submodules included."""
        return self._keep(piece for piece in self.pieces if not _under(piece.name, names))

    def bound(self, device: Device, dtype: torch.dtype, *, weights: bool = True) -> Bound:
        """The least time on ``device``; ``weights=False`` is the limit of a large batch.

        Raises:
            ValueError: the device's rate in ``dtype`` is not known.
        """
        rate = device.rate(dtype)
        memory = [p.elements(weights=weights) * dtype.itemsize / device.bytes_per_s for p in self.pieces]
        arithmetic = [p.flops / rate for p in self.pieces]
        seconds = sum(map(max, memory, arithmetic))
        return Bound(sum(memory), sum(arithmetic), seconds, self.batch)

    def _keep(self, pieces: Iterable[Piece]) -> Counts:
        return Counts(self.level, tuple(pieces), self.batch)


def count(model: nn.Module, *shapes: tuple[int, ...]) -> Mapping[str, Counts]:
    """Count one inference of ``model`` at each of LEVELS, from shapes alone.

    The model runs once, as a copy without weights, on the meta device in eval mode; fused modules count as the eager
    operations that they stand for. A residual block is recognised by what it does: a module whose own forward adds two
    activations and passes the sum to ReLU.

    Args:
        model: a network, a block, or any module of convolutions.
        shapes: of its inputs, ``(N, C, H, W)``; N is the batch of the counts.

    Returns:
        ``{"op": Counts, "conv": Counts, "block": Counts}``. A piece is named after its module, so a block's
        piece has the block's name.
    """
    if not shapes:
        raise ValueError("shapes: got none, need the shape of each input")
    traced = trace(model, shapes)
    convs = _fuse_convs(traced)
    cuts = ([_Group(op.name, op.kind, [op]) for op in traced.ops], convs, _fuse_blocks(traced, convs))
    uses = _uses(traced)
    return {
        level: Counts(level, tuple(_piece(traced, uses, group) for group in groups), traced.batch)
        for level, groups in zip(LEVELS, cuts, strict=True)
    }


def gains(model: nn.Module, shape: tuple[int, ...], device: Device, dtype: torch.dtype) -> dict[str, float]:
    """How many times faster than per-convolution fusion a whole-block kernel can be, by block name.

    Both at their bounds, at a large batch (weights left out).
    """
    counts = count(model, shape)
    blocks = [piece.name for piece in counts["block"].pieces if piece.kind == "block"]

    def seconds(level: str, name: str) -> float:
        return counts[level].within(name).bound(device, dtype, weights=False).seconds

    return {name: seconds("conv", name) / seconds("block", name) for name in blocks}


class _Group(NamedTuple):
    """Operations that make one pass."""

    name: str
    kind: str
    ops: list[Op]


def _under(name: str, roots: tuple[str, ...]) -> bool:
    return any(root in ("", name) or name.startswith(f"{root}.") for root in roots)


def _uses(traced: Trace) -> Counter[int]:
    """How often each value is read; a result of the model counts as read."""
    return Counter([value for op in traced.ops for value in op.reads]) + Counter(traced.outputs)


def _fuse_convs(traced: Trace) -> list[_Group]:
    """Each convolution with the operations that can ride in its epilogue, the others alone."""
    uses, ops = _uses(traced), traced.ops
    reader = {value: i for i, op in enumerate(ops) for value in op.reads}
    ends = {op.out for op in ops if uses[op.out] == 1 and (op.kind == "conv" or _maps(op))}
    groups: dict[int, list[int]] = {}  # by the last operation's place: there its inputs are ready
    taken: set[int] = set()
    for start, op in enumerate(ops):
        if start in taken:
            continue
        group = [start]
        while op.kind == "conv" and uses[end := ops[group[-1]].out] == 1 and end in reader:
            if not _rides(ops[reader[end]], end, [ops[i] for i in group], ends):
                break
            group.append(reader[end])
        taken.update(group)
        groups[group[-1]] = group
    return [
        _Group(ops[group[0]].name, "+".join(ops[i].kind for i in group), [ops[i] for i in group])
        for _, group in sorted(groups.items())
    ]


def _rides(op: Op, end: int, before: list[Op], ends: set[int]) -> bool:
    """True when ``op`` can join a convolution's pass, behind the operations ``before`` whose result is ``end``.

    A sum of two convolutions' results goes to the pass of the first.
    """
    if before[-1].kind == "relu":
        return False
    if op.kind == "relu" or _maps(op):
        return True
    return _adds_two(op) and not any(map(_adds_two, before)) and end == next((v for v in op.reads if v in ends), end)


def _maps(op: Op) -> bool:
    """True for an affine map whose other operands are constants."""
    return op.kind in _AFFINE and len(op.reads) == 1


def _adds_two(op: Op) -> bool:
    """True for the sum of two activations of one size."""
    return op.kind == "add" and len(op.reads) == 2 and len(set(op.reads.values())) == 1


def _fuse_blocks(traced: Trace, convs: list[_Group]) -> list[_Group]:
    """The residual blocks, the stem with its pool, and what is left of the convolutions' groups."""
    uses, blocks = _uses(traced), _block_names(traced)
    groups: dict[str, _Group] = {}
    rest: list[_Group] = []
    for group in convs:
        first = group.ops[0]
        owner = next((name for name in reversed(first.modules) if name in blocks), None)
        if owner is not None:
            groups.setdefault(owner, _Group(owner, "block", [])).ops.extend(group.ops)
            continue
        stem = next((g for g in rest if g.ops[-1].out in first.reads and uses[g.ops[-1].out] == 1), None)
        if first.kind == "max_pool" and stem is not None and stem.ops[0].kind == "conv":
            rest[rest.index(stem)] = _Group(stem.name, f"{stem.kind}+{group.kind}", stem.ops + group.ops)
        else:
            rest.append(group)
    place = {id(op): i for i, op in enumerate(traced.ops)}
    return sorted([*groups.values(), *rest], key=lambda group: place[id(group.ops[-1])])


def _block_names(traced: Trace) -> set[str]:
    """Modules that themselves add two activations of one size and hand the sum to ReLU; the innermost such."""
    ops = traced.ops
    rectified = {value for op in ops if op.kind == "relu" for value in op.reads}
    found = {op.name for op in ops if _adds_two(op) and op.out in rectified}
    return {name for name in found if not any(other != name and _under(other, (name,)) for other in found)}


def _piece(traced: Trace, uses: Counter[int], group: _Group) -> Piece:
    inner = Counter(value for op in group.ops for value in op.reads)
    inside = {op.out for op in group.ops}
    reads: dict[int, int] = {}
    weights: dict[int, int] = {}
    for op in group.ops:
        weights |= op.weights
        for value in op.reads.keys() - inside:
            reads[value] = max(reads.get(value, 0), op.reads[value])
    written = [value for value in inside if uses[value] > inner[value] or group.ops[-1].out == value]
    return Piece(
        group.name,
        group.kind,
        sum(reads.values()),
        sum(traced.size[value] for value in written),
        sum(weights.values()),
        sum(op.flops for op in group.ops),
    )
