"""Which backends a fused part would be computed by: for reports."""

from __future__ import annotations

from torch import nn

from resnet_fused import backends
from resnet_fused.modules import parts
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall

_SAMPLE = 16  # height and width, in filter extents, of the image that the choice is asked for


def chosen_backend(kind: str, pairs: list[tuple[nn.Conv2d, nn.Module]], backend: str) -> str:
    """The backend asked for, or what "auto" chooses: one name, or several, joined, where convolutions differ."""
    if backend != backends.AUTO:
        return backend
    names: list[str] = []
    for conv, norm in pairs:
        pair = parts.with_statistics(conv, norm)
        name = "eager" if pair is None else _choose(pair)
        if name not in names:
            names.append(name)
    return "+".join(names)


def _choose(pair: ConvBN) -> str:
    weight = pair.weight
    height, width = (_SAMPLE * d * size for d, size in zip(pair.dilation, weight.shape[2:], strict=True))
    x = weight.detach().new_zeros(1, weight.shape[1] * pair.groups, height, width)
    call = ConvBNActCall(x, pair, None, "relu")
    for name in conv_bn_act.candidates(x, pair):
        if backends.refusal("conv_bn_act", name, call) is None:
            return name
    return "reference"
