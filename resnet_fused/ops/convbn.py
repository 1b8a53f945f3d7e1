"""One convolution with its batch norm, as plain data, and the checks that every op makes on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ACTS = ("relu", "none")

Shape = tuple[int, int, int, int]


class ConvBN(NamedTuple):
    """A convolution followed by batch norm with given statistics: the parameters, not the input.

    weight is ``[K, C/groups, R, S]``; bias (of the convolution), bn_weight, bn_bias, running_mean and running_var are
    ``[K]``, the first three may be None. stride, padding and dilation are (height, width) pairs.
    """

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float = 1e-5
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors, in the order of the registered schemas."""
        return self[:6]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(P, Q) of the convolution's output for an input of this height and width, by conv2d's formula."""
        r, s = self.weight.shape[2:]
        return (
            (height + 2 * self.padding[0] - self.dilation[0] * (r - 1) - 1) // self.stride[0] + 1,
            (width + 2 * self.padding[1] - self.dilation[1] * (s - 1) - 1) // self.stride[1] + 1,
        )


def output_shape(conv: ConvBN, shape: tuple[int, ...]) -> Shape:
    """The shape of the convolution's output for an input of this shape."""
    return (shape[0], conv.weight.shape[0], *conv.output_size(shape[2], shape[3]))


class ConvBNActCall(NamedTuple):
    """One call of conv_bn_act, as the backends receive it: checked, 4-D, pairs expanded."""

    x: Tensor
    conv: ConvBN
    residual: Tensor | None
    act: str

    def describe(self) -> str:
        """Short text for logs: ``bf16-N2-C64x56x56-k3s2``."""
        conv, x = self.conv, self.x
        text = f"{short_dtype(x.dtype)}-N{x.shape[0]}-C{x.shape[1]}x{x.shape[2]}x{x.shape[3]}"
        text += f"-K{conv.weight.shape[0]}k{conv.weight.shape[2]}s{conv.stride[0]}"
        if conv.groups > 1:
            text += f"g{conv.groups}"
        return text + ("-res" if self.residual is not None else "") + f"-{self.act}"


def short_dtype(dtype: torch.dtype) -> str:
    """``bf16`` for torch.bfloat16 and so on."""
    return {
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.float32: "fp32",
        torch.float64: "fp64",
    }.get(dtype, str(dtype).removeprefix("torch."))


def check_input(x: Tensor) -> None:
    """Raise ValueError or TypeError unless ``x`` is a floating-point ``[N, C, H, W]``."""
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, need 4 dimensions [N, C, H, W]")
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, need a floating-point dtype")


def check_conv(x: Tensor, conv: ConvBN, name: str = "", shape: Shape | None = None) -> Shape:
    """The output's shape; raise ValueError or TypeError, naming the argument, unless ``conv`` can be applied.

    Args:
        x: gives dtype and device, and its shape unless ``shape`` is another.
        name: goes before the argument's name when one op has several convolutions ("conv1", say).
        shape: of the convolution's own input, where that is not x.
    """
    at = f"{name}." if name else ""
    weight, dtype, device = conv.weight, x.dtype, x.device
    n, c, h, w = x.shape if shape is None else shape
    if weight.dim() != 4:
        raise ValueError(f"{at}weight: got shape {tuple(weight.shape)}, need 4 dimensions [K, C/groups, R, S]")
    if len(conv.stride) != 2 or min(conv.stride) < 1:
        raise ValueError(f"{at}stride: got {conv.stride}, need two integers of at least 1")
    if len(conv.padding) != 2 or min(conv.padding) < 0:
        raise ValueError(f"{at}padding: got {conv.padding}, need two integers of at least 0")
    if len(conv.dilation) != 2 or min(conv.dilation) < 1:
        raise ValueError(f"{at}dilation: got {conv.dilation}, need two integers of at least 1")
    out_channels, per_group = weight.shape[:2]
    if conv.groups < 1 or out_channels % conv.groups:
        raise ValueError(f"{at}groups: got {conv.groups}, need a divisor of the {out_channels} output channels")
    if c != per_group * conv.groups:
        raise ValueError(
            f"{'x' if shape is None else f'{at}weight'}: the input has {c} channels, {at}weight of shape "
            f"{tuple(weight.shape)} with groups={conv.groups} needs {per_group * conv.groups}"
        )
    if weight.dtype != dtype:
        raise TypeError(
            f"{at}weight: got {weight.dtype} with x of {dtype}, need one dtype; convert the module with "
            f".to({dtype}) or the input with x.to({weight.dtype}), or run under torch.autocast"
        )
    if weight.device != device:
        raise ValueError(f"{at}weight: got a tensor on {weight.device} with x on {device}, need one device")
    height, width = conv.output_size(h, w)
    if height < 1 or width < 1:
        raise ValueError(
            f"x: got an image of {h}x{w}, too small for {at}weight of shape {tuple(weight.shape)} "
            f"with padding={conv.padding}, dilation={conv.dilation}"
        )
    for i, vector in enumerate(conv.tensors()):
        if i == 0:
            continue
        if vector is None:
            if i > 3:
                raise ValueError(f"{at}{ConvBN._fields[i]}: got None, need the statistics, [{out_channels}]")
        elif vector.shape != (out_channels,):
            raise ValueError(f"{at}{ConvBN._fields[i]}: got shape {tuple(vector.shape)}, need ({out_channels},)")
        elif vector.dtype != dtype and (vector.dtype != torch.float32 or dtype == torch.float64):
            raise TypeError(f"{at}{ConvBN._fields[i]}: got {vector.dtype}, need {dtype} or float32")
        elif vector.device != device:
            raise ValueError(
                f"{at}{ConvBN._fields[i]}: got a tensor on {vector.device} with x on {device}, need one device"
            )
    return (n, out_channels, height, width)


def check_addend(value: Tensor, shape: Shape, x: Tensor, name: str) -> None:
    """Raise unless ``value`` can be added to an output of this shape that has x's dtype and device."""
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, need the output's {shape}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: got {value.dtype} with x of {x.dtype}, need one dtype")
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device} with x on {x.device}, need one device")


def check_call(call: ConvBNActCall) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the call is valid."""
    check_input(call.x)
    shape = check_conv(call.x, call.conv)
    if call.act not in ACTS:
        raise ValueError(f"act: got {call.act!r}, need one of {ACTS}")
    if call.residual is not None:
        check_addend(call.residual, shape, call.x, "residual")
