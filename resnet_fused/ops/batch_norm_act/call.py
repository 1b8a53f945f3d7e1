"""One call of batch_norm_act, and one of its gradient, as the backends receive them, and the checks on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.convbn import ACTS, check_addend, check_input, short_dtype


class BatchNormCall(NamedTuple):
    """Batch norm of x ``[N, C, H, W]``, a residual added, ReLU; all vectors are ``[C]``.

    With training, the batch's own statistics are used and the running ones, where given, follow them by ``momentum``;
    None is the cumulative average over num_batches_tracked batches. Without, the running statistics are used.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    residual: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    act: str

    def describe(self) -> str:
        """Short text for logs: ``bf16-2x64x56x56-res-relu``."""
        residual = "-res" if self.residual is not None else ""
        return f"{short_dtype(self.x.dtype)}-{'x'.join(map(str, self.x.shape))}{residual}-{self.act}"


class GradientCall(NamedTuple):
    """The gradient of batch_norm_act for the gradient of its output.

    The statistics that were used are mean and rstd, in float32 or wider, with training; running_mean and running_var
    without. output decides where ReLU lets pass; None without ReLU. need_x and need_residual say which full-size
    gradients are wanted.
    """

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    mean: Tensor
    rstd: Tensor
    output: Tensor | None
    training: bool
    eps: float
    need_x: bool
    need_residual: bool

    def describe(self) -> str:
        """Short text for logs: ``bf16-2x64x56x56-gradient``."""
        return f"{short_dtype(self.x.dtype)}-{'x'.join(map(str, self.x.shape))}-gradient"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of ``dtype`` are kept: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def dense_format(x: Tensor) -> torch.memory_format:
    """The memory format in which x is normalised, and which the output has: aten's rule for batch norm."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=layout):
            return layout
    return torch._prims_common.suggest_memory_format(x)


def empty_output(x: Tensor) -> Tensor:
    """A tensor for the output, or for a gradient of x's shape."""
    return torch.empty_like(x, memory_format=dense_format(x))


def written(*vectors: Tensor | None) -> None:
    """Tell autograd that a kernel of this package wrote these, so that a gradient that needs the old values says so."""
    for vector in vectors:
        if vector is not None and not vector.is_inference():
            torch.autograd.graph.increment_version(vector)


def check_call(call: BatchNormCall) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the call is valid."""
    x = call.x
    check_input(x)
    channels = x.shape[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        _check_vector(getattr(call, name), name, channels, x)
    if (call.running_mean is None) != (call.running_var is None):
        missing = "running_mean" if call.running_mean is None else "running_var"
        raise ValueError(f"{missing}: got None, need both running statistics or neither")
    if call.act not in ACTS:
        raise ValueError(f"act: got {call.act!r}, need one of {ACTS}")
    if call.residual is not None:
        check_addend(call.residual, tuple(x.shape), x, "residual")  # type: ignore[arg-type]
    if not call.training:
        if call.running_mean is None:
            raise ValueError(f"running_mean: got None, need the statistics, [{channels}], when training is False")
        return
    if call.momentum is None and call.running_mean is not None and call.num_batches_tracked is None:
        raise ValueError("num_batches_tracked: got None, need the count of batches when momentum is None")
    if channels and x.numel() == channels:  # nn.BatchNorm2d's error
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def _check_vector(vector: Tensor | None, name: str, channels: int, x: Tensor) -> None:
    if vector is None:
        return
    if vector.shape != (channels,):
        raise ValueError(f"{name}: got shape {tuple(vector.shape)}, need ({channels},)")
    if vector.dtype != x.dtype and (vector.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{name}: got {vector.dtype}, need {x.dtype} or float32")
    if vector.device != x.device:
        raise ValueError(f"{name}: got a tensor on {vector.device} with x on {x.device}, need one device")
