"""conv_bn_act by Triton: implicit GEMM with the whole epilogue fused, on CUDA devices from compute capability 8.0.

x is read where it lies when its channels are adjacent (channels_last, slices of it), else copied once per call. A
weight that is not channels_last, and batch norm as a scale and a shift of each channel, are kept between calls by the
rules of packed weights. Nothing is measured.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused import backends
from resnet_fused.ops import packed
from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.ops.conv_bn_act import triton_kernels as kernels
from resnet_fused.ops.conv_bn_act import triton_window
from resnet_fused.ops.conv_bn_act.triton_config import Architecture, ConvConfig, Problem
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, short_dtype
from resnet_fused.ops.triton_launch import Launch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16  # bytes: of a descriptor's base and strides
_NARROW_SPAN = 2**30  # elements up to which offsets, with all that a tile overhangs, stay within 32 bits
_REDUCE_TILE = (4, 128)
_AFFINES = packed.new_kind()


class Operands(NamedTuple):
    """The tensors as the kernels read them."""

    x: Tensor  # [N, H, W, C], channels adjacent
    weight: Tensor  # [K, R, S, C/groups], dense
    residual: Tensor | None  # [N, P, Q, K], dense
    scale: Tensor  # [K] float32: batch norm and the convolution's bias are a product and a sum
    shift: Tensor  # [K] float32


def supports(call: ConvBNActCall) -> str | None:
    """Why Triton cannot compute this call, or None when it can."""
    x = call.x
    if x.dtype not in _DTYPES:
        return f"Triton computes float16, bfloat16 and float32, not {short_dtype(x.dtype)}"
    if x.device.type == "cuda":
        if torch.version.hip is not None:
            return "its kernels are written for NVIDIA devices"
        if cfg.architecture(_index(x)).capability < 80:
            return "it needs compute capability 8.0"
    elif x.device.type != "cpu" or not backends.interpreting():
        return f"x is on {x.device}, Triton needs a CUDA device"
    return None


def configs(call: ConvBNActCall) -> tuple[ConvConfig, ...]:
    """Every shipped config that computes this call, for a tuner to measure with ``run(call, config)``."""
    return cfg.valid(_problem(call, _operands(call)), _architecture(call.x))


def run(call: ConvBNActCall, config: ConvConfig | None = None) -> Tensor:
    """Compute the call; the result ``[N, K, P, Q]`` is channels_last.

    Raises:
        ValueError: ``config`` is not among ``configs(call)``.
    """
    prepared = _prepare(call, config)
    out = call.x.new_empty(prepared.problem.output)
    if out.numel():
        with torch.cuda.device(call.x.device) if call.x.is_cuda else contextlib.nullcontext():
            for launch in _launches(call, prepared, out, None):
                launch()
    return out.permute(0, 3, 1, 2)


def workspace_bytes(call: ConvBNActCall, config: ConvConfig | None = None) -> int:
    """What :func:`launches` needs beside the output."""
    prepared = _prepare(call, config)
    return _workspace_bytes(prepared.problem, prepared.config)


def launches(
    call: ConvBNActCall, out: Tensor, workspace: Tensor | None, config: ConvConfig | None = None
) -> list[Launch]:
    """What :func:`run` launches, into ``out``, a channels_last ``[N, K, P, Q]``.

    ``workspace`` has :func:`workspace_bytes` bytes.
    """
    return _launches(call, _prepare(call, config), out.permute(0, 2, 3, 1), workspace)


class _Prepared(NamedTuple):
    operands: Operands
    problem: Problem
    arch: Architecture
    config: ConvConfig


def _prepare(call: ConvBNActCall, config: ConvConfig | None) -> _Prepared:
    operands = _operands(call)
    problem, arch = _problem(call, operands), _architecture(call.x)
    if config is None:
        config = cfg.choose(problem, arch)
    elif config not in cfg.valid(problem, arch):
        raise ValueError(f"config: got {config}, need one of {', '.join(map(str, cfg.valid(problem, arch)))}")
    return _Prepared(operands, problem, arch, config)


def _launches(call: ConvBNActCall, prepared: _Prepared, out: Tensor, workspace: Tensor | None) -> list[Launch]:
    operands, problem, arch, config = prepared
    if config.kernel == "window":
        wide, tiles = _wide(operands, out, 1), cfg.tiles(problem, config)
        return [triton_window.launch(call.conv, call.act == "relu", operands, problem, config, wide, tiles, out)]
    if config.kernel == "pointer":
        return _pointer_launches(call, operands, problem, config, out, workspace)
    return [_descriptor_launch(call, operands, problem, config, arch, out)]


def _index(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


def _architecture(x: Tensor) -> Architecture:
    return cfg.architecture(_index(x)) if x.is_cuda else cfg.INTERPRETER


def _operands(call: ConvBNActCall) -> Operands:
    conv = call.conv
    x = call.x.permute(0, 2, 3, 1)
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    residual = None if call.residual is None else _dense(call.residual.permute(0, 2, 3, 1))
    return Operands(x, packed.nhwc_weight(conv), residual, *affine(conv))


def affine(conv: ConvBN) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each output channel in float32, as the kernels read them."""
    scale, shift = packed.packed(_AFFINES, conv, _affine)
    return scale, shift


def _affine(conv: ConvBN) -> tuple[Tensor, Tensor]:
    scale, shift = packed.affine(conv, torch.float64)
    return scale.float().contiguous(), shift.float().contiguous()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with its elements in order and without gaps.

    ``contiguous()`` answers by the same rule: strides of dimensions of size one are free, and the kernels are given
    sizes, not strides, of what is dense.
    """
    return tensor.contiguous()


def _problem(call: ConvBNActCall, operands: Operands) -> Problem:
    conv, x = call.conv, operands.x
    n, h, w, c = x.shape
    k, r, s, _ = operands.weight.shape
    p, q = conv.output_size(h, w)
    plain = (r, s) == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    rows = plain and row_stride(x) is not None
    windowed = cfg.windowed((r, s), c // conv.groups, conv.dilation, conv.groups)
    return Problem(
        x.dtype, _precision(x.dtype), n, c // conv.groups, k // conv.groups, p, q, (r, s), conv.stride, conv.padding,
        conv.dilation, conv.groups, rows, _describable(call, operands), triton_window.unit(x, conv) if windowed else 0,
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: what PyTorch allows cuDNN's convolutions. The newer flag also answers for the older
    one, ``cudnn.allow_tf32``, whose own getter raises when the two have been mixed."""
    if dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "ieee"


def row_stride(x: Tensor) -> int | None:
    """The distance between neighbouring pixels of ``[N, H, W, C]``, or None when it is not the same throughout."""
    rows: int | None = None
    count = 1
    for size, stride in zip(reversed(x.shape[:3]), reversed(x.stride()[:3]), strict=True):
        if size > 1:
            if rows is None:
                rows = stride
            elif stride != rows * count:
                return None
        count *= size
    return x.shape[3] if rows is None else rows


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _ALIGNMENT == 0


def _describable(call: ConvBNActCall, operands: Operands) -> bool:
    """Whether tensor descriptors can be made of the operands: base and strides multiples of 16 bytes."""
    conv, (x, weight, residual, *_) = call.conv, operands
    itemsize = x.element_size()
    if conv.groups > 1 or conv.stride not in ((1, 1), (2, 2)):
        return False
    if conv.stride == (2, 2) and min(x.shape[1:3]) < 2:  # one of the parities would be empty
        return False
    widths = [weight.shape[0], weight.shape[3]]
    widths += [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    if any(width == 0 or width * itemsize % _ALIGNMENT for width in widths):
        return False
    if math.prod(x.shape[:3]) >= 2**31 or x.shape[0] * math.prod(conv.output_size(*x.shape[1:3])) >= 2**31:
        return False
    return all(_aligned(t) for t in (x, weight, residual) if t is not None)


def _wide(operands: Operands, out: Tensor, splits: int) -> bool:
    """Whether some element lies too far from its tensor's first for a 32-bit offset."""
    x = operands.x
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return max(span, operands.weight.numel(), out.numel() * splits) > _NARROW_SPAN


def _workspace_bytes(problem: Problem, config: ConvConfig) -> int:
    """The float32 partial sums of a split reduction, which only the pointer kernel has."""
    return 0 if config.split_k == 1 else 4 * config.split_k * problem.m * problem.k * problem.groups


def _pointer_launches(
    call: ConvBNActCall,
    operands: Operands,
    problem: Problem,
    config: ConvConfig,
    out: Tensor,
    workspace: Tensor | None,
) -> list[Launch]:
    x, weight, residual, scale, shift = operands
    conv, splits = call.conv, config.split_k
    mode, relu = cfg.mode(problem, config), call.act == "relu"
    per_split = math.ceil(cfg.steps(problem, config) / splits)
    wide = _wide(operands, out, splits)
    channels = problem.k * problem.groups
    sums = None
    if splits > 1:
        shape = (splits, problem.m, channels)
        if workspace is None:
            sums = torch.empty(shape, dtype=torch.float32, device=x.device)
        else:
            sums = workspace.view(torch.float32).view(shape)
    x_n, x_h, x_w = (0, 0, row_stride(x)) if problem.rows else x.stride()[:3]
    args: tuple[Any, ...] = (
        x, weight, None if splits > 1 else residual, None if splits > 1 else out, sums, scale, shift,
        problem.m, problem.c, problem.k, x.shape[1], x.shape[2], problem.p, problem.q, problem.groups,
        x_n, x_h, x_w, problem.taps * problem.c, *conv.stride, *conv.padding, *conv.dilation, per_split,
    )  # fmt: skip
    constants = {
        "S": problem.filter[1], "TAPS": problem.taps, "MODE": mode, "RELU": relu, "SPLIT": splits > 1, "WIDE": wide,
        "PRECISION": problem.precision, "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        "GROUP_M": config.group_m, "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    found = [Launch(kernels.conv_pointer, (cfg.tiles(problem, config), splits), args, constants)]
    if sums is not None:
        bm, bn = _REDUCE_TILE
        args = (sums, residual, out, scale, shift, problem.m, channels)
        constants = {
            "SPLITS": splits, "RELU": relu, "WIDE": wide, "BM": bm, "BN": bn, "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip
        grid = (math.ceil(problem.m / bm), math.ceil(channels / bn))
        found.append(Launch(kernels.conv_reduce, grid, args, constants))
    return found


def _descriptor_launch(
    call: ConvBNActCall, operands: Operands, problem: Problem, config: ConvConfig, arch: Architecture, out: Tensor
) -> Launch:
    weight, residual = operands.weight, operands.residual
    conv, channels = call.conv, operands.weight.shape[0]
    r, s = problem.filter
    n, p, q = (1, 1, problem.m) if problem.rows else (problem.n, problem.p, problem.q)
    tile = cfg.tile_of(problem, config)
    inputs = _describe_input(operands.x, problem, [*tile, config.block_k])
    filters = TensorDescriptor(
        weight,
        [channels, r * s, problem.c],
        [r * s * problem.c, problem.c, 1],
        [config.block_n, 1, config.block_k],
    )

    def output(tensor: Tensor) -> TensorDescriptor:
        strides = [p * q * channels, q * channels, channels, 1]
        return TensorDescriptor(tensor, [n, p, q, channels], strides, [*tile, config.block_n // config.parts])

    programs = min(cfg.tiles(problem, config), arch.processors * config.blocks_per_sm)
    args = (
        *inputs, filters, None if residual is None else output(residual), output(out), operands.scale, operands.shift,
        n, p, q, problem.c, channels,
    )  # fmt: skip
    constants = {
        "R": r, "S": s, "STRIDE": conv.stride[0], "PAD_H": conv.padding[0], "PAD_W": conv.padding[1],
        "DIL_H": conv.dilation[0], "DIL_W": conv.dilation[1], "RELU": call.act == "relu",
        "PRECISION": problem.precision, "TN": tile[0], "TH": tile[1], "TW": tile[2], "BN": config.block_n,
        "BK": config.block_k, "GROUP_M": config.group_m, "PARTS": config.parts,
        "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(kernels.conv_descriptor, (programs,), args, constants)


def _describe_input(x: Tensor, problem: Problem, block: list[int]) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors of x's rows and columns by parity: (even, even), (even, odd), (odd, even), (odd, odd).

    With stride 1 the first describes all of x and the others are None.
    """
    channels = x.shape[3]
    if problem.rows:
        stride = row_stride(x)
        assert stride is not None
        shape, strides = [1, 1, problem.m, channels], [problem.m * stride, problem.m * stride, stride, 1]
        return TensorDescriptor(x, shape, strides, block), None, None, None
    dense = (x.shape[1] * x.shape[2] * channels, x.shape[2] * channels, channels)
    step = problem.stride[0]
    strides = [
        stride if size > 1 else free  # the stride of a dimension of size one is anything at all
        for size, stride, free in zip(x.shape[:3], x.stride()[:3], dense, strict=True)
    ]
    strides = [strides[0], strides[1] * step, strides[2] * step, 1]

    def parity(i: int, j: int) -> TensorDescriptor | None:
        if max(i, j) >= step:
            return None
        part = x[:, i::step, j::step]
        return TensorDescriptor(part, list(part.shape), strides, block)

    return parity(0, 0), parity(0, 1), parity(1, 0), parity(1, 1)
