"""Which tests compute on a CUDA device, and what a backend may refuse there.

``pytest -m gpu`` on a machine with a GPU runs every test that computes on it, and no other. Elsewhere the tests that
need one are skipped (conftest.py), and those that only prefer one run on the CPU, without the mark.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from resnet_fused import backends

HERE = torch.cuda.is_available()
DEVICE = "cuda" if HERE else "cpu"
PREFERRED = [pytest.mark.gpu] if HERE else []  # marks of what runs on the GPU where there is one, else on the CPU
BACKENDS = ("cuda", "triton", "cudnn")  # of a CUDA device: with one present each of them must be available


def by(backend: str) -> Any:
    """The backend as a parameter of a test, marked where it computes on a CUDA device."""
    interpreted = backend == "triton" and not HERE and os.environ.get("TRITON_INTERPRET") == "1"
    return pytest.param(backend, marks=pytest.mark.gpu if backend in BACKENDS and not interpreted else ())


def assert_all_here() -> None:
    """Every backend of a CUDA device is available; AssertionError with the reason of each that is not."""
    absent = {name: reason for name in BACKENDS if (reason := backends.unavailable(name)) is not None}
    assert not absent, f"a CUDA device is here, and these are not available: {absent}"


def may_refuse(
    backend: str,
    dtype: torch.dtype,
    *,
    act: str = "relu",
    groups: int = 1,
    dilation: tuple[int, int] = (1, 1),
    channels: tuple[int, ...] = (),
) -> bool:
    """Whether a refusal of a call on a CUDA device is one of the backend's known limits, of which the README speaks."""
    if backend not in BACKENDS or dtype == torch.float64:
        return True
    if backend != "cudnn":
        return False
    # aten's fused convolutions end in a ReLU, ask for no deterministic algorithm, and take what cuDNN takes, which for
    # groups, dilation and unaligned channels no table tells.
    plain = groups == 1 and tuple(dilation) == (1, 1) and all(count % 8 == 0 for count in channels)
    return act != "relu" or torch.are_deterministic_algorithms_enabled() or not plain


def assert_may_refuse(backend: str, dtype: torch.dtype, reason: str, **call: Any) -> None:
    """Where a CUDA device is present a refusal is a failure, but for known limits."""
    assert not HERE or may_refuse(backend, dtype, **call), f"{backend} refuses on a CUDA device: {reason}"


def refused(op: str, backend: str, call: Any) -> bool:
    """Whether the backend refuses this call; AssertionError where it must not.

    A call on the CPU, and an empty one, may be refused by anybody, and so may an op that the backend has not.
    """
    reason = backends.refusal(op, backend, call)
    if reason is None:
        return False
    x = call[0]
    if x.is_cuda and x.numel() and backends.implementation(op, backend) is not None:
        limits: dict[str, Any] = {}
        if op == "conv_bn_act":
            conv = call.conv
            limits = {"act": call.act, "groups": conv.groups, "dilation": conv.dilation}
            limits["channels"] = conv.weight.shape[:2]
        assert_may_refuse(backend, x.dtype, reason, **limits)
    return True


def able(op: str, call: Any) -> list[str]:
    """The backends that serve this call."""
    return [name for name in backends.NAMES if not refused(op, name, call)]
