"""conv_bn_act by this project's CUDA C++ kernels (csrc/conv_bn_act), on devices from compute capability 8.0.

Batch norm is read in the epilogue: nothing is folded and nothing is kept between calls. x is read where it lies when
its channels are adjacent, else copied once per call; so is a weight that is not channels_last.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops import cuda_launch
from resnet_fused.ops.convbn import ConvBNActCall, output_shape, short_dtype
from resnet_fused.ops.cuda_launch import Launch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CudaConfig(NamedTuple):
    """A launch: one of the kernels of csrc/conv_bn_act/instances.h and the parts of its reduction; "" and 0 leave the
    choice to the plan."""

    kernel: str = ""
    splits: int = 0


def supports(call: ConvBNActCall) -> str | None:
    """Why these kernels cannot compute this call, or None when they can."""
    x, conv = call.x, call.conv
    if x.device.type != "cuda":
        return f"its kernels run on CUDA devices, x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"its kernels compute float16, bfloat16 and float32, not {short_dtype(x.dtype)}"
    if _capability(x.device) < (8, 0):
        return "it needs compute capability 8.0"
    return _refusal(x.shape, conv.weight.shape, *conv[7:], x.element_size())


def configs(call: ConvBNActCall) -> tuple[CudaConfig, ...]:
    """Launches that compute this call, for a tuner to measure with ``run(call, config)``: every tile that the channels
    allow, whole and with its reduction in parts. One that the tensors' alignment forbids raises in ``run``."""
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}[call.x.dtype]
    math = "TensorCore" if call.x.dtype != torch.float32 or tf32() else "Ieee"
    channels = call.conv.weight.shape[1]
    found = [
        row
        for row in extension.module().conv_bn_act_kernels()
        if (row["element"], row["math"]) == (element, math) and channels % row["copy"] == 0
    ]
    widest = max(row["copy"] for row in found)
    names = [row["name"] for row in found if row["copy"] == widest]
    return tuple(CudaConfig(name, splits) for name in names for splits in (1, 2, 4, 8))


def run(call: ConvBNActCall, config: CudaConfig | None = None) -> Tensor:
    """Compute the call; the result ``[N, K, P, Q]`` is channels_last."""
    extension.module()
    config = config or CudaConfig()
    return torch.ops.resnet_fused_cuda.conv_bn_act(  # type: ignore[no-any-return]
        call.x, *call.conv, call.residual, call.act == "relu", tf32(), *config
    )


def workspace_bytes(call: ConvBNActCall, config: CudaConfig | None = None) -> int:
    """What :func:`launches` needs beside the output."""
    shape = output_shape(call.conv, tuple(call.x.shape))
    out = torch.empty(shape, dtype=call.x.dtype, device=call.x.device, memory_format=torch.channels_last)
    return _plan(call, out, None, config)[1]


def launches(
    call: ConvBNActCall, out: Tensor, workspace: Tensor | None, config: CudaConfig | None = None
) -> list[Launch]:
    """What :func:`run` launches, into ``out``, a channels_last ``[N, K, P, Q]``.

    ``workspace`` has :func:`workspace_bytes` bytes. Without gaps and in channels_last are x and the residual too.

    Raises:
        ValueError: batch norm's vectors have gaps.
    """
    return [_plan(call, out, workspace, config)[0]]


def _plan(call: ConvBNActCall, out: Tensor, workspace: Tensor | None, config: CudaConfig | None) -> tuple[Launch, int]:
    extension.module()
    conv, plan = cuda_launch.laid_out(call.conv), cuda_launch.new_plan()
    size: int = torch.ops.resnet_fused_cuda.conv_bn_act_plan(
        call.x, *conv, call.residual, call.act == "relu", tf32(), *(config or CudaConfig()), out, workspace, plan
    )
    return Launch("conv_bn_act", plan, cuda_launch.read([conv])), size


def tf32() -> bool:
    """Whether PyTorch allows cuDNN's convolutions, and so these, to multiply float32 in TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined, no-any-return]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=4096)
def _refusal(
    x: torch.Size,
    weight: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    element_size: int,
) -> str | None:
    """What csrc/conv_bn_act/plan.h says about these sizes."""
    return extension.module().conv_bn_act_refusal(  # type: ignore[no-any-return]
        list(x), list(weight), stride, padding, dilation, groups, element_size
    )
