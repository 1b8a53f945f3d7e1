"""Runs bottlenecks through the binding of the CUDA kernels, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import simt_harness
from torch import Tensor

from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import ConvBN

PLACES = {"x": 0, "conv2_weight": 1 + len(ConvBN._fields)}  # among the op's arguments
NO_CONV = (None, None, None, None, None, None, 1e-5, (1, 1), (0, 0), (1, 1), 1)


@dataclass
class Options:
    """What decides the kernel's path besides the call; shared memory in bytes, an sm_90's unless given."""

    kernel: str = ""
    seed: int = 0
    multiprocessors: int = 2
    shared_block: int = 227 << 10
    shared_multiprocessor: int = 228 << 10
    shift: dict[str, int] | None = None  # bytes by which a tensor misses alignment; "out": by one element


def run(call: BlockCall, options: Options) -> tuple[str, Tensor]:
    """What was printed and the output [N, 4·mid, P, Q]."""
    flat = [value for conv in (*call.convs, call.shortcut or NO_CONV) for value in conv]
    shift = dict(options.shift or {})
    out = shift.pop("out", 0)
    answer = simt_harness.call(
        "resnet_fused_cuda::bottleneck", call.x, *flat, call.identity, options.kernel,
        shift={PLACES[name]: bytes_ for name, bytes_ in shift.items()},
        seed=options.seed, multiprocessors=options.multiprocessors, shared_block=options.shared_block,
        shared_multiprocessor=options.shared_multiprocessor, shifted=int(out > 0),
    )  # fmt: skip
    return answer.text, answer.out
