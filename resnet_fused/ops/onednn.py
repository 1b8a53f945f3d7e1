"""One convolution with its sum by oneDNN on the CPU: folded and pre-packed weights, for the backends that use it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused.ops import packed
from resnet_fused.ops.convbn import ConvBN

_KIND = packed.new_kind()


def refused(x: Tensor, *convs: ConvBN | None) -> str | None:
    """Why oneDNN cannot take an input like x and these convolutions, or None."""
    if x.device.type != "cpu":
        return f"oneDNN runs on the CPU, x is on {x.device}"
    for conv in convs:
        if conv is not None and _window_in_padding(conv):
            return f"padding {conv.padding} is as wide as the filter, where oneDNN writes beyond its memory"
    return _refused_dtype(x.dtype) or (None if torch._C._get_mkldnn_enabled() else "oneDNN is switched off")


def _window_in_padding(conv: ConvBN) -> bool:
    """Whether some output sees nothing but padding."""
    size = conv.weight.shape
    return conv.padding[0] > conv.dilation[0] * (size[2] - 1) or conv.padding[1] > conv.dilation[1] * (size[3] - 1)


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


class Convolution:
    """One convolution with its batch norm and sum, bound to its prepared weights; channels_last in and out.

    It is right as long as the tensors of ``conv`` are not written to.
    """

    def __init__(self, conv: ConvBN) -> None:
        self._prepared: _Prepared = packed.packed(_KIND, conv, _Prepared)
        self._geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def linear(self, x: Tensor, residual: Tensor | None = None, *, into_residual: bool = False) -> Tensor:
        """Without ReLU. May write its sum into ``residual`` where ``into_residual`` says so."""
        weight, bias = self._prepared.weight(x.shape), self._prepared.bias
        ops = torch.ops.mkldnn
        if residual is None:
            return ops._convolution_pointwise.default(x, weight, bias, *self._geometry, "none", [], "")  # type: ignore[no-any-return]
        _, channels, height, width = residual.shape
        if not into_residual and (channels == 1) != (height * width == 1):
            # Such a sum may be of either memory format: oneDNN of torch 2.11 fails to make a new one.
            residual, into_residual = residual.clone(), True
        if into_residual:
            return ops._convolution_pointwise_.binary(  # type: ignore[no-any-return]
                residual, x, weight, bias, *self._geometry, "add", 1.0, None, [], None
            )
        return ops._convolution_pointwise.binary(  # type: ignore[no-any-return]
            x, residual, weight, bias, *self._geometry, "add", 1.0, None, [], None
        )

    def relu(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, *, into_residual: bool = False
    ) -> Tensor:
        """With ReLU, which keeps NaN as oneDNN's own would not; into ``out`` where it is given."""
        y = self.linear(x, residual, into_residual=into_residual)
        return y.relu_() if out is None else torch.clamp_min(y, 0, out=out)


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
