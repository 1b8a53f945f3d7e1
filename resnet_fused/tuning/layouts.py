"""Eager PyTorch in a memory format other than the call's own: x is copied on every call, the weights once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resnet_fused.ops import packed
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall
from resnet_fused.tuning.lookup import LAYOUTS

_KINDS = {name: packed.new_kind() for name in LAYOUTS}


def configs(call: Any) -> tuple[str, ...]:
    """The memory formats in which something of a convolution's or a block's call does not lie yet."""
    convs = [call.conv] if isinstance(call, ConvBNActCall) else [*call.convs, call.shortcut]
    weights = [conv.weight for conv in convs if conv is not None]
    return tuple(
        name
        for name, layout in LAYOUTS.items()
        if not all(tensor.is_contiguous(memory_format=layout) for tensor in (call.x, *weights))
    )


def turned(call: Any, name: str) -> Any:
    """The call with its tensors in this memory format."""
    changed: dict[str, Any] = {}
    for field, value in zip(call._fields, call, strict=True):
        if isinstance(value, Tensor):
            changed[field] = value.contiguous(memory_format=LAYOUTS[name])
        elif isinstance(value, ConvBN):
            changed[field] = _conv(value, name)
        elif field == "convs":
            changed[field] = tuple(_conv(conv, name) for conv in value)
    return call._replace(**changed)


def _conv(conv: ConvBN, name: str) -> ConvBN:
    layout = LAYOUTS[name]
    if conv.weight.is_contiguous(memory_format=layout):
        return conv
    weight = packed.packed(_KINDS[name], conv, lambda c: c.weight.contiguous(memory_format=layout))
    return conv._replace(weight=weight)


def run(call: ConvBNActCall, name: str) -> Tensor:
    """A convolution's call by eager PyTorch in this memory format."""
    return reference.run(turned(call, name))
