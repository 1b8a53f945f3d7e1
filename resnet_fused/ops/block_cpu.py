"""Whole residual blocks on the CPU: a chain of fused convolutions over one sub-batch of images at a time.

``bind(call)`` gives a function that computes this call and others with the same weights, as long as nothing writes to
these, and inputs of the same shapes. It holds what was packed from the weights, not the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused.ops import cpu_convolution, onednn, workspace
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import output_shape
from resnet_fused.ops.cpu_convolution import Convolution

_Bound = Callable[[BlockCall], Tensor]


def supports_onednn(call: BlockCall) -> str | None:
    return onednn.refused(call.x, *call.convs, call.shortcut)


def bind_onednn(call: BlockCall) -> _Bound:
    """Every convolution by oneDNN, one call after the other."""
    size, _, out_shape = _sizes(call)
    *steps, last = [onednn.Convolution(conv) for conv in call.convs]
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
        x, identity = _channels_last(now)
        n = x.shape[0]
        if size == n:
            return chain(x, identity, None)
        out = torch.empty(out_shape, dtype=x.dtype, memory_format=torch.channels_last)
        for at in range(0, n, size):
            part = slice(at, at + size)
            chain(x[part], None if identity is None else identity[part], out[part])
        return out

    return run


def supports_cpu(call: BlockCall) -> str | None:
    convs = call.convs if call.shortcut is None else (*call.convs, call.shortcut)
    return next((reason for conv in convs if (reason := cpu_convolution.refused(call.x, conv))), None)


def bind_cpu(call: BlockCall) -> _Bound:
    """The whole chain in one call of the compiled library."""
    size, inputs, out_shape = _sizes(call)
    convs, dtype = call.convs, call.x.dtype
    if call.shortcut is not None:
        convs, inputs = (*convs, call.shortcut), [*inputs, inputs[0]]
    steps = [
        Convolution(conv, cpu_convolution.method_for(conv, dtype, (size, *shape[1:])))
        for conv, shape in zip(convs, inputs, strict=True)
    ]
    arguments, projects = _joined(steps), call.shortcut is not None
    op = torch.ops.resnet_fused_cpu.block.default

    def run(now: BlockCall) -> Tensor:
        x, identity = _channels_last(now)
        out = torch.empty(out_shape, dtype=dtype, memory_format=torch.channels_last)
        if not op(x, *arguments, projects, identity, out, size):
            now_convs = now.convs if now.shortcut is None else (*now.convs, now.shortcut)
            exact = [Convolution(conv, cpu_convolution.Method.DIRECT) for conv in now_convs]
            op(x, *_joined(exact), projects, identity, out, size)
        return out

    return run


def _joined(steps: list[Convolution]) -> tuple[list[Tensor], list[int]]:
    return [t for step in steps for t in step.packed], [i for step in steps for i in step.geometry]


def _channels_last(call: BlockCall) -> tuple[Tensor, Tensor | None]:
    identity = call.identity
    if identity is not None:
        identity = identity.contiguous(memory_format=torch.channels_last)
    return call.x.contiguous(memory_format=torch.channels_last), identity


def _sizes(call: BlockCall) -> tuple[int, list[tuple[int, ...]], tuple[int, ...]]:
    """Images of a sub-batch, the input shape of every convolution of the main path, and the shape of the output."""
    shapes: list[tuple[int, ...]] = [tuple(call.x.shape)]
    for conv in call.convs:
        shapes.append(output_shape(conv, shapes[-1]))
    largest = max(c * h * w for _, c, h, w in shapes[1:])
    return workspace.sub_batch(call.x.shape[0], largest * call.x.element_size()), shapes[:-1], shapes[-1]
