"""conv_bn_act with weights that are not packed, because they may be new at each call.

On a CPU the compiled library takes the weight as it lies, where it can. Everything else, gradients included, is left to
operations of aten, also where the input is channels_last and the weight is not: aten then copies the weight at each
call, which takes longer than convolving a small image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops import cpu_convolution
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall

# aten computes smaller inputs of one image by a matrix product itself: ConvParams::use_mkldnn.
_SMALL = 20480


def run(call: ConvBNActCall) -> Tensor:
    """The call, with eager's strides; below autograd."""
    out = cpu_convolution.run_unpacked(call)
    return differentiable(call) if out is None else reference.like_eager(out, call)


def differentiable(call: ConvBNActCall) -> Tensor:
    """The call by operations that autograd records, with eager's strides."""
    conv, residual = call.conv, call.residual
    y = _by_matrix_product(call.x, conv) if _small(call.x, conv) else _convolve(call.x, conv)
    y = F.batch_norm(y, conv.running_mean, conv.running_var, conv.bn_weight, conv.bn_bias, False, 0.0, conv.eps)
    if residual is not None:  # in place where that changes neither dtype nor strides
        y = y.add_(residual) if (residual.dtype, residual.stride()) == (y.dtype, y.stride()) else y + residual
    return F.relu_(y) if call.act == "relu" else y


def _bias(x: Tensor, conv: ConvBN) -> Tensor | None:
    return None if conv.bias is None else conv.bias.to(x.dtype)  # float32 beside half precision under autocast


def _convolve(x: Tensor, conv: ConvBN) -> Tensor:
    return F.conv2d(x, conv.weight, _bias(x, conv), conv.stride, conv.padding, conv.dilation, conv.groups)


def _small(x: Tensor, conv: ConvBN) -> bool:
    """Whether aten would copy a weight in order to convolve a small channels_last image."""
    weight = conv.weight
    if x.device.type != "cpu" or x.shape[0] != 1 or conv.groups != 1 or x.numel() > _SMALL or x.is_contiguous():
        return False
    return (
        weight.shape[2:].numel() > 1 and weight.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )


def _by_matrix_product(x: Tensor, conv: ConvBN) -> Tensor:
    """The convolution as a product of the image's windows, [pixels, C·R·S], with the weight as it lies, [K, C·R·S]."""
    weight, bias = conv.weight, _bias(x, conv)
    windows = F.unfold(x, weight.shape[2:], conv.dilation, conv.padding, conv.stride)[0].t()
    filters = weight.view(weight.shape[0], -1).t()
    y = windows @ filters if bias is None else torch.addmm(bias, windows, filters)
    return y.view(1, *conv.output_size(*x.shape[2:]), -1).permute(0, 3, 1, 2)
