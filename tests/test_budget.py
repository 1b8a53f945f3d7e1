"""The error budget: what it lets pass where TF32 is allowed, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.testing.budget import assert_within_budget, measure, tf32_allowed
from resnet_fused.testing.cases import CONV_CASES, ConvCase, double

NEAREST, TRUNCATED = "nearest", "truncated"


def shortened(tensor: Tensor, mantissa: int, how: str = NEAREST) -> Tensor:
    """``tensor`` with so many explicit bits of mantissa; TF32 has ten."""
    dropped = 23 - mantissa
    bits = tensor.contiguous().view(torch.int32)
    if how == NEAREST:
        bits = bits + (1 << (dropped - 1))
    return (bits & -(1 << dropped)).view(torch.float32).view(tensor.shape)


def multiplied_in(call: ConvBNActCall, mantissa: int, how: str = NEAREST) -> Tensor:
    """What a kernel gives that multiplies in such a format and sums in float32."""
    conv = call.conv._replace(weight=shortened(call.conv.weight, mantissa, how))
    return reference.run(call._replace(x=shortened(call.x, mantissa, how), conv=conv))


@pytest.mark.parametrize("how", [NEAREST, TRUNCATED])
@pytest.mark.parametrize("case", [case for case in CONV_CASES if case.n], ids=ConvCase.id)
def test_tf32_beside_an_eager_kernel_without_it(case: ConvCase, how: str) -> None:
    call = case.make(torch.float32)
    eager, exact = reference.run(call), reference.run(double(call))
    assert_within_budget(multiplied_in(call, 10, how), eager, exact, tf32=True)


def test_without_tf32_it_is_no_excuse() -> None:
    call = ConvCase(1, 16, 8, 7, 16, kernel=3, padding=1, groups=16).make(torch.float32)
    eager, exact = reference.run(call), reference.run(double(call))
    assert measure(multiplied_in(call, 10), eager, exact, tf32=False).ratio > 100


def test_tf32_is_no_excuse_for_bfloat16() -> None:
    call = ConvCase(2, 64, 9, 9, 32).make(torch.float32)
    eager, exact = reference.run(call), reference.run(double(call))
    assert not measure(multiplied_in(call, 7), eager, exact, tf32=True).ok


def test_tf32_is_allowed_to_float32_on_cuda_devices_alone() -> None:
    call = ConvCase(1, 8, 4, 4, 8).make(torch.float32)
    assert not tf32_allowed(call.x)  # on the CPU
    eager, exact = reference.run(call), reference.run(double(call))
    assert measure(multiplied_in(call, 10), eager, exact).ratio > 10
