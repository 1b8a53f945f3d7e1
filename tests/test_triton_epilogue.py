"""Batch norm in Triton's epilogues: a scale and a shift of each channel, made once for a version of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from resnet_fused import backends
from resnet_fused.ops import packed
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.bottleneck import triton as bottleneck
from resnet_fused.ops.conv_bn_act import reference, triton
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase, double

pytestmark = pytest.mark.skipif(backends.unavailable("triton") is not None, reason=str(backends.unavailable("triton")))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = ConvCase(1, 16, 5, 4, 24, kernel=3, padding=1, bias=True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ConvBN]:
    """The convolutions whose batch norm was turned into a scale and a shift."""
    found: list[ConvBN] = []
    affine = packed.affine

    def watched(conv: ConvBN, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        found.append(conv)
        return affine(conv, dtype)

    monkeypatch.setattr(packed, "affine", watched)
    return found


def _conv() -> Callable[[], torch.Tensor]:
    call = CASE.make(torch.bfloat16, DEVICE)
    return lambda: triton.run(call)


def _block() -> Callable[[], torch.Tensor]:
    def conv(c: int, k: int, kernel: int = 1) -> ConvBN:
        return ConvCase(1, c, 1, 1, k, kernel=kernel, padding=kernel // 2).make(torch.bfloat16, DEVICE, seed=k).conv

    x = ConvCase(1, 64, 3, 4, 64).make(torch.bfloat16, DEVICE).x
    call = BlockCall(x, (conv(64, 64), conv(64, 64, 3), conv(64, 256)), conv(64, 256), None)
    return lambda: bottleneck.run(call)


@pytest.mark.parametrize("make", (_conv, _block))
def test_they_are_made_once(make: Callable[[], Callable[[], torch.Tensor]], made: list[ConvBN]) -> None:
    run = make()
    first = run()
    for _ in range(3):
        run()
    assert made
    made.clear()
    assert torch.equal(run(), first)
    assert not made


@pytest.mark.parametrize("name", ("running_mean", "running_var", "bn_weight", "bn_bias", "bias"))
def test_they_follow_what_is_written(name: str) -> None:
    call = CASE.make(torch.float32, DEVICE)
    for factor in (1, 1, 1, 1, 3):
        getattr(call.conv, name).mul_(factor)
        assert_within_budget(triton.run(call), reference.run(call), reference.run(double(call)))


def test_each_epsilon_has_its_own() -> None:
    call = CASE.make(torch.float32, DEVICE)
    for eps in (1e-5, 1.0, 1e-5, 1.0, 1e-5, 1.0):
        other = call._replace(conv=call.conv._replace(eps=eps))
        assert_within_budget(triton.run(other), reference.run(other), reference.run(double(other)))


def test_inference_tensors_are_read_at_each_call() -> None:
    """Writes to them leave no trace."""
    with torch.inference_mode():
        call = CASE.make(torch.float32, DEVICE)
        for _ in range(4):
            call.conv.running_var.mul_(1.5)
            assert_within_budget(triton.run(call), reference.run(call), reference.run(double(call)))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_they_are_rounded_once(dtype: torch.dtype) -> None:
    conv = CASE.make(dtype, DEVICE).conv
    for got, exact in zip(triton.affine(conv), packed.affine(conv, torch.float64), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, exact.float())
