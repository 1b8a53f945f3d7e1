"""conv_bn_act by cuDNN's fused convolutions, through aten: folded weights, bias, residual and ReLU in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops import packed
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall

_CACHE = packed.new_cache()


def supports(call: ConvBNActCall) -> str | None:
    x = call.x
    if x.device.type != "cuda":
        return f"cuDNN runs on CUDA devices, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"cuDNN has no fused convolution in {x.dtype}"
    if call.act != "relu":
        return "cuDNN's fused convolutions in aten end in a ReLU"
    return None if torch.backends.cudnn.enabled else "cuDNN is switched off"


def run(call: ConvBNActCall) -> Tensor:
    conv = call.conv
    weight, bias = packed.packed(_CACHE, conv, _fold)
    x = call.x.contiguous(memory_format=torch.channels_last)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if call.residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)  # type: ignore[no-any-return]
    residual = call.residual.contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.cudnn_convolution_add_relu(  # type: ignore[no-any-return]
        x, weight, residual, 1.0, bias, *geometry
    )


def _fold(conv: ConvBN) -> tuple[Tensor, Tensor]:
    weight, bias = packed.fold(conv)
    return weight.contiguous(memory_format=torch.channels_last), bias.to(weight.dtype)
