"""conv_bn_act by cuDNN's fused convolutions, through aten: folded weights, bias, residual and ReLU in one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from resnet_fused.ops import packed
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall

_KIND = packed.new_kind()
_TRIED: dict[Hashable, str | None] = {}
_MOST_TRIED = 4096


def supports(call: ConvBNActCall) -> str | None:
    """Why cuDNN cannot compute this call, or None when it can.

    No table lists the shapes that its fused convolutions take, so each problem is tried once. That is not done while a
    CUDA graph is captured: ``resnet_fused.warmup`` comes before.
    """
    reason = _unsuitable(call)
    if reason is not None:
        return reason
    x, conv = call.x, call.conv
    problem = (x.shape, x.dtype, x.device, conv.weight.shape, conv[6:], call.residual is None)
    if problem not in _TRIED:
        if torch.cuda.is_current_stream_capturing():
            return "cuDNN was not tried on these shapes before the capture of this graph; call resnet_fused.warmup"
        if len(_TRIED) >= _MOST_TRIED:
            _TRIED.clear()
        _TRIED[problem] = _try(call)
    return _TRIED.get(problem)


def _unsuitable(call: ConvBNActCall) -> str | None:
    x = call.x
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"cuDNN has no fused convolution in {x.dtype}"
    if call.act != "relu":
        return "cuDNN's fused convolutions in aten end in a ReLU"
    if torch.are_deterministic_algorithms_enabled():
        return "aten does not ask cuDNN's fused convolutions for deterministic algorithms"
    if not torch.backends.cudnn.enabled:
        return "cuDNN is switched off"
    return None if x.device.type == "cuda" else f"cuDNN runs on CUDA devices, x is on {x.device}"


def _try(call: ConvBNActCall) -> str | None:
    """Why these shapes are not for cuDNN: it refuses them, or writes where it must only read."""
    residual = None
    if call.residual is not None:
        residual = torch.ones_like(call.residual, memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            run(call._replace(residual=residual))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"cuDNN refuses these shapes: {str(error).splitlines()[0]}"
    written = residual is not None and not bool((residual == 1).all())
    return "cuDNN writes its result into the residual" if written else None


def run(call: ConvBNActCall) -> Tensor:
    """Compute the call; the result is channels_last."""
    return bind(call)(call)


def bind(call: ConvBNActCall) -> Callable[[ConvBNActCall], Tensor]:
    """What computes calls with these weights; it holds them as they are packed now."""
    conv = call.conv
    weight, bias = packed.packed(_KIND, conv, _fold)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def compute(call: ConvBNActCall) -> Tensor:
        x = call.x.contiguous(memory_format=torch.channels_last)
        if call.residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        residual = call.residual.contiguous(memory_format=torch.channels_last)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    return compute


def _fold(conv: ConvBN) -> tuple[Tensor, Tensor]:
    weight, bias = packed.fold(conv)
    return weight.contiguous(memory_format=torch.channels_last), bias.to(weight.dtype)
