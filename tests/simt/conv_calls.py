"""Runs conv_bn_act calls on the host runner."""

from __future__ import annotations

from dataclasses import dataclass

import simt_harness
import torch
from torch import Tensor

from resnet_fused.ops.convbn import ConvBNActCall, short_dtype

MULTIPROCESSORS = 4
FLOAT_VECTORS = {"bias": 1, "gamma": 2, "beta": 4, "mean": 8, "var": 16}  # bits as in csrc/conv_bn_act/args.h


@dataclass
class Options:
    """What the kernel is told besides the call: everything that decides its path through the code."""

    kernel: str = ""
    splits: int = 0
    precision: str = "tensor"
    seed: int = 0
    shift: dict[str, int] | None = None  # bytes by which a buffer misses 16-byte alignment
    out_stride: int = 0  # elements from pixel to pixel; 0: dense


def run(call: ConvBNActCall, options: Options) -> tuple[str, Tensor]:
    """What the runner printed and the output [N, K, P, Q]; gaps between wide pixels are checked to be untouched."""
    x, conv = call.x, call.conv
    n, c, h, w = x.shape
    k, _, r, s = conv.weight.shape
    p, q = conv.output_size(h, w)
    pixels = x.permute(0, 2, 3, 1)
    assert pixels.stride(3) == 1 or c == 1
    flat = torch.as_strided(
        x, (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)),), (1,)
    )
    residual = None if call.residual is None else call.residual.permute(0, 2, 3, 1).contiguous()
    vectors = dict(zip(FLOAT_VECTORS, conv.tensors()[1:], strict=True))
    out_stride = options.out_stride or k
    values = {
        "dtype": short_dtype(x.dtype), "precision": options.precision, "kernel": options.kernel,
        "splits": options.splits, "seed": options.seed, "multiprocessors": MULTIPROCESSORS,
        "n": n, "c": c, "h": h, "w": w, "k": k, "r": r, "s": s, "p": p, "q": q,
        "stride_h": conv.stride[0], "stride_w": conv.stride[1], "pad_h": conv.padding[0], "pad_w": conv.padding[1],
        "dilation_h": conv.dilation[0], "dilation_w": conv.dilation[1], "groups": conv.groups,
        "x_stride_n": pixels.stride(0), "x_stride_h": pixels.stride(1), "x_stride_w": pixels.stride(2),
        "residual_stride": k, "out_stride": out_stride, "eps": conv.eps, "relu": int(call.act == "relu"),
        "wide": sum(bit for name, bit in FLOAT_VECTORS.items()
                    if vectors[name] is not None and vectors[name].dtype == torch.float32),
        **{f"{name}_shift": shift for name, shift in (options.shift or {}).items()},
    }  # fmt: skip
    values = {key: value for key, value in values.items() if value != ""}
    tensors = {"x": flat, "weight": conv.weight.permute(0, 2, 3, 1), "residual": residual, **vectors}
    text, data = simt_harness.run("conv", values, tensors, "out")
    if not data:
        return text, torch.empty(0)
    buffer = simt_harness.from_bytes(data, x.dtype)
    padded = torch.cat([buffer, buffer.new_full((n * p * q * out_stride - len(buffer),), float("nan"))])
    rows = padded.view(n * p * q, out_stride)
    gaps = rows[:, k:].contiguous().view(torch.uint8)
    assert gaps.numel() == 0 or torch.isnan(rows[:, k:]).all(), "a store between the pixels"
    return text, rows[:, :k].reshape(n, p, q, k).permute(0, 3, 1, 2)


def round_tf32(tensor: Tensor) -> Tensor:
    """Round to TF32's ten mantissa bits, ties away from zero."""
    bits = tensor.float().contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(torch.isfinite(tensor), rounded, tensor)
