"""One call of add_relu, as the backends receive it, and the checks on it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.ops.convbn import short_dtype


class AddReLUCall(NamedTuple):
    """Two tensors of one shape, dtype and device, of any number of dimensions and any strides."""

    a: Tensor
    b: Tensor

    def describe(self) -> str:
        """Short text for logs: ``bf16-2x64x56x56``."""
        return f"{short_dtype(self.a.dtype)}-{'x'.join(map(str, self.a.shape))}"


def check_call(call: AddReLUCall) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the call is valid."""
    a, b = call
    if not a.is_floating_point():
        raise TypeError(f"a: got {a.dtype}, need a floating-point dtype")
    if a.shape != b.shape:
        raise ValueError(f"b: got shape {tuple(b.shape)}, need that of a, {tuple(a.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"b: got {b.dtype} with a of {a.dtype}, need one dtype")
    if a.device != b.device:
        raise ValueError(f"b: got a tensor on {b.device} with a on {a.device}, need one device")
