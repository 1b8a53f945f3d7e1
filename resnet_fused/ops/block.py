"""Shared by the two block ops: a residual block as data, its schema, its chain of convolutions.

A residual block is ``relu(conv_n(… relu(conv_1(x)) …) + shortcut)``, each convolution followed by batch norm with given
statistics. The shortcut is x itself, a projection of x (convolution and batch norm), or a tensor computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import library, packed
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.conv_bn_act import reference, unpacked
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, Shape, check_addend, check_conv, check_input, short_dtype
from resnet_fused.ops.layout import eager_strides, with_strides
from resnet_fused.ops.schemas import SCHEMAS
from resnet_fused.ops.tensor_cache import CACHE
from resnet_fused.tuning import lookup

_FIELDS = len(ConvBN._fields)

_CONV_NAMES = ("conv1", "conv2", "conv3")

RunConv = Callable[[ConvBNActCall], Tensor]


class BlockCall(NamedTuple):
    """One call of a block op, as the backends receive it.

    shortcut projects x; identity is added as it is. At most one of the two is given; with neither, x is added.
    """

    x: Tensor
    convs: tuple[ConvBN, ...]
    shortcut: ConvBN | None
    identity: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but x."""
        convs = self.convs if self.shortcut is None else (*self.convs, self.shortcut)
        return sum((conv[:6] for conv in convs), (self.identity,))

    def describe(self) -> str:
        """Short text for logs: ``bf16-N2-C64x56x56-64-64-256``."""
        widths = "-".join(str(conv.weight.shape[0]) for conv in self.convs)
        n, c, h, w = self.x.shape
        return f"{short_dtype(self.x.dtype)}-N{n}-C{c}x{h}x{w}-{widths}{'-proj' if self.shortcut else ''}"


def run_chain(call: BlockCall, run_conv: RunConv) -> Tensor:
    """The block as a chain of conv_bn_act calls, each computed by ``run_conv``."""
    hidden = call.x
    for conv in call.convs[:-1]:
        hidden = run_conv(ConvBNActCall(hidden, conv, None, "relu"))
    residual = call.x if call.identity is None else call.identity
    if call.shortcut is not None:
        residual = run_conv(ConvBNActCall(call.x, call.shortcut, None, "none"))
    return run_conv(ConvBNActCall(hidden, call.convs[-1], residual, "relu"))


def check_block(call: BlockCall) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the call is valid."""
    x = call.x
    check_input(x)
    shape: Shape | None = None
    for name, conv in zip(_CONV_NAMES, call.convs, strict=False):
        shape = check_conv(x, conv, name, shape)
    assert shape is not None
    if call.shortcut is not None:
        if call.identity is not None:
            raise ValueError("identity: got a tensor beside shortcut, need at most one of the two")
        out = check_conv(x, call.shortcut, "shortcut")
        if out != shape:
            raise ValueError(f"shortcut: gives shape {out}, need the block's {shape}")
    elif call.identity is not None:
        check_addend(call.identity, shape, x, "identity")
    elif x.shape != shape:
        raise ValueError(f"shortcut: got None, but x of shape {tuple(x.shape)} cannot be added to the block's {shape}")


def register(name: str, depth: int) -> Callable[[BlockCall, str], Tensor]:
    """Register ``resnet_fused::name``, a block of ``depth`` convolutions; return the function that calls it."""
    op = library.define(name, SCHEMAS[name])

    def unpack(args: tuple[Any, ...]) -> BlockCall:
        convs = []
        for i in range(depth + 1):
            conv = list(args[1 + i * _FIELDS : 1 + (i + 1) * _FIELDS])
            conv[7:10] = map(tuple, conv[7:10])  # the dispatcher gives lists
            convs.append(ConvBN(*conv))
        shortcut = convs.pop()
        return BlockCall(args[0], tuple(convs), None if shortcut.weight is None else shortcut, args[-2])

    def call_op(call: BlockCall, backend: str) -> Tensor:
        if library.transformed():
            return chain_of_ops(call, backend)
        if library.goes_straight(call.x, call.tensors()):
            return _compute(name, call, backend)
        flat: list[Any] = [call.x]
        for conv in (*call.convs, _NO_CONV if call.shortcut is None else call.shortcut):
            flat += [*conv]  # Dynamo of torch 2.11 adds lists to lists alone
        return op(*flat, call.identity, backend)  # type: ignore[no-any-return]

    def kernel(*args: Any) -> Tensor:
        return _compute(name, unpack(args), args[-1])

    def fake(*args: Any) -> Tensor:
        call = unpack(args)
        check_block(call)
        backends.check_name(args[-1])
        return run_chain(call, reference.run)

    def autograd(*args: Any) -> Tensor:
        """Where a gradient is recorded the block is the chain of differentiable ops; else the op itself."""
        if library.records(args) or library.transformed():
            return chain_of_ops(unpack(args), args[-1])
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)  # type: ignore[no-any-return]

    def autocast(cast: Any, *args: Any) -> Tensor:
        call, backend = unpack(args), args[-1]

        def low(conv: ConvBN) -> ConvBN:
            return conv._replace(weight=library.cast_parameter(cast, conv.weight))

        x, convs = cast(call.x), tuple(map(low, call.convs))
        shortcut = None if call.shortcut is None else low(call.shortcut)
        added = call.x if call.identity is None else call.identity
        if shortcut is None and added.dtype != x.dtype:  # eager's sum takes the wider dtype
            hidden = x
            for conv in convs[:-1]:
                hidden = conv_bn_act.call_op(hidden, conv, None, "relu", backend)
            return torch.relu(conv_bn_act.call_op(hidden, convs[-1], None, "none", backend) + added)
        return call_op(BlockCall(x, convs, shortcut, call.identity), backend)

    library.implement(name, kernel, fake)
    library.LIBRARY.impl(name, autograd, "Autograd")
    library.implement_autocast(name, autocast)
    return call_op


def chain_of_ops(call: BlockCall, backend: str) -> Tensor:
    """The block as registered conv_bn_act calls: what autograd differentiates."""
    check_block(call)
    return run_chain(call, lambda c: conv_bn_act.call_op(c.x, c.conv, c.residual, c.act, backend))


class _Plan(NamedTuple):
    """What stays the same from call to call with the same weights and shapes: the checks have passed."""

    run: Callable[[BlockCall], Tensor]  # holds none of the call's tensors: the cache would keep them alive
    strides: tuple[int, ...]


_PLANS = packed.new_kind()
_PLANS_PER_BLOCK = 8


def _compute(name: str, call: BlockCall, backend: str) -> Tensor:
    """Whole on the CPU where a backend has the block, else convolution by convolution."""
    x, identity = call.x, call.identity
    if x.device.type != "cpu":
        check_block(call)
        run = _whole(name, call, backend)
        if run is None:
            return run_chain(call, lambda c: conv_bn_act.compute(c, backend))
        return with_strides(run(call), eager_strides(eager, x, (*call.convs, call.shortcut), identity))
    convs = call.convs if call.shortcut is None else (*call.convs, call.shortcut)
    tensors = call.tensors()[1:]
    kind = (name, call.shortcut is None, *[conv[6:] for conv in convs])
    plans = CACHE.find(_PLANS, tensors, kind)
    if plans is None:
        if backend == backends.AUTO and not packed.settled(tensors):
            check_block(call)
            return run_chain(call, unpacked.run)
        plans = CACHE.get(_PLANS, tensors, kind, dict)
    switches = (torch._C._get_mkldnn_enabled(), torch.get_num_threads())  # each number of threads has its own table
    key: tuple[Any, ...] = (backend, x.shape, x.stride(), x.dtype, switches)
    if identity is not None:
        key += (identity.shape, identity.stride(), identity.dtype, identity.device)
    plan = plans.get(key)
    if plan is None:
        plan = _plan(name, call, backend)
        if len(plans) >= _PLANS_PER_BLOCK:
            plans.clear()
        plans[key] = plan
    return with_strides(plan.run(call), plan.strides)


def _plan(name: str, call: BlockCall, backend: str) -> _Plan:
    """Check the call and choose its backend."""
    check_block(call)
    strides = eager_strides(eager, call.x, (*call.convs, call.shortcut), call.identity)
    whole = _whole(name, call, backend)
    return _Plan(whole or (lambda now: run_chain(now, lambda c: conv_bn_act.compute(c, backend))), strides)


def _whole(name: str, call: BlockCall, backend: str) -> Callable[[BlockCall], Tensor] | None:
    """What computes blocks like this one as one, if there is a backend for it; None for the chain."""
    server = whole(name, call, backend)
    return None if server is None else backends.bind(server, call)


def whole(name: str, call: BlockCall, backend: str) -> backends.Server | None:
    """The backend that computes such a block as one, if there is one; None for the chain."""
    if call.x.numel() == 0:
        return None
    candidates: tuple[str, ...] = (backends.check_name(backend),)
    if backend == backends.AUTO:
        found = lookup.find(name, call)
        by, layout = (None, None) if found is None else (found.entry.backend, found.entry.config)
        if by == lookup.CHAIN:
            return None
        if by == backends.Backend.REFERENCE and layout in (None, *lookup.LAYOUTS):
            return lookup.Configured(_eager_whole, layout)
        server = None if found is None else backends.tuned(name, call, found)
        if server is not None:
            return server
        candidates = ("cpu", "onednn") if call.x.device.type == "cpu" else ()
    for candidate in candidates:
        if backends.refusal(name, candidate, call) is None:
            return backends.choose(name, call, candidate, ())
        if backends.implementation("conv_bn_act", candidate) is None:
            backends.choose(name, call, candidate, ())  # nor can it be a chain: raises, saying why
    return None


def _eager_whole(call: BlockCall, layout: str | None) -> Tensor:
    """The block by eager PyTorch, in the call's memory format or another."""
    if layout is not None:
        from resnet_fused.tuning.layouts import turned

        call = turned(call, layout)
    return run_chain(call, reference.run)


def one_kernel(name: str, call: BlockCall, backend: str) -> bool:
    """Whether the block is one kernel of the named backend; otherwise it is a chain of conv_bn_act.

    "cuda" alone has such a choice; "auto" stays with the chain, since no GPU has timed the whole-block kernels yet.
    """
    return backends.check_name(backend) == "cuda" and backends.refusal(name, backend, call) is None


def eager(x: Tensor, convs: tuple[ConvBN | None, ...], addend: Tensor | None) -> Tensor:
    *main, shortcut = convs
    return run_chain(BlockCall(x, tuple(c for c in main if c is not None), shortcut, addend), reference.outline)


_NO_CONV = (None, None, None, None, None, None, 1e-5, (1, 1), (0, 0), (1, 1), 1)
