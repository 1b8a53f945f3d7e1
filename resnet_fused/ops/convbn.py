"""What one convolution with its batch norm is, as plain data, and the checks that every op makes on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ACTS = ("relu", "none")


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


def check_conv(x: Tensor, conv: ConvBN, name: str = "") -> None:
    """Raise ValueError or TypeError, naming the argument, unless ``conv`` can be applied to ``x``.

    ``name`` ("conv1", say) goes before the argument's name when one op has several convolutions.
    """
    at = f"{name}." if name else ""
    weight = conv.weight
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, need 4 dimensions [N, C, H, W]")
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, need a floating-point dtype")
    if weight.dim() != 4:
        raise ValueError(f"{at}weight: got shape {tuple(weight.shape)}, need 4 dimensions [K, C/groups, R, S]")
    for pair_name in ("stride", "padding", "dilation"):
        pair, least = getattr(conv, pair_name), 0 if pair_name == "padding" else 1
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{at}{pair_name}: got {tuple(pair)}, need two integers of at least {least}")
    out_channels, channels = weight.shape[0], weight.shape[1] * conv.groups
    if conv.groups < 1 or out_channels % conv.groups:
        raise ValueError(f"{at}groups: got {conv.groups}, need a divisor of the {out_channels} output channels")
    if x.shape[1] != channels:
        raise ValueError(
            f"x: got {x.shape[1]} channels, need {channels} for {at}weight of shape {tuple(weight.shape)} "
            f"with groups={conv.groups}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{at}weight: got {weight.dtype} with x of {x.dtype}, need one dtype; convert the module with "
            f".to({x.dtype}) or the input with x.to({weight.dtype}), or run under torch.autocast"
        )
    height, width = conv.output_size(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise ValueError(
            f"x: got an image of {x.shape[2]}x{x.shape[3]}, too small for {at}weight of shape {tuple(weight.shape)} "
            f"with padding={tuple(conv.padding)}, dilation={tuple(conv.dilation)}"
        )
    for label, vector in zip(ConvBN._fields[1:6], conv.tensors()[1:], strict=True):
        if vector is None:
            if label.startswith("running"):
                raise ValueError(f"{at}{label}: got None, need the statistics; without them use the training op")
            continue
        if vector.shape != (out_channels,):
            raise ValueError(f"{at}{label}: got shape {tuple(vector.shape)}, need ({out_channels},)")
        if vector.dtype != x.dtype and not (vector.dtype == torch.float32 and x.dtype != torch.float64):
            raise TypeError(f"{at}{label}: got {vector.dtype}, need {x.dtype} or float32")
        if vector.device != x.device:
            raise ValueError(f"{at}{label}: got a tensor on {vector.device} with x on {x.device}, need one device")
    if weight.device != x.device:
        raise ValueError(f"{at}weight: got a tensor on {weight.device} with x on {x.device}, need one device")


def check_addend(value: Tensor, like_shape: tuple[int, ...], x: Tensor, name: str) -> None:
    """Raise unless ``value`` can be added to an output of ``like_shape`` that has x's dtype and device."""
    if tuple(value.shape) != like_shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, need the output's {like_shape}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: got {value.dtype} with x of {x.dtype}, need one dtype")
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device} with x on {x.device}, need one device")


def check_call(call: ConvBNActCall) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the call is sound."""
    check_conv(call.x, call.conv)
    if call.act not in ACTS:
        raise ValueError(f"act: got {call.act!r}, need one of {ACTS}")
    if call.residual is not None:
        x, conv = call.x, call.conv
        shape = (x.shape[0], conv.weight.shape[0], *conv.output_size(x.shape[2], x.shape[3]))
        check_addend(call.residual, shape, x, "residual")
