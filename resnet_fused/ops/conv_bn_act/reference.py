"""conv_bn_act in eager PyTorch: the oracle, in any dtype and on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops import layout
from resnet_fused.ops.batch_norm_act.call import dense_format
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall


def supports(call: ConvBNActCall) -> str | None:
    return None


def run(call: ConvBNActCall) -> Tensor:
    conv = call.conv
    bias = None if conv.bias is None else conv.bias.to(call.x.dtype)  # float32 beside half precision under autocast
    y = F.conv2d(call.x, conv.weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = F.batch_norm(y, conv.running_mean, conv.running_var, conv.bn_weight, conv.bn_bias, False, 0.0, conv.eps)
    if call.residual is not None:
        y = y + call.residual
    return F.relu(y) if call.act == "relu" else y


def outline(call: ConvBNActCall) -> Tensor:
    """A tensor with the shape and strides of ``run(call)``, in a fraction of its time on fake tensors."""
    conv = call.conv
    y = F.conv2d(call.x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = torch.empty_like(y, memory_format=dense_format(y))  # batch norm
    return y if call.residual is None else y + call.residual


def like_eager(out: Tensor, call: ConvBNActCall) -> Tensor:
    """``out`` with the strides of ``run(call)``, copied only when they differ."""
    return layout.like_eager(out, eager, call.x, (call.conv,), call.residual)


def eager(x: Tensor, convs: tuple[ConvBN | None, ...], addend: Tensor | None) -> Tensor:
    assert convs[0] is not None
    return outline(ConvBNActCall(x, convs[0], addend, "none"))
