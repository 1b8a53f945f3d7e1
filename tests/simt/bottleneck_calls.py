"""Runs bottlenecks on the host runner."""

from __future__ import annotations

from dataclasses import dataclass

import simt_harness
import torch
from torch import Tensor

from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import ConvBN, short_dtype

FLOAT_VECTORS = {"bias": 1, "gamma": 2, "beta": 4, "mean": 8, "var": 16}  # bits as in csrc/bottleneck/args.h


@dataclass
class Options:
    """What the kernel is told besides the call; shared memory in bytes, an sm_90's unless given."""

    kernel: str = ""
    seed: int = 0
    multiprocessors: int = 2
    shared_block: int = 227 << 10
    shared_multiprocessor: int = 228 << 10
    shift: dict[str, int] | None = None  # bytes by which a buffer misses 16-byte alignment


def run(call: BlockCall, options: Options) -> tuple[str, Tensor]:
    """What the runner printed and the output [N, 4·mid, P, Q]."""
    x = call.x
    n, c, h, w = x.shape
    mid, out = call.convs[1].weight.shape[0], call.convs[2].weight.shape[0]
    p, q = call.convs[1].output_size(h, w)
    pixels = x.permute(0, 2, 3, 1)
    values: dict[str, object] = {
        "dtype": short_dtype(x.dtype), "n": n, "h": h, "w": w, "cin": c, "mid": mid, "cout": out,
        "stride": call.convs[1].stride[0], "kernel": options.kernel, "seed": options.seed,
        "multiprocessors": options.multiprocessors, "shared_block": options.shared_block,
        "shared_multiprocessor": options.shared_multiprocessor, "out_bytes": n * out * p * q * x.element_size(),
        # The stride of a dimension of size one means nothing.
        **{f"x_stride_{dim}": pixels.stride(i) if pixels.shape[i] > 1 else 0 for i, dim in enumerate("nhw")},
        **{f"{name}_shift": shift for name, shift in (options.shift or {}).items()},
    }  # fmt: skip
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    tensors: dict[str, Tensor | None] = {"x": torch.as_strided(x, (extent,), (1,))}
    for name, conv in zip(("conv1", "conv2", "conv3", "shortcut"), (*call.convs, call.shortcut), strict=True):
        if conv is not None:
            _add(name, conv, values, tensors)
    values = {key: value for key, value in values.items() if value != ""}
    text, data = simt_harness.run("bottleneck", values, tensors, "out")
    if not data:
        return text, torch.empty(0)
    return text, simt_harness.from_bytes(data, x.dtype).view(n, p, q, out).permute(0, 3, 1, 2)


def _add(name: str, conv: ConvBN, values: dict[str, object], tensors: dict[str, Tensor | None]) -> None:
    vectors = dict(zip(FLOAT_VECTORS, conv.tensors()[1:], strict=True))
    tensors[f"{name}_weight"] = conv.weight.permute(0, 2, 3, 1)
    tensors.update({f"{name}_{key}": vector for key, vector in vectors.items()})
    values[f"{name}_eps"] = conv.eps
    values[f"{name}_wide"] = sum(
        FLOAT_VECTORS[key] for key, vector in vectors.items() if vector is not None and vector.dtype == torch.float32
    )
