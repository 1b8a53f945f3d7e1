"""Which backends a fused part would be computed by: for reports."""

from __future__ import annotations

from torch import nn

from resnet_fused import backends
from resnet_fused.modules import parts
from resnet_fused.ops.block import BlockCall, one_kernel
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall

_BLOCK_DEPTH = {"basic_block": 2, "bottleneck": 3}
_SAMPLE = 16  # height and width, in filter extents, of the image that the choice is asked for


def chosen_backend(kind: str, pairs: list[tuple[nn.Conv2d, nn.Module]], backend: str) -> str:
    """The backend asked for, or what "auto" chooses: one name, or several, joined, where convolutions differ.

    "cuda (whole block)" where that backend computes the block in one kernel.
    """
    if backend != backends.AUTO:
        return f"{backend} (whole block)" if _whole_kernel(kind, pairs, backend) else backend
    names: list[str] = []
    for conv, norm in pairs:
        pair = parts.with_statistics(conv, norm)
        name = "eager" if pair is None else _choose(pair)
        if name not in names:
            names.append(name)
    return "+".join(names)


def _whole_kernel(kind: str, pairs: list[tuple[nn.Conv2d, nn.Module]], backend: str) -> bool:
    """Whether the block is one kernel of this GPU backend."""
    if kind not in _BLOCK_DEPTH:
        return False
    depth = _BLOCK_DEPTH[kind]
    found = [parts.with_statistics(conv, norm) for conv, norm in pairs]
    convs = tuple(conv for conv in found if conv is not None)
    if len(convs) != len(found) or len(convs) < depth:
        return False
    x = convs[0].weight.detach().new_zeros(1, convs[0].weight.shape[1] * convs[0].groups, _SAMPLE, _SAMPLE)
    call = BlockCall(x, convs[:depth], convs[depth] if len(convs) > depth else None, None)
    return one_kernel(kind, call, backend)


def _choose(pair: ConvBN) -> str:
    weight = pair.weight
    height, width = (_SAMPLE * d * size for d, size in zip(pair.dilation, weight.shape[2:], strict=True))
    x = weight.detach().new_zeros(1, weight.shape[1] * pair.groups, height, width)
    call = ConvBNActCall(x, pair, None, "relu")
    for name in conv_bn_act.candidates(x, pair):
        if backends.refusal("conv_bn_act", name, call) is None:
            return name
    return "reference"
