"""The CUDA kernels of batch_norm_act on the host runtime, against eager and float64."""

from __future__ import annotations

import norm_calls
import pytest
import simt_harness
import torch
from norm_calls import Options
from torch import Tensor

from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall
from resnet_fused.ops.convbn import short_dtype
from resnet_fused.testing.norm_cases import NORM_CASES, NormCase, assert_outcome, copied, upstream_of

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)

DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=short_dtype)

# What decides the walk: vectors or elements, one chunk of channels or more, splits that do not come out even, planes
# shorter and longer than a row of threads.
WALKS = (
    (NormCase(2, 64, 6, 7, residual=True), "channels_last vectors"),
    (NormCase(1, 24, 5, 5), "channels_last vectors"),
    (NormCase(3, 520, 3, 3, residual=True), "channels_last vectors lanes 32"),
    (NormCase(2, 70, 5, 3), "channels_last elements lanes 32 chunks 3"),
    (NormCase(5, 3, 31, 17, residual=True), "channels_last elements lanes 4 chunks 1"),
    (NormCase(5, 32, 25, 23), "channels_last vectors"),
    (NormCase(3, 3, 40, 40, residual=True, channels_last=False), "nchw vectors lanes 1 chunks 3"),
    (NormCase(40, 2, 4, 4, channels_last=False), "nchw vectors"),
    (NormCase(33, 2, 3, 7, residual=True, channels_last=False), "nchw elements"),
    (NormCase(2, 3, 37, 41, residual=True, channels_last=False), "nchw elements"),
    (NormCase(3, 1, 16, 31, residual=True), "nchw vectors lanes 1 chunks 1"),
    (NormCase(9, 16, 1, 1, channels_last=False), "channels_last vectors"),
)  # fmt: skip


def outcome(call: BatchNormCall, grad: Tensor, options: Options) -> tuple[str, dict[str, Tensor]]:
    """What the runner printed, and what testing.norm_cases.outcome gives of the call."""
    text, out, mean, scale = norm_calls.forward(call, options)
    running = (None, None) if call.training else (call.running_mean, call.running_var)
    relu = call.act == "relu"
    masked = relu and call.residual is not None
    gradient = GradientCall(
        grad, call.x, call.weight, *running, mean, scale, out if relu else None, call.training, call.eps, True, masked
    )
    _, grads = norm_calls.backward(gradient, options)
    found = {"output": out, "grad x": grads["dx"]}
    for name, vector in (("weight", call.weight), ("bias", call.bias)):
        if vector is not None:
            found[f"grad {name}"] = grads["dgamma" if name == "weight" else "dbeta"].to(vector.dtype)
    if call.residual is not None:  # without ReLU it is the gradient as it came; autograd gives it the leaf's strides
        found["grad residual"] = torch.empty_like(call.residual).copy_(grads["dresidual"] if masked else grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if getattr(call, name) is not None:
            found[name] = getattr(call, name)
    return text, found


def check(call: BatchNormCall, options: Options, expect: str = "") -> None:
    grad = upstream_of(call)
    text, found = outcome(copied(call, grad=False), grad, options)
    assert text.startswith(expect), text
    assert_outcome(found, call, grad)


@DTYPES
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_case(case: NormCase, dtype: torch.dtype) -> None:
    check(case.make(dtype), Options())


@DTYPES
@pytest.mark.parametrize(("case", "expect"), WALKS, ids=str)
def test_walk(case: NormCase, expect: str, dtype: torch.dtype) -> None:
    check(case.make(dtype), Options(), expect)
