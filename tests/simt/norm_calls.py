"""Runs batch_norm_act calls, and their gradients, on the host runner; as ops/batch_norm_act/cuda.py does on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import simt_harness
import torch
from torch import Tensor

from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall, dense_format
from resnet_fused.ops.convbn import short_dtype

# Bits as in csrc/batch_norm_act/args.h.
WIDE = {"gamma": 1, "beta": 2, "mean": 4, "scale": 8, "running_mean": 16, "running_var": 32}
IMAGES = ("out", "dx", "dresidual")


@dataclass
class Options:
    """What the kernels are told besides the call."""

    seed: int = 0
    multiprocessors: int = 2
    shift: dict[str, int] | None = None  # bytes by which a buffer misses 16-byte alignment


def forward(call: BatchNormCall, options: Options) -> tuple[str, Tensor, Tensor, Tensor]:
    """(what the runner printed, output, mean, scale); the call's statistics and its count of batches follow."""
    tensors = {"x": call.x, "residual": call.residual, "gamma": call.weight, "beta": call.bias}
    if not call.training:
        assert call.running_mean is not None and call.running_var is not None
        text, out = apply(call, call.running_mean, call.running_var, options)
        return text, out, call.x.new_empty(0), call.x.new_empty(0)
    tensors |= {"running_mean": call.running_mean, "running_var": call.running_var}
    if call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
        tensors |= {"batches": call.num_batches_tracked} if call.momentum is None else {}
    values = {"relu": int(call.act == "relu"), "momentum": call.momentum or 0.0, "training": 1, "eps": call.eps}
    text, found = _run("forward", call.x, values, tensors, options)
    for name in ("running_mean", "running_var"):
        if name in found:
            getattr(call, name).copy_(found[name])
    return text, found["out"], found["mean"], found["scale"]


def apply(call: BatchNormCall, mean: Tensor, scale: Tensor, options: Options) -> tuple[str, Tensor]:
    """(what the runner printed, the output by these statistics)."""
    tensors = {"x": call.x, "residual": call.residual, "gamma": call.weight, "beta": call.bias}
    values = {"relu": int(call.act == "relu"), "training": int(call.training), "eps": call.eps}
    text, found = _run("apply", call.x, values, tensors | {"mean": mean, "scale": scale}, options)
    return text, found["out"]


def backward(call: GradientCall, options: Options) -> tuple[str, dict[str, Tensor]]:
    """(what the runner printed, the gradients by name: dx, dgamma, dbeta, dresidual)."""
    given = (call.mean, call.rstd) if call.training else (call.running_mean, call.running_var)
    tensors = {"x": call.x, "grad": call.grad, "output": call.output, "gamma": call.weight}
    tensors |= dict(zip(("mean", "scale"), given, strict=True))
    values = {"training": int(call.training), "eps": call.eps, "need_x": int(call.need_x)}
    return _run("backward", call.x, values | {"need_residual": int(call.need_residual)}, tensors, options)


def _run(
    op: str, x: Tensor, values: dict[str, Any], tensors: dict[str, Tensor | None], options: Options
) -> tuple[str, dict[str, Tensor]]:
    layout = dense_format(x)
    values |= {
        "op": op, "dtype": short_dtype(x.dtype), "seed": options.seed, "multiprocessors": options.multiprocessors,
        "channels_last": int(layout is torch.channels_last), **dict(zip("nchw", x.shape, strict=True)),
        "wide": sum(bit for name, bit in WIDE.items() if _is_wide(tensors.get(name))),
        **{f"{name}_shift": shift for name, shift in (options.shift or {}).items()},
    }  # fmt: skip

    def memory(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dim() != 4:
            return tensor
        dense = tensor.detach().contiguous(memory_format=layout)
        return dense.permute(0, 2, 3, 1) if layout is torch.channels_last else dense

    outs = (*IMAGES, "mean", "scale", "dgamma", "dbeta", "running_mean", "running_var")
    text, data = simt_harness.run_many("batch_norm_act", values, {k: memory(t) for k, t in tensors.items()}, outs)
    found = {}
    for name, raw in data.items():
        if name in IMAGES:
            out = torch.empty_like(x, memory_format=layout)
            flat = simt_harness.from_bytes(raw, x.dtype)
            found[name] = out.copy_(torch.as_strided(flat, x.shape, out.stride()))
        else:
            given = tensors.get(name)
            found[name] = simt_harness.from_bytes(raw, torch.float32 if given is None else given.dtype)
    if text.startswith("refused"):
        raise ValueError(text)
    assert "bank conflicts 0\n" in text, text
    return text, found


def _is_wide(vector: Tensor | None) -> bool:
    return vector is not None and vector.dtype == torch.float32
