"""What the fused residual blocks share: how one decides, at each call, what to compute with fused ops.

A block of the user's class keeps all of its attributes, so nothing here has a name that it may have: what
belongs to us is a function that takes the block, or has a name that begins with ``_rf_``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.backends import AUTO
from resnet_fused.modules import guards, live, network_plan, parts
from resnet_fused.modules.base import FusedModule, derived_class
from resnet_fused.modules.live import Called, Pair, Parts, Projection, Shortcut
from resnet_fused.modules.matched import Matched
from resnet_fused.modules.spec import BlockSpec, FusedState, find
from resnet_fused.ops import residual_block
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.residual_block import ResidualBlock

B = TypeVar("B", bound="FusedBlock")


class FusedBlock(FusedModule):
    """A residual block. At each call, in this order:

    - a mode or tracer is active, or a part of it has hooks or was replaced (hooks on a submodule, another activation, a
      patched class): its own forward, so exactly eager;
    - all its norms use given statistics (eval mode, frozen): the whole block as one op;
    - some norm uses the batch's statistics, or other modules stand between the pairs: pair by pair, each fused where
      its own norm allows it; with ``recompute``, nothing between the pairs and a gradient to come, the whole block as
      one op that keeps less for it.
    """

    _rf_spec: BlockSpec
    _rf_op: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if len(args) == 1 and not kwargs else _argument(self, args, kwargs)
        planned = network_plan.run(self, x)
        if planned is not None:
            return planned
        found = _parts(self, x)
        if found is None:
            return own_forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        out = _fused_forward(self, x, found)
        return own_forward(self, *args, **kwargs) if out is None else out

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """``forward`` has the signature of the forward that it stands for, which torch.fx and others look up."""
        super().__init_subclass__(**kwargs)
        original = vars(cls).get("_rf_original_class")
        if original is not None:
            cls.forward = _with_signature(original.forward)  # type: ignore[method-assign]

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
        for pair in cls._rf_spec.pairs:
            for keys in pair:
                if find(block, keys) is None:
                    raise TypeError(f"block: got a {type(block).__name__} without {'.'.join(keys)}; need one with it")
        ours = isinstance(block, FusedBlock)
        derived = cls if ours else derived_class(cls, type(block))
        fused = derived.__new__(derived)
        fused.__dict__.update(block.__dict__)
        matched = None if ours else Matched(type(block), ("forward",))
        fused._rf_state = FusedState(cls._rf_spec, backend, recompute=parts.check_recompute(recompute), matched=matched)
        return fused  # type: ignore[return-value]


def own_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block as module calls; a block of another class has its own forward, as it is now."""
    original: Any = getattr(type(block), "_rf_original_class", None)
    if original is None:
        return _as_written(block, *args, **kwargs)  # type: ignore[arg-type]
    return original.forward(block, *args, **kwargs)


def _as_written(self: FusedBlock, x: Tensor) -> Tensor:
    """The forward of the blocks that are ours."""
    spec = self._rf_state.spec
    act: Any = find(self, spec.acts[0]) if spec.acts else F.relu
    hidden: Any = x
    for conv_path, norm_path in spec.pairs:
        conv, norm = find(self, conv_path), find(self, norm_path)
        assert conv is not None and norm is not None
        hidden = norm(conv(hidden))
        if conv_path is not spec.pairs[-1][0]:
            hidden = act(hidden)
    shortcut = None if spec.shortcut is None else find(self, spec.shortcut)
    hidden += x if shortcut is None else shortcut(x)
    return act(hidden)  # type: ignore[no-any-return]


FusedBlock.forward.__wrapped__ = _as_written  # type: ignore[attr-defined]


def _with_signature(original: Callable[..., Any]) -> Callable[..., Any]:
    run: Any = FusedBlock.forward

    def forward(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    forward.__wrapped__ = original  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


def _argument(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one tensor that a block takes where it is given by its name; None where the arguments are others."""
    if args or len(kwargs) != 1:
        return None
    original: Any = getattr(type(block), "_rf_original_class", None)
    forward = _as_written if original is None else original.forward
    names = list(inspect.signature(forward).parameters)
    return kwargs.get(names[1]) if len(names) == 2 else None


def _parts(block: nn.Module, x: Any) -> Parts | None:
    """What the block consists of, or None where it is to run as it is written."""
    state = block.__dict__.get("_rf_state")
    if state is None or not guards.plain_tensor(x) or guards.watched() is not None:
        return None
    found = live.read(block, state.spec, state.matched)
    return None if isinstance(found, str) else found


def uses_given_statistics(block: FusedBlock, x: Tensor) -> bool:
    """Whether the block, as it is now, would run as one op: each image apart from the others."""
    found = _parts(block, x)
    if found is None or found.extras is not None:
        return False
    pairs = found.pairs
    if found.shortcut is not None:
        if not isinstance(found.shortcut, Projection) or found.shortcut.before:
            return False
        pairs = [*pairs, (found.shortcut.conv, found.shortcut.norm)]
    return all(parts.read(*pair) is not None for pair in pairs)


def _fused_forward(block: FusedBlock, x: Tensor, found: Parts) -> Tensor | None:
    """The block by fused ops; None, with nothing done yet, where eager treats this input differently."""
    pairs, shortcut, extras = found
    data = [parts.read(conv, norm) for conv, norm in pairs]
    if None not in data and (not isinstance(shortcut, Called) or shortcut.pure):  # else eager's own x is written to
        x = parts.feature_map(x, data, block._rf_state.turns())  # type: ignore[arg-type]
    given = extras is None and None not in data
    if given and (shortcut is None or (isinstance(shortcut, Projection) and not shortcut.before)):
        projection = None if shortcut is None else parts.read(shortcut.conv, shortcut.norm)
        if shortcut is None and parts.output_dtype(x) != x.dtype:
            return None  # autocast narrows the pairs: how a wider x is added is eager's matter, in place or not
        if shortcut is None or projection is not None:
            return _whole(block, x, data, projection, None)
    if _repeated(pairs, shortcut):
        return None
    expected = _output(x, pairs)
    residual: Tensor | None = None
    if shortcut is None:
        residual = x
    elif isinstance(shortcut, Projection):
        start = _run(shortcut.before, x)
        if extras is None and (not isinstance(start, Tensor) or _output(start, [shortcut[1:]]) != expected):
            return None
        shortcut = Projection((), shortcut.conv, shortcut.norm)
    elif shortcut.pure:
        residual = shortcut.module(x)
    if extras is None and (expected is None or (residual is not None and not _fits(residual, *expected))):
        return None
    if given and isinstance(shortcut, Projection):
        residual = _project(start, shortcut, block._rf_state.backend)
    if given and residual is not None:
        return _whole(block, x, data, None, residual)
    if residual is None and isinstance(shortcut, Projection) and start is not x:
        residual = _project(start, shortcut, block._rf_state.backend)
    return _pair_by_pair(block, x, Parts(pairs, shortcut, extras), residual)


def _whole(block: FusedBlock, x: Tensor, data: list[Any], projection: ConvBN | None, identity: Tensor | None) -> Tensor:
    """The block as one op. It checks the call before it does anything; eager may be able to compute what it refuses."""
    backend = block._rf_state.backend
    try:
        return block._rf_op(x, *data, projection, identity, backend=backend)
    except (ValueError, TypeError) as refusal:
        if backend != AUTO or torch.compiler.is_compiling():
            raise
        try:
            return own_forward(block, x)  # type: ignore[no-any-return]
        except Exception:
            raise refusal from None


def _pair_by_pair(block: FusedBlock, x: Tensor, found: Parts, residual: Tensor | None) -> Tensor:
    """Around what stands between the pairs. ``residual``: what is added, None where it is still to be computed."""
    pairs, shortcut, extras = found
    state = block._rf_state
    backend, in_place = state.backend, state.spec.adds == "+="
    late = isinstance(shortcut, Called) and residual is None  # to be called behind the pairs, as eager does
    if state.recompute is not None and extras is None and not late and torch.is_grad_enabled():
        identity = None if residual is x else residual
        whole = _as_recomputed(x, pairs, shortcut if residual is None else None, identity)  # type: ignore[arg-type]
        if whole is not None:
            return residual_block.call_op(whole, state.recompute, parts.training_backend(backend))
    behind = extras or [[]] * len(pairs)
    hidden = x
    for pair, steps in zip(pairs[:-1], behind, strict=False):
        hidden = _run(steps, parts.step(hidden, *pair, "relu", None, backend))
    if not late and residual is None:
        residual = _project(x, shortcut, backend)  # type: ignore[arg-type]
    if not late and not behind[-1]:
        expected = _output(hidden, pairs[-1:])
        if expected is not None and _fits(residual, *expected):
            return parts.step(hidden, *pairs[-1], "relu", residual, backend)
    hidden = _run(behind[-1], parts.step(hidden, *pairs[-1], "none", None, backend))
    added: Any = shortcut.module(x) if late else residual  # type: ignore[union-attr]
    if _fits(added, tuple(hidden.shape), hidden.dtype) and guards.plain_tensor(hidden):
        return functional.add_relu(hidden, added)
    if in_place:
        hidden += added
    else:
        hidden = hidden + added
    return torch.relu_(hidden)


def _output(x: Tensor, pairs: Sequence[Any]) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of what these pairs make of ``x``; None where they do not take it."""
    shape: tuple[int, ...] | None = tuple(x.shape)
    for conv, _ in pairs:
        shape = None if shape is None else parts.output_shape(shape, conv)
    dtype = parts.output_dtype(x)
    if shape is None or (x.dtype != pairs[0][0].weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        return None
    return shape, dtype


def _fits(residual: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor is added to one of this shape and dtype element by element, however the sum is written."""
    return guards.plain_tensor(residual) and residual.shape == shape and residual.dtype == dtype


def _repeated(pairs: list[Pair], shortcut: Shortcut) -> bool:
    """Whether a norm that updates its statistics is there twice: the order of the updates is then eager's."""
    norms = [norm for _, norm in pairs] + ([shortcut.norm] if isinstance(shortcut, Projection) else [])
    return len(set(map(id, norms))) < len(norms) and any(norm.training for norm in norms)


def _as_recomputed(
    x: Tensor, pairs: list[Pair], shortcut: Projection | None, identity: Tensor | None
) -> ResidualBlock | None:
    """The block as data, or None where one of its norms uses other processes."""
    convs = [parts.conv_norm(*pair) for pair in pairs]
    projection = None if shortcut is None else parts.conv_norm(shortcut.conv, shortcut.norm)
    if None in convs or (shortcut is not None and projection is None):
        return None
    return ResidualBlock(x, tuple(convs), projection, identity)  # type: ignore[arg-type]


def _run(steps: Iterable[live.Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _project(x: Tensor, shortcut: Projection, backend: str) -> Tensor:
    """A projection behind the modules before it."""
    return parts.step(x, shortcut.conv, shortcut.norm, "none", None, backend)
