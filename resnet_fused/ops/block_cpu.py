"""Whole residual blocks on the CPU: a chain of fused convolutions over one sub-batch of images at a time.

``bind(call)`` gives a function that computes this call and others with the same weights, as long as nobody writes to
these, and inputs of the same shapes. It holds what was packed from the weights, not the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused.ops import onednn, winograd
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import ConvBN

_Bound = Callable[[BlockCall], Tensor]
_Make = Callable[[ConvBN, Tensor, tuple[int, ...]], "onednn.Convolution | winograd.Convolution"]


def supports_onednn(call: BlockCall) -> str | None:
    return onednn.refused(call.x, *call.convs, call.shortcut)


def bind_onednn(call: BlockCall) -> _Bound:
    """Every convolution by oneDNN."""
    return _bind(call, lambda conv, x, shape: onednn.Convolution(conv))


def supports_cpu(call: BlockCall) -> str | None:
    reason = None
    for conv, shape in zip(call.convs, _shapes(call), strict=True):
        reason = winograd.refused(call.x, conv, shape)
        if reason is None:
            return onednn.refused(call.x, *call.convs, call.shortcut)
    return reason


def bind_cpu(call: BlockCall) -> _Bound:
    """The convolutions that this project's kernels take by those, the others by oneDNN."""
    return _bind(call, _own_or_onednn)


def _own_or_onednn(conv: ConvBN, x: Tensor, shape: tuple[int, ...]) -> onednn.Convolution | winograd.Convolution:
    return onednn.Convolution(conv) if winograd.refused(x, conv, shape) else winograd.Convolution(conv)


def _bind(call: BlockCall, make: _Make) -> _Bound:
    n = call.x.shape[0]
    inputs = _shapes(call)
    outputs = [*inputs[1:], _output_shape(call.convs[-1], inputs[-1])]
    size = onednn.sub_batch(n, max(c * h * w for _, c, h, w in outputs) * call.x.element_size())
    *steps, last = [make(conv, call.x, (size, *shape[1:])) for conv, shape in zip(call.convs, inputs, strict=True)]
    projection = None if call.shortcut is None else onednn.Convolution(call.shortcut)

    def chain(x: Tensor, identity: Tensor | None, out: Tensor | None) -> Tensor:
        hidden = x
        for step in steps:
            hidden = step.relu(hidden)
        if projection is not None:  # its buffer is ours: the sum may be written into it
            return last.relu(hidden, projection.linear(x), out, into_residual=True)
        return last.relu(hidden, x if identity is None else identity, out)

    def run(now: BlockCall) -> Tensor:
        """The intermediates of a sub-batch are freed and used again by the next; the last step writes the result."""
        x, identity = now.x.contiguous(memory_format=torch.channels_last), now.identity
        if identity is not None:
            identity = identity.contiguous(memory_format=torch.channels_last)
        if size == n:
            return chain(x, identity, None)
        out = torch.empty(outputs[-1], dtype=x.dtype, memory_format=torch.channels_last)
        for at in range(0, n, size):
            part = slice(at, at + size)
            chain(x[part], None if identity is None else identity[part], out[part])
        return out

    return run


def _shapes(call: BlockCall) -> list[tuple[int, ...]]:
    """The input shape of every convolution of the main path."""
    shapes = [tuple(call.x.shape)]
    for conv in call.convs[:-1]:
        shapes.append(_output_shape(conv, shapes[-1]))
    return shapes


def _output_shape(conv: ConvBN, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], conv.weight.shape[0], *conv.output_size(shape[2], shape[3]))
