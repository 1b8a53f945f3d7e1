"""Whole residual blocks by oneDNN on the CPU: a chain of fused convolutions over one sub-batch of images at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.conv_bn_act import onednn
from resnet_fused.ops.convbn import ConvBNActCall


def supports(call: BlockCall) -> str | None:
    return onednn.supports(ConvBNActCall(call.x, call.convs[0], None, "relu"))


def run(call: BlockCall) -> Tensor:
    """The intermediates of a sub-batch are freed and used again by the next; the last ReLU writes into the result."""
    x = call.x.contiguous(memory_format=torch.channels_last)
    identity = call.identity
    if identity is not None:
        identity = identity.contiguous(memory_format=torch.channels_last)
    n = x.shape[0]
    size = onednn.sub_batch(n, _largest_numel(call) * x.element_size())
    if size == n:
        return _chain(call, x, identity).relu_()
    out: Tensor | None = None
    for at in range(0, n, size):
        part = slice(at, at + size)
        y = _chain(call, x[part], None if identity is None else identity[part])
        if out is None:
            out = torch.empty((n, *y.shape[1:]), dtype=y.dtype, memory_format=torch.channels_last)
        torch.clamp_min(y, 0, out=out[part])  # keeps NaN
    assert out is not None
    return out


def _chain(call: BlockCall, x: Tensor, identity: Tensor | None) -> Tensor:
    """The block without its last ReLU."""
    hidden = x
    for conv in call.convs[:-1]:
        hidden = onednn.convolve(hidden, conv).relu_()
    last = call.convs[-1]
    if call.shortcut is not None:  # the projection's buffer is ours: the sum may be written into it
        return onednn.convolve(hidden, last, onednn.convolve(x, call.shortcut), into_residual=True)
    return onednn.convolve(hidden, last, x if identity is None else identity)


def _largest_numel(call: BlockCall) -> int:
    """Elements of the largest tensor that the block makes, for one image."""
    largest = 0
    height, width = call.x.shape[2:]
    for conv in call.convs:
        height, width = conv.output_size(height, width)
        largest = max(largest, conv.weight.shape[0] * height * width)
    return largest
