"""Whole bottlenecks by this project's CUDA C++ kernels (csrc/bottleneck): one launch, nothing between its convolutions
in global memory.

They compute bfloat16 and float16 in channels_last, for the blocks of ResNet's stages 2 and 3 (64 and 128 hidden
channels, no groups, no dilation). Both hidden tensors are rounded to x's dtype once; sums, batch norm and the
shortcut's addition are float32. Batch norm is read in the epilogues: nothing is folded and nothing is kept between
calls. x is read where it lies when its channels are adjacent and its pixels aligned, else copied once per call; so is a
weight that is not channels_last.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops import cuda_launch
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import ConvBN, short_dtype
from resnet_fused.ops.cuda_launch import Launch

_DTYPES = (torch.bfloat16, torch.float16)

_ConvSizes = tuple[tuple[int, ...], tuple[int, int], tuple[int, int], tuple[int, int], int]


def supports(call: BlockCall) -> str | None:
    """Why these kernels cannot compute this block, or None when they can."""
    x = call.x
    if x.device.type != "cuda":
        return f"its kernels run on CUDA devices, x is on {x.device}"
    if call.identity is not None:
        return "its whole-block kernels add x or a projection of x, no other tensor"
    if x.dtype not in _DTYPES:
        return f"its whole-block kernels compute bfloat16 and float16, not {short_dtype(x.dtype)}"
    capability, shared, multiprocessors = _device(x.device)
    if capability < (8, 0):
        return "it needs compute capability 8.0"
    return kernel_for(call, shared, multiprocessors)[1]


def configs(call: BlockCall) -> tuple[str, ...]:
    """The kernels that compute this block on its device, the default first, for a tuner to measure with
    ``run(call, config)``."""
    _, shared, multiprocessors = _device(call.x.device)
    default = kernel_for(call, shared, multiprocessors)[0]
    rows = {row["name"]: row for row in extension.module().bottleneck_kernels()}
    keys = ("element", "mid", "cin", "stride", "project")

    def problem(name: str) -> tuple[object, ...]:
        return tuple(rows[name][key] for key in keys)

    others = [name for name, row in rows.items() if row["shared"] <= shared and name != default]
    return (default, *(name for name in others if problem(name) == problem(default))) if default else ()


def run(call: BlockCall, config: str = "") -> Tensor:
    """Compute the block; the result ``[N, 4·mid, P, Q]`` is channels_last. config names a kernel, "" leaves it."""
    extension.module()
    flat = [value for conv in call.convs for value in conv]
    flat += _NO_CONV if call.shortcut is None else call.shortcut
    return torch.ops.resnet_fused_cuda.bottleneck(call.x, *flat, call.identity, config)  # type: ignore[no-any-return]


def workspace_bytes(call: BlockCall, config: str = "") -> int:
    """Nothing beside the output."""
    return 0


def launches(call: BlockCall, out: Tensor, workspace: Tensor | None, config: str = "") -> list[Launch]:
    """What :func:`run` launches, into ``out``, a channels_last ``[N, 4·mid, P, Q]``; so is x.

    Raises:
        ValueError: batch norm's vectors have gaps.
    """
    extension.module()
    convs = [cuda_launch.laid_out(conv) for conv in call.convs]
    shortcut = None if call.shortcut is None else cuda_launch.laid_out(call.shortcut)
    plan = cuda_launch.new_plan()
    flat = [value for conv in (*convs, shortcut or _NO_CONV) for value in conv]
    torch.ops.resnet_fused_cuda.bottleneck_plan(call.x, *flat, call.identity, config, out, plan)
    return [Launch("bottleneck", plan, cuda_launch.read([*convs, shortcut]))]


def kernel_for(call: BlockCall, shared: int, multiprocessors: int) -> tuple[str, str | None]:
    """The kernel for this block on a device of so many multiprocessors whose thread blocks may have ``shared`` bytes of
    shared memory, and None; or "" and the reason why there is none."""
    shortcut = None if call.shortcut is None else _sizes(call.shortcut)
    convs = tuple(map(_sizes, call.convs))
    return _choice(tuple(call.x.shape), convs, shortcut, call.x.dtype == torch.bfloat16, shared, multiprocessors)


def _sizes(conv: ConvBN) -> _ConvSizes:
    return (tuple(conv.weight.shape), conv.stride, conv.padding, conv.dilation, conv.groups)


@functools.lru_cache(maxsize=4096)
def _choice(
    x: tuple[int, ...], convs: tuple[_ConvSizes, ...], shortcut: _ConvSizes | None, bf16: bool, *device: int
) -> tuple[str, str | None]:
    """What csrc/bottleneck/plan.h says about these sizes."""
    return extension.module().bottleneck_choice(x, convs, shortcut, bf16, *device)  # type: ignore[no-any-return]


@functools.cache
def _device(device: torch.device) -> tuple[tuple[int, int], int, int]:
    """Compute capability, the bytes of shared memory that a thread block may have, multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return (properties.major, properties.minor), shared, properties.multi_processor_count


_NO_CONV = (None, None, None, None, None, None, 1e-5, (1, 1), (0, 0), (1, 1), 1)
