"""The backends that would compute a fused part, for reports."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.modules import parts
from resnet_fused.ops.add_relu import api as add_relu
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.block import BlockCall, one_kernel
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall
from resnet_fused.tuning import lookup

_BLOCK_DEPTH = {"basic_block": 2, "bottleneck": 3}
_SAMPLE = 16  # height and width, in filter extents, of the image that the choice is asked for


def chosen_backend(kind: str, pairs: list[tuple[nn.Conv2d, nn.Module]], backend: str) -> str:
    """The named backend, or the choice of "auto": one name, or several, joined, where convolutions differ.

    "cuda (whole block)" where that backend computes the block in one kernel. Where the tuning table has calls of these
    weights, the names are those that it gives for the shapes that were tuned: "cpu (tuned)".
    """
    if backend != backends.AUTO:
        return f"{backend} (whole block)" if _whole_kernel(kind, pairs, backend) else backend
    block = _block_call(kind, pairs)
    names = [] if block is None else _tuned(kind, block)
    if names and lookup.CHAIN not in names:
        return _joined(names, True)
    # Its convolutions are looked up by themselves where they run so: in a chain, which a block on a GPU is unasked.
    alone = block is None or lookup.CHAIN in names or block.x.device.type != "cpu"
    measured = bool(names)
    names = [name for name in names if name != lookup.CHAIN]
    for conv, norm in pairs:
        pair = parts.with_statistics(conv, norm)
        found = [] if pair is None or not alone else _tuned("conv_bn_act", _conv_call(pair))
        measured |= bool(found)
        names += found or ["eager" if pair is None else _choose(pair)]
    return _joined(names, measured)


def chosen_sum(x: Tensor) -> str:
    """The same for add_relu of tensors such as ``x``."""
    call = AddReLUCall(x, x)
    names = _tuned("add_relu", call)
    static = (name for name in add_relu.candidates(x) if backends.refusal("add_relu", name, call) is None)
    return _joined(names or [next(static)], bool(names))


def _joined(names: list[str], tuned: bool) -> str:
    return "+".join(dict.fromkeys(names)) + " (tuned)" * tuned


def _tuned(op: str, call: Any) -> list[str]:
    """The backends that the table names for calls with these weights; eager with its memory format if it has one."""
    names = []
    for entry in lookup.alike(op, call):
        whole = isinstance(call, BlockCall) and entry.backend in (lookup.CHAIN, backends.Backend.REFERENCE)
        if whole or backends.tuned(op, call, lookup.Found(entry)) is not None:
            eager = entry.backend == backends.Backend.REFERENCE and entry.config is not None
            names.append(f"{entry.backend} {entry.config}" if eager else entry.backend)
    return names


def _whole_kernel(kind: str, pairs: list[tuple[nn.Conv2d, nn.Module]], backend: str) -> bool:
    """Whether the block is one kernel of this GPU backend."""
    call = _block_call(kind, pairs)
    return call is not None and one_kernel(kind, call, backend)


def _block_call(kind: str, pairs: list[tuple[nn.Conv2d, nn.Module]]) -> BlockCall | None:
    """A call of the block op on a sample image; None for what is no such block."""
    if kind not in _BLOCK_DEPTH:
        return None
    depth = _BLOCK_DEPTH[kind]
    found = [parts.with_statistics(conv, norm) for conv, norm in pairs]
    convs = tuple(conv for conv in found if conv is not None)
    if len(convs) != len(found) or len(convs) < depth:
        return None
    x = _image(convs[0], _SAMPLE, _SAMPLE)
    return BlockCall(x, convs[:depth], convs[depth] if len(convs) > depth else None, None)


def _image(conv: ConvBN, height: int, width: int) -> Tensor:
    return conv.weight.detach().new_zeros(1, conv.weight.shape[1] * conv.groups, height, width)


def _conv_call(pair: ConvBN) -> ConvBNActCall:
    """A call on a sample image."""
    height, width = (_SAMPLE * d * size for d, size in zip(pair.dilation, pair.weight.shape[2:], strict=True))
    return ConvBNActCall(_image(pair, height, width), pair, None, "relu")


def _choose(pair: ConvBN) -> str:
    call = _conv_call(pair)
    for name in conv_bn_act.candidates(call.x, pair):
        if backends.refusal("conv_bn_act", name, call) is None:
            return name
    return "reference"
