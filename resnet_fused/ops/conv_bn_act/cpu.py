"""conv_bn_act by this project's C++ kernels for the CPU: 3x3 convolutions of stride 1 in float32, by Winograd."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops import winograd
from resnet_fused.ops.convbn import ConvBNActCall


def supports(call: ConvBNActCall) -> str | None:
    return winograd.refused(call.x, call.conv)


def run(call: ConvBNActCall) -> Tensor:
    x, residual = call.x.contiguous(memory_format=torch.channels_last), call.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    convolution = winograd.Convolution(call.conv)
    return convolution.relu(x, residual) if call.act == "relu" else convolution.linear(x, residual)
