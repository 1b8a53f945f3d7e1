"""conv_bn_act by oneDNN on the CPU: folded and pre-packed weights, bias and residual added inside the convolution.

oneDNN's own ReLU post-op turns NaN into 0, so the ReLU runs after it, in place, or on the way into the result.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused.ops import packed
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall

_CACHE = packed.new_cache()

# Buffers of one sub-batch inside a block. glibc maps each allocation above 32 MB afresh and gives it back when freed,
# so that every use pays for its page faults; below that a freed buffer is used again: the heap is the workspace.
SUB_BATCH_BYTES = 16 << 20


def supports(call: ConvBNActCall) -> str | None:
    if call.x.device.type != "cpu":
        return f"oneDNN runs on the CPU, x is on {call.x.device}"
    return _refused_dtype(call.x.dtype) or (None if torch._C._get_mkldnn_enabled() else "oneDNN is switched off")


@functools.cache
def _refused_dtype(dtype: torch.dtype) -> str | None:
    """Why this dtype cannot be used here: half precision needs instructions that not every CPU has."""
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this build of torch has no fused oneDNN convolutions"
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16:
        able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif dtype == torch.float16:
        able = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    else:
        return f"oneDNN has no convolution in {dtype}"
    return None if able else f"this CPU has no instructions for {dtype}"


def run(call: ConvBNActCall) -> Tensor:
    n = call.x.shape[0]
    x = call.x.contiguous(memory_format=torch.channels_last)
    residual = call.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if call.act == "none":
        return convolve(x, call.conv, residual)
    height, width = call.conv.output_size(x.shape[2], x.shape[3])
    channels = call.conv.weight.shape[0]
    size = sub_batch(n, channels * height * width * x.element_size())
    if size == n:
        return convolve(x, call.conv, residual).relu_()
    out = torch.empty((n, channels, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    for at in range(0, n, size):
        part = slice(at, at + size)
        y = convolve(x[part], call.conv, None if residual is None else residual[part])
        torch.clamp_min(y, 0, out=out[part])  # keeps NaN
    return out


def convolve(x: Tensor, conv: ConvBN, residual: Tensor | None = None, *, into_residual: bool = False) -> Tensor:
    """Convolution, batch norm and sum, without ReLU; channels_last in and out. May write its sum into ``residual``."""
    prepared = packed.packed(_CACHE, conv, _Prepared)
    weight, bias = prepared.weight(x.shape), prepared.bias
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    ops = torch.ops.mkldnn
    if residual is None:
        return ops._convolution_pointwise.default(x, weight, bias, *geometry, "none", [], "")  # type: ignore[no-any-return]
    if into_residual:
        return ops._convolution_pointwise_.binary(  # type: ignore[no-any-return]
            residual, x, weight, bias, *geometry, "add", 1.0, None, [], None
        )
    return ops._convolution_pointwise.binary(  # type: ignore[no-any-return]
        x, residual, weight, bias, *geometry, "add", 1.0, None, [], None
    )


def sub_batch(n: int, bytes_per_image: int) -> int:
    """How many images to take at a time: all, or a share, even where n allows it, with buffers of SUB_BATCH_BYTES."""
    limit = max(1, min(n, SUB_BATCH_BYTES // bytes_per_image))
    for size in range(limit, limit // 2, -1):
        if n % size == 0:
            return size
    return limit


class _Prepared:
    """Folded weights in oneDNN's own layouts.

    The layout that a convolution wants depends on its input's shape; any other is right too, but is then reordered on
    every call (in ResNet-50, float32, batch 1, that costs more than all its arithmetic). So one copy is kept for each
    of the few input shapes that come back. A shape seen once uses what is there: images of ever new sizes do not
    pack the weights anew each time.
    """

    COPIES = 4

    def __init__(self, conv: ConvBN) -> None:
        folded, bias = packed.fold(conv)
        self._folded = folded.contiguous(memory_format=torch.channels_last)
        self._geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._weights: dict[tuple[int, ...], Tensor] = {}
        self._latest: Tensor | None = None
        self._seen_once: set[tuple[int, ...]] = set()
        self.bias = bias.to(conv.weight.dtype)

    def weight(self, shape: tuple[int, ...]) -> Tensor:
        """The weight for an input of this shape."""
        weight = self._weights.get(shape)
        if weight is None:
            if self._latest is not None and shape not in self._seen_once:
                self._seen_once = {shape, *list(self._seen_once)[: 4 * self.COPIES]}
                return self._latest
            with torch.inference_mode(False), torch.no_grad():
                weight = torch.ops.mkldnn._reorder_convolution_weight(self._folded, *self._geometry, shape)
            if len(self._weights) >= self.COPIES:
                self._weights = dict(list(self._weights.items())[1:])
            self._weights[shape] = self._latest = weight
        return weight
