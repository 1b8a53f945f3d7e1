"""Runs conv_bn_act calls through the binding of the CUDA kernels, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import simt_harness
import torch
from torch import Tensor

from resnet_fused.ops.convbn import ConvBNActCall

PLACES = {"x": 0, "weight": 1, "residual": 12}  # among the op's arguments


@dataclass
class Options:
    """What the op is told besides the call: everything that decides its path through the code."""

    kernel: str = ""
    splits: int = 0
    tf32: bool = True
    seed: int = 0
    shift: dict[str, int] | None = None  # bytes by which a tensor misses alignment; "out": by one element


def run(call: ConvBNActCall, options: Options) -> tuple[str, Tensor]:
    """What was printed and the output [N, K, P, Q]."""
    shift = dict(options.shift or {})
    out = shift.pop("out", 0)
    answer = simt_harness.call(
        "resnet_fused_cuda::conv_bn_act",
        call.x, *call.conv, call.residual, call.act == "relu", options.tf32, options.kernel, options.splits,
        shift={PLACES[name]: bytes_ for name, bytes_ in shift.items()},
        seed=options.seed, multiprocessors=4, shifted=int(out > 0),
    )  # fmt: skip
    return answer.text, answer.out


def round_tf32(tensor: Tensor) -> Tensor:
    """Round to TF32's ten mantissa bits, ties away from zero."""
    bits = tensor.float().contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(torch.isfinite(tensor), rounded, tensor)
