"""conv_bn_act by this project's C++ kernels for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops import cpu_convolution
from resnet_fused.ops.convbn import ConvBNActCall


def supports(call: ConvBNActCall) -> str | None:
    return cpu_convolution.refused(call.x, call.conv)


def run(call: ConvBNActCall) -> Tensor:
    x, residual = call.x.contiguous(memory_format=torch.channels_last), call.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    method = cpu_convolution.method_for(call.conv, x.dtype, x.shape)
    return cpu_convolution.run(call._replace(x=x, residual=residual), method)
