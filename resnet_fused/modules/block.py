"""What the fused residual blocks share: how one decides, at each call, what to compute with fused ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.modules import live, parts
from resnet_fused.modules.base import FusedModule, derived_class
from resnet_fused.modules.spec import BlockSpec, FusedState, find
from resnet_fused.ops import residual_block
from resnet_fused.ops.residual_block import ResidualBlock

B = TypeVar("B", bound="FusedBlock")
Pair = live.Pair


class FusedBlock(FusedModule):
    """A residual block. At each call, in this order:

    - something in it is watched or was replaced (hooks on a submodule, another activation): the original forward;
    - all its norms use given statistics (eval mode, frozen): the whole block as one op;
    - some norm uses the batch's statistics, or other modules stand between the pairs: pair by pair, each fused where
      its own norm allows it; with ``recompute``, nothing between the pairs and a gradient to come, the whole block as
      one op that keeps less for it.
    """

    _spec: BlockSpec
    _op: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        pairs = self._pairs()
        if pairs is None:
            return self._original_forward(x)
        state = self._fused
        shortcut = self._shortcut()
        extras = self._extras()
        data = [parts.read(conv, norm) for conv, norm in pairs]
        if None not in data:
            x = state.feature_map(x)
        if extras is None and None not in data:
            if shortcut is None:
                return self._op(x, *data, backend=state.backend)
            if not isinstance(shortcut, live.Projection) or shortcut.before:
                return self._op(x, *data, None, _residual(x, shortcut, state.backend), backend=state.backend)
            projection = parts.read(shortcut.conv, shortcut.norm)
            if projection is not None:
                return self._op(x, *data, projection, backend=state.backend)
        if state.recompute is not None and extras is None and torch.is_grad_enabled():
            block = _as_recomputed(x, pairs, shortcut, state.backend)
            if block is not None:
                return residual_block.call_op(block, state.recompute, parts.training_backend(state.backend))
        return self._steps(x, pairs, shortcut, extras, state.backend)

    def uses_given_statistics(self) -> bool:
        """Whether the block, as it is now, would run as one op: each image apart from the others."""
        pairs, shortcut = self._pairs(), self._shortcut()
        if pairs is None or self._extras() is not None:
            return False
        if shortcut is not None:
            if not isinstance(shortcut, live.Projection) or shortcut.before:
                return False
            pairs.append((shortcut.conv, shortcut.norm))
        return all(parts.read(*pair) is not None for pair in pairs)

    def _steps(
        self,
        x: Tensor,
        pairs: list[Pair],
        shortcut: live.Projection | live.Step | None,
        extras: list[list[live.Step]] | None,
        backend: str,
    ) -> Tensor:
        behind = extras or [[]] * len(pairs)
        hidden = x
        for pair, steps in zip(pairs[:-1], behind, strict=False):
            hidden = _run(steps, parts.step(hidden, *pair, "relu", None, backend))
        if not behind[-1]:
            return parts.step(hidden, *pairs[-1], "relu", _residual(x, shortcut, backend), backend)
        hidden = _run(behind[-1], parts.step(hidden, *pairs[-1], "none", None, backend))
        residual = _residual(x, shortcut, backend)
        if hidden.dtype == residual.dtype and hidden.shape == residual.shape:
            return functional.add_relu(hidden, residual)
        hidden += residual
        return torch.relu_(hidden)

    def _pairs(self) -> list[Pair] | None:
        """The convolutions and norms, or None when something in the block may not be bypassed at the moment."""
        return live.pairs(self, self._fused.spec)

    def _extras(self) -> list[list[live.Step]] | None:
        """What is called between and behind the pairs, or None."""
        spec = self._fused.spec
        return live.extras(self, spec) if spec.extras else None

    def _shortcut(self) -> live.Projection | live.Step | None:
        """The projection as a pair where it is one, something to call otherwise, or None for x itself."""
        path = self._fused.spec.shortcut
        return None if path is None else live.shortcut(live.lookup(self, path))

    def _original_forward(self, x: Tensor) -> Tensor:
        """The block as module calls; a block of another class has its own forward here."""
        spec = self._fused.spec
        act: Any = find(self, spec.acts[0]) if spec.acts else F.relu
        hidden: Any = x
        for conv_path, norm_path in spec.pairs:
            conv, norm = find(self, conv_path), find(self, norm_path)
            assert conv is not None and norm is not None
            hidden = norm(conv(hidden))
            if conv_path is not spec.pairs[-1][0]:
                hidden = act(hidden)
        shortcut = None if spec.shortcut is None else find(self, spec.shortcut)
        return act(hidden + (x if shortcut is None else shortcut(x)))  # type: ignore[no-any-return]

    @classmethod
    def from_block(cls: type[B], block: nn.Module, *, backend: str = "auto", recompute: str | None = None) -> B:
        """A fused block that shares ``block``'s submodules, parameters, hooks and attributes; ``block`` is not changed.

        Args:
            block: a block with this class's attribute names, computing what this class computes. ``fuse`` makes sure
                of the latter; here it is the caller's word.
            backend: as in ``resnet_fused.functional``.
            recompute: as in the constructor.

        Raises:
            ValueError: there is no such ``recompute``.
            TypeError: a convolution or norm of this class is missing in ``block``.
        """
        for pair in cls._spec.pairs:
            for keys in pair:
                if find(block, keys) is None:
                    raise TypeError(f"block: got a {type(block).__name__} without {'.'.join(keys)}; need one with it")
        derived = cls if isinstance(block, FusedBlock) else derived_class(cls, type(block))
        fused = derived.__new__(derived)
        fused.__dict__.update(block.__dict__)
        fused._fused = FusedState(cls._spec, backend, recompute=parts.check_recompute(recompute))
        return fused  # type: ignore[return-value]


def _as_recomputed(
    x: Tensor, pairs: list[Pair], shortcut: live.Projection | live.Step | None, backend: str
) -> ResidualBlock | None:
    """The block as data, or None where one of its norms asks other processes."""
    convs = [parts.conv_norm(*pair) for pair in pairs]
    projects = isinstance(shortcut, live.Projection) and not shortcut.before
    projection = parts.conv_norm(shortcut.conv, shortcut.norm) if projects else None  # type: ignore[union-attr]
    if None in convs or x.dim() != 4 or (projects and projection is None):
        return None
    identity = None if projects or shortcut is None else _residual(x, shortcut, backend)
    return ResidualBlock(x, tuple(convs), projection, identity)  # type: ignore[arg-type]


def _run(steps: Iterable[live.Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _residual(x: Tensor, shortcut: live.Projection | live.Step | None, backend: str) -> Tensor:
    """What is added to the last convolution's result."""
    if shortcut is None:
        return x
    if not isinstance(shortcut, live.Projection):
        return shortcut(x)
    return parts.step(_run(shortcut.before, x), shortcut.conv, shortcut.norm, "none", None, backend)
