"""What the fused residual blocks share: how one decides, at each call, what to compute with fused ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.modules import parts
from resnet_fused.modules.base import FusedModule, derived_class
from resnet_fused.modules.spec import BlockSpec, FusedState, find
from resnet_fused.ops import residual_block
from resnet_fused.ops.residual_block import ResidualBlock

B = TypeVar("B", bound="FusedBlock")
Pair = tuple[nn.Conv2d, nn.Module]


class FusedBlock(FusedModule):
    """A residual block. At each call, in this order:

    - something in it is watched or was replaced (hooks on a submodule, another activation): the original forward;
    - all its norms use given statistics (eval mode, frozen): the whole block as one op;
    - some norm uses the batch's statistics: pair by pair, each fused where its own norm allows it; with ``recompute``
      and a gradient to come, the whole block as one op that keeps less for it.
    """

    _spec: BlockSpec
    _op: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        pairs = self._pairs()
        if pairs is None:
            return self._original_forward(x)
        shortcut = self._shortcut()
        state = self._fused
        data = [parts.read(conv, norm) for conv, norm in pairs]
        if None not in data:
            if shortcut is None:
                return self._op(x, *data, backend=state.backend)
            if isinstance(shortcut, nn.Module):
                return self._op(x, *data, None, shortcut(x), backend=state.backend)
            projection = parts.read(*shortcut)
            if projection is not None:
                return self._op(x, *data, projection, backend=state.backend)
        if state.recompute is not None and torch.is_grad_enabled():
            block = _as_recomputed(x, pairs, shortcut)
            if block is not None:
                return residual_block.call_op(block, state.recompute, parts.training_backend(state.backend))
        return self._steps(x, pairs, shortcut, state.backend)

    def uses_given_statistics(self) -> bool:
        """Whether the block, as it is now, would run as one op: each image apart from the others."""
        pairs, shortcut = self._pairs(), self._shortcut()
        if pairs is None or isinstance(shortcut, nn.Module):
            return False
        return all(parts.read(*pair) is not None for pair in (*pairs, *([shortcut] if shortcut else [])))

    def _steps(self, x: Tensor, pairs: list[Pair], shortcut: Pair | nn.Module | None, backend: str) -> Tensor:
        hidden = x
        for conv, norm in pairs[:-1]:
            hidden = parts.step(hidden, conv, norm, "relu", None, backend)
        if shortcut is None:
            residual = x
        elif isinstance(shortcut, nn.Module):
            residual = shortcut(x)
        else:
            residual = parts.step(x, *shortcut, "none", None, backend)
        return parts.step(hidden, *pairs[-1], "relu", residual, backend)

    def _pairs(self) -> list[Pair] | None:
        """The convolutions and norms, or None when something in the block may not be bypassed at the moment."""
        spec = self._fused.spec
        pairs: list[Any] = []
        for conv_path, norm_path in spec.pairs:
            conv, norm = find(self, conv_path), find(self, norm_path)
            if not parts.bypassable(conv, norm):
                return None
            pairs.append((conv, norm))
        for act_path in spec.acts:
            act = find(self, act_path)
            if act is None or not parts.plain_relu(act):
                return None
        for idle_path in spec.idle:
            if not idle(find(self, idle_path)):
                return None
        for path, length in spec.containers:
            container = find(self, path)
            if type(container) is not nn.Sequential or parts.touched(container) or len(container) != length:
                return None
        return None if parts.watched() else pairs

    def _shortcut(self) -> Pair | nn.Module | None:
        """The projection as a pair where it is one, a module to call otherwise, or None for x itself."""
        path = self._fused.spec.shortcut
        return None if path is None else as_shortcut(find(self, path))

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


def _as_recomputed(x: Tensor, pairs: list[Pair], shortcut: Pair | nn.Module | None) -> ResidualBlock | None:
    """The block as data, or None where one of its norms asks other processes."""
    convs = [parts.conv_norm(*pair) for pair in pairs]
    projection = parts.conv_norm(*shortcut) if isinstance(shortcut, tuple) else None
    if None in convs or x.dim() != 4 or (isinstance(shortcut, tuple) and projection is None):
        return None
    identity = shortcut(x) if isinstance(shortcut, nn.Module) else None
    return ResidualBlock(x, tuple(convs), projection, identity)  # type: ignore[arg-type]


def idle(module: nn.Module | None) -> bool:
    """Whether ``module`` does nothing."""
    return module is None or (type(module) is nn.Identity and not parts.touched(module))


def as_shortcut(module: nn.Module | None) -> Pair | nn.Module | None:
    """``module`` as a pair where it is a plain Sequential of a bypassable one; None where it does nothing."""
    if idle(module):
        return None
    if type(module) is nn.Sequential and not parts.touched(module):
        children = list(module._modules.values())
        if not children:
            return None
        if len(children) == 2 and parts.bypassable(children[0], children[1]):
            return children[0], children[1]  # type: ignore[return-value]
    return module
