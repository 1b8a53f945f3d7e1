"""Whole bottlenecks by Triton in one launch: a contender, for a tuner to measure against the chain and against cuda.

It reads what :mod:`.cuda` reads and rounds where that rounds; the dispatch does not choose it, since no GPU has timed
it.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import packed
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.bottleneck import triton_config, triton_kernel
from resnet_fused.ops.conv_bn_act.triton import affine
from resnet_fused.ops.convbn import ConvBN, short_dtype
from resnet_fused.ops.triton_launch import Launch

_MIDS = (64, 128)
_INTERPRETED_PROGRAMS = 2


def supports(call: BlockCall) -> str | None:
    """Why the kernel cannot compute this block, or None when it can."""
    x, (conv1, conv2, conv3), shortcut = call.x, call.convs, call.shortcut
    if x.device.type == "cuda":
        if torch.version.hip is not None:
            return "its kernels are written for NVIDIA devices"
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            return "it needs compute capability 8.0"
    elif x.device.type != "cpu" or not backends.interpreting():
        return f"x is on {x.device}, Triton needs a CUDA device"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"its whole-block kernel computes bfloat16 and float16, not {short_dtype(x.dtype)}"
    if call.identity is not None:
        return "its whole-block kernel adds x or a projection of x, no other tensor"
    mid, stride = conv2.weight.shape[0], conv2.stride
    plain = _is(conv1, 1, (1, 1)) and _is(conv2, 3, stride) and _is(conv3, 1, (1, 1)) and stride in ((1, 1), (2, 2))
    if not plain or (shortcut is not None and not _is(shortcut, 1, stride)):
        return "its whole-block kernel is for 1x1, 3x3 and 1x1 convolutions without groups or dilation"
    channels = (conv1.weight.shape[0], conv3.weight.shape[0]) == (mid, 4 * mid)
    if mid not in _MIDS or not channels or x.shape[1] % 64 or (shortcut is None and stride != (1, 1)):
        return "it has no whole-block kernel for these channels, stride and shortcut"
    return None


def run(call: BlockCall) -> Tensor:
    """Compute the block; the result ``[N, 4·mid, P, Q]`` is channels_last."""
    x, conv2 = call.x, call.convs[1]
    out = x.new_empty((x.shape[0], *conv2.output_size(*x.shape[2:]), 4 * conv2.weight.shape[0])).permute(0, 3, 1, 2)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _launch(call, out, None)()
    return out


def workspace_bytes(call: BlockCall) -> int:
    """What :func:`launches` needs beside the output: a slot for each program."""
    problem = _problem(call)
    return math.prod(problem.scratch) * call.x.element_size()


def launches(call: BlockCall, out: Tensor, workspace: Tensor | None) -> list[Launch]:
    """What :func:`run` launches, into ``out``, a channels_last ``[N, 4·mid, P, Q]``."""
    return [_launch(call, out, workspace)]


class _Problem(NamedTuple):
    config: triton_config.Config
    constants: dict[str, Any]
    tiles: tuple[int, int, int]  # all, of rows, of columns
    scratch: tuple[int, int, int]  # a slot of pixels by hidden channels for each program


def _problem(call: BlockCall) -> _Problem:
    x, conv2 = call.x, call.convs[1]
    n, cin = x.shape[:2]
    mid, stride = conv2.weight.shape[0], conv2.stride[0]
    p, q = conv2.output_size(*x.shape[2:])
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    config = triton_config.config(mid, stride, 10 * major + minor)
    constants = triton_config.constants(cin, mid, stride, call.shortcut is not None, config)
    tiles_h, tiles_w = math.ceil(p / config.tile[0]), math.ceil(q / config.tile[1])
    programs = _INTERPRETED_PROGRAMS
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(programs, n * tiles_h * tiles_w)
    scratch = (programs, constants["HALO_H"] * constants["HALO_W"], mid)
    return _Problem(config, constants, (n * tiles_h * tiles_w, tiles_h, tiles_w), scratch)


def _launch(call: BlockCall, out: Tensor, workspace: Tensor | None) -> Launch:
    config, constants, tiles, slots = _problem(call)
    x = call.x.permute(0, 2, 3, 1)
    if x.stride(3) != 1:
        x = x.contiguous()
    scratch = x.new_empty(slots) if workspace is None else workspace.view(x.dtype).view(slots)
    convs = (*call.convs, call.shortcut)
    weights = [None if conv is None else packed.nhwc_weight(conv) for conv in convs]
    args = (
        x, *weights, out.permute(0, 2, 3, 1), scratch, *[vector for conv in convs for vector in _affine(conv)],
        *tiles, *x.shape[1:3], *out.shape[2:], *x.stride()[:3],
    )  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Launch(triton_kernel.bottleneck, (slots[0],), args, {**constants, **options})


def _is(conv: ConvBN, size: int, stride: tuple[int, int]) -> bool:
    rest = (tuple(conv.weight.shape[2:]), conv.stride, conv.padding, conv.dilation, conv.groups)
    return rest == ((size, size), stride, (size // 2, size // 2), (1, 1), 1)


def _affine(conv: ConvBN | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if conv is None else affine(conv)
