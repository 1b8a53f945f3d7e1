"""conv_bn_act by oneDNN on the CPU: folded and pre-packed weights, bias and residual added inside the convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops import onednn, workspace
from resnet_fused.ops.convbn import ConvBNActCall


def supports(call: ConvBNActCall) -> str | None:
    return onednn.refused(call.x, call.conv)


def run(call: ConvBNActCall) -> Tensor:
    n = call.x.shape[0]
    x = call.x.contiguous(memory_format=torch.channels_last)
    residual = call.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    convolution = onednn.Convolution(call.conv)
    if call.act == "none":
        return convolution.linear(x, residual)
    height, width = call.conv.output_size(x.shape[2], x.shape[3])
    channels = call.conv.weight.shape[0]
    size = workspace.sub_batch(n, channels * height * width * x.element_size())
    if size == n:
        return convolution.relu(x, residual)
    out = torch.empty((n, channels, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    for at in range(0, n, size):
        part = slice(at, at + size)
        convolution.relu(x[part], None if residual is None else residual[part], out[part])
    return out
