"""Convolutions on the CPU by the compiled library's own kernels, with batch norm, residual and ReLU in the same pass.

Two methods (csrc/conv_bn_act), in float32, or of bfloat16 with sums in float32: the sum as it is written; and for 3x3
filters of stride 1 Winograd's F(2x2, 3x3), whose 16 multiplications stand for 36. In float32 its sums are shorter than
direct ones, so the rounding error is of the same size; in bfloat16 its transformed factors are rounded once, which
costs about what eager's rounding between convolution, batch norm and sum does. That holds for input of about one size
throughout; for any other the kernel asks for the direct sum (csrc/conv_bn_act/balance.h).
"""

from __future__ import annotations

import enum
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops import packed
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, output_shape

_MEBIBYTE = 1 << 20
_PANEL = 32  # output channels computed together
# Below these Winograd's error in bfloat16 varies too much: it is one rounding of each transformed factor, and has to
# average out over the channels; eager's, the measure of it, is known less well from few outputs.
_ROUNDED_CHANNELS = 64
_ROUNDED_OUTPUTS = 16384  # of an image
_TRANSFORMED = 64  # pixels of the output from which transforming the filters pays, though it is for one call
_UNITS = 256  # of a sum taken at a time, of 32 bits each; see csrc/conv_bn_act/direct.h


class Method(enum.IntEnum):
    """How a convolution is computed; the numbers are those of csrc/conv_bn_act/cpu.h.

    UNPACKED is the direct sum with the weight as it lies, for weights that may be new at each call.
    """

    DIRECT = 0
    WINOGRAD = 1
    UNPACKED = 2


_KINDS = {method: packed.new_kind() for method in Method}
_FINITE = packed.new_kind()


def refused(x: Tensor, conv: ConvBN) -> str | None:
    """Why the kernels do not compute ``conv`` of an input like x from packed weights, or None."""
    reason = refused_unpacked(x, conv)
    if reason is None and any(conv.padding) and not packed.packed(_FINITE, conv, _finite):
        reason = "its kernels multiply padding by the weights, as eager does not, and some of these are not finite"
    return reason


def refused_unpacked(x: Tensor, conv: ConvBN) -> str | None:
    """The same for weights that are not packed: the kernel itself finds those that are not finite."""
    if x.device.type != "cpu":
        return f"its kernels run on the CPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"its kernels compute float32 and bfloat16, not {x.dtype}"
    reason = unavailable()
    if reason is None and conv.groups != 1:
        reason = f"its kernels compute convolutions of one group, not {conv.groups}"
    if reason is None and conv.weight.shape[0] % _PANEL:
        reason = f"its kernels need output channels in multiples of {_PANEL}, got {conv.weight.shape[0]}"
    if reason is None and x.dtype == torch.bfloat16 and not instructions(bf16=True):
        reason = "its bfloat16 kernels need AVX512_BF16, which this CPU lacks"
    return reason


def _finite(conv: ConvBN) -> bool:
    return bool(conv.weight.sum(dtype=torch.float32).isfinite())


@functools.cache
def unavailable() -> str | None:
    """Why no kernel can run in this process, or None."""
    reason = extension.missing()
    if reason is None and not instructions():
        reason = "its kernels need AVX2, which this CPU lacks"
    return reason


@functools.cache
def instructions(*, bf16: bool = False) -> str:
    """The vector instructions used here: "avx512", "avx2" or, for bfloat16, "avx512bf16"; "" where there are none."""
    extension.module()
    return torch.ops.resnet_fused_cpu.instructions(bf16)  # type: ignore[no-any-return]


def method_for(conv: ConvBN, dtype: torch.dtype, shape: tuple[int, ...]) -> Method:
    """The faster method for an input of this shape, of those that are exact enough."""
    geometry = (tuple(conv.weight.shape[2:]), conv.stride, conv.dilation)
    if geometry != ((3, 3), (1, 1), (1, 1)) or shape[1] % 16:
        return Method.DIRECT
    n, channels, height, width = output_shape(conv, shape)
    if dtype == torch.bfloat16 and (shape[1] < _ROUNDED_CHANNELS or channels * height * width < _ROUNDED_OUTPUTS):
        return Method.DIRECT
    if min(shape[2:]) < 2:  # a tile sees no more than two pixels, and one of them outweighs the other
        return Method.DIRECT
    tiles = n * -(-height // 2) * -(-width // 2)
    # The transformed filters are 16/9 as large: few tiles pay for that only where they come from a cache near by.
    large = 16 * conv.weight.numel() // 9 * dtype.itemsize > _MEBIBYTE
    return Method.DIRECT if large and tiles < 16 else Method.WINOGRAD


class Convolution:
    """What the compiled library takes of one convolution with its batch norm: packed weights and geometry.

    It is right as long as the tensors of ``conv`` are not written to; it does not refer to them, but for UNPACKED.
    keep: whether to take packed weights from the cache, and leave them there.
    """

    def __init__(self, conv: ConvBN, method: Method, keep: bool = True) -> None:
        prepare = _PREPARE[method]
        kept = keep and method != Method.UNPACKED
        self.packed: list[Tensor] = packed.packed(_KINDS[method], conv, prepare) if kept else prepare(conv)
        self.geometry = [int(method), *conv.weight.shape[2:], *conv.stride, *conv.padding, *conv.dilation]


def run(call: ConvBNActCall, method: Method, isa: str = "", out: Tensor | None = None) -> Tensor:
    """The call, of channels_last tensors, in ``out`` where it is given. ``residual`` is not written to.

    Where the library refuses Winograd's method, the sum as written is taken, which rounds less for unbalanced input and
    spreads no infinity or NaN. isa: the instructions to use, one of :func:`instructions`; "" for the widest.
    """
    out = _empty(call) if out is None else out
    return out if _try(call, Convolution(call.conv, method), isa, out) else run(call, Method.DIRECT, isa, out)


def _empty(call: ConvBNActCall) -> Tensor:
    shape = output_shape(call.conv, call.x.shape)
    return torch.empty(shape, dtype=call.x.dtype, memory_format=torch.channels_last)


def _try(call: ConvBNActCall, step: Convolution, isa: str, out: Tensor) -> bool:
    """Compute ``out``; False where the library says that the method is not right for the numbers that it saw."""
    op = torch.ops.resnet_fused_cpu.conv_bn_act.default
    return op(call.x, step.packed, step.geometry, call.residual, call.act == "relu", out, isa)  # type: ignore[no-any-return]


def run_unpacked(call: ConvBNActCall) -> Tensor | None:
    """The call, packing nothing that is kept; None where the kernels do not compute it so.

    Filters are read as they lie, but for Winograd's, which are transformed where an image has many pixels.
    """
    x, conv, residual, _ = call
    if refused_unpacked(x, conv) is not None:
        return None
    conv = conv._replace(weight=_rows(conv.weight))
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    call = ConvBNActCall(x.contiguous(memory_format=torch.channels_last), conv, residual, call.act)
    out = _empty(call)
    pixels = out.shape[0] * out.shape[2] * out.shape[3]
    if pixels >= _TRANSFORMED and x.dtype == torch.float32:
        method = method_for(conv, x.dtype, x.shape)
        if method == Method.WINOGRAD and _try(call, Convolution(conv, method, keep=False), "", out):
            return out
    return out if _try(call, Convolution(conv, Method.UNPACKED), "", out) else None


def _rows(weight: Tensor) -> Tensor:
    """``weight`` with each output channel's filter in one piece."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _prepare_winograd(conv: ConvBN) -> list[Tensor]:
    """Filters as csrc/conv_bn_act/winograd.h wants them."""
    filters = torch.ops.resnet_fused_cpu.winograd_filters(_rows(conv.weight.float()))
    if conv.weight.dtype == torch.bfloat16:  # pairs of channels side by side
        filters = filters.bfloat16().unflatten(2, (-1, 2)).transpose(3, 4).contiguous()
    return [filters, *_affine(conv)]


def _prepare_direct(conv: ConvBN) -> list[Tensor]:
    """Filters as csrc/conv_bn_act/direct.h wants them: part by part of the sum, panel by panel of output channels."""
    channels = conv.weight.shape[0]
    elements = 4 // conv.weight.element_size()
    rows = conv.weight.permute(0, 2, 3, 1).reshape(channels, -1)
    rows = F.pad(rows, (0, -rows.shape[1] % elements))
    panels = rows.view(channels // _PANEL, _PANEL, -1, elements).permute(0, 2, 1, 3)
    parts = -(-panels.shape[1] // _UNITS)
    step = -(-panels.shape[1] // parts)
    return [torch.cat([part.flatten() for part in panels.split(step, 1)]), *_affine(conv)]


def _affine(conv: ConvBN) -> tuple[Tensor, Tensor]:
    """What batch norm and the convolution's bias do to the sums, found in float64."""
    return torch.ops.resnet_fused_cpu.affine(*conv[1:6], conv.eps).unbind()  # type: ignore[no-any-return]


def _as_it_lies(conv: ConvBN) -> list[Tensor]:
    return [conv.weight, *_affine(conv)]


_PREPARE = {Method.DIRECT: _prepare_direct, Method.WINOGRAD: _prepare_winograd, Method.UNPACKED: _as_it_lies}
