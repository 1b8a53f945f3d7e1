"""Whole residual blocks on the CPU: a chain of fused convolutions over one sub-batch of images at a time."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from resnet_fused.ops import onednn, winograd
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import ConvBN


def supports_onednn(call: BlockCall) -> str | None:
    return onednn.refused(call.x)


def run_onednn(call: BlockCall) -> Tensor:
    """Every convolution by oneDNN."""
    return _run(call, onednn.convolve_relu)


def supports_cpu(call: BlockCall) -> str | None:
    shape, reason = tuple(call.x.shape), None
    for conv in call.convs:
        reason = winograd.refused(call.x, conv, shape)
        if reason is None:
            return onednn.refused(call.x)
        shape = (shape[0], conv.weight.shape[0], *conv.output_size(shape[2], shape[3]))
    return reason


def run_cpu(call: BlockCall) -> Tensor:
    """The convolutions that this project's kernels take by those, the others by oneDNN."""
    return _run(call, _own_or_onednn)


class _Step(Protocol):
    """Convolution, batch norm, sum and ReLU; may write its sum into ``residual`` where ``into_residual`` says so."""

    def __call__(
        self,
        x: Tensor,
        conv: ConvBN,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        *,
        into_residual: bool = False,
    ) -> Tensor: ...


def _own_or_onednn(
    x: Tensor, conv: ConvBN, residual: Tensor | None = None, out: Tensor | None = None, *, into_residual: bool = False
) -> Tensor:
    if winograd.refused(x, conv) is None:
        return winograd.run(x, conv, residual, True, out)
    return onednn.convolve_relu(x, conv, residual, out, into_residual=into_residual)


def _run(call: BlockCall, step: _Step) -> Tensor:
    """The intermediates of a sub-batch are freed and used again by the next; the last step writes into the result."""
    x = call.x.contiguous(memory_format=torch.channels_last)
    identity = call.identity
    if identity is not None:
        identity = identity.contiguous(memory_format=torch.channels_last)
    n = x.shape[0]
    largest, shape = _sizes(call)
    size = onednn.sub_batch(n, largest * x.element_size())
    if size == n:
        return _chain(call, step, x, identity, None)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for at in range(0, n, size):
        part = slice(at, at + size)
        _chain(call, step, x[part], None if identity is None else identity[part], out[part])
    return out


def _chain(call: BlockCall, step: _Step, x: Tensor, identity: Tensor | None, out: Tensor | None) -> Tensor:
    hidden = x
    for conv in call.convs[:-1]:
        hidden = step(hidden, conv)
    last = call.convs[-1]
    if call.shortcut is not None:  # the projection's buffer is ours: the sum may be written into it
        return step(hidden, last, onednn.convolve(x, call.shortcut), out, into_residual=True)
    return step(hidden, last, x if identity is None else identity, out)


def _sizes(call: BlockCall) -> tuple[int, tuple[int, ...]]:
    """Elements of the largest tensor that the block makes, for one image; and the shape of the result."""
    largest = 0
    height, width = call.x.shape[2:]
    for conv in call.convs:
        height, width = conv.output_size(height, width)
        largest = max(largest, conv.weight.shape[0] * height * width)
    return largest, (call.x.shape[0], call.convs[-1].weight.shape[0], height, width)
