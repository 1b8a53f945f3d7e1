"""Calls of batch_norm_act by each backend, where it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fused import backends, functional
from resnet_fused.ops.batch_norm_act.call import BatchNormCall

BACKENDS = ["auto", "reference", "triton", "cuda"]


def missing(backend: str) -> bool:
    """Whether this backend needs a GPU, and there is none."""
    needs_one = backend == "cuda" or (backend == "triton" and not backends.interpreting())
    return needs_one and not torch.cuda.is_available()


def device_of(backend: str) -> str:
    """Where this backend runs; the test is skipped where that is not here."""
    if missing(backend):
        pytest.skip("needs a CUDA GPU")
    return "cuda" if torch.cuda.is_available() and backend in ("triton", "cuda") else "cpu"


def ours(call: BatchNormCall, backend: str = "auto") -> Tensor:
    """The public function on the call."""
    x, weight, bias, mean, var, count, residual, training, momentum, eps, act = call
    return functional.batch_norm_act(
        x, weight, bias, mean, var, residual, training=training, momentum=momentum, eps=eps, act=act,
        num_batches_tracked=count, backend=backend,
    )  # fmt: skip
