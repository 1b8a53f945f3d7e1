"""Calls of batch_norm_act by each backend, where it runs."""

from __future__ import annotations

import devices
from torch import Tensor

from resnet_fused import functional
from resnet_fused.ops.batch_norm_act.call import BatchNormCall

NAMES = ("auto", "reference", "triton", "cuda")
BACKENDS = [devices.by(name) for name in NAMES]  # as parameters
RUNNING = [name for name in NAMES if name != "cuda" or devices.HERE]


def device_of(backend: str) -> str:
    """Where this backend runs."""
    return devices.DEVICE if backend in ("triton", "cuda") else "cpu"


def ours(call: BatchNormCall, backend: str = "auto") -> Tensor:
    """The public function on the call."""
    x, weight, bias, mean, var, count, residual, training, momentum, eps, act = call
    return functional.batch_norm_act(
        x, weight, bias, mean, var, residual, training=training, momentum=momentum, eps=eps, act=act,
        num_batches_tracked=count, backend=backend,
    )  # fmt: skip
