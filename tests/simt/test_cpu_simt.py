"""The CPU's own convolutions under AddressSanitizer and UBSan: every access within its tensor, at any alignment."""

from __future__ import annotations

import pytest
import simt_harness
import torch
from test_cpu_convolution import BOTH, CASES, DIRECT, FLOAT, WAYS, WINOGRAD, Way, assert_right, filters_of_one
from torch import Tensor

from resnet_fused.ops.convbn import ConvBNActCall
from resnet_fused.ops.cpu_convolution import Convolution
from resnet_fused.testing.cases import ConvCase

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)


def run(call: ConvBNActCall, way: Way, bytes_: int = 0) -> Tensor | None:
    """The result, or None where the direct sum is asked for. ``bytes_``: by how many the tensors miss alignment."""
    method, _, isa = way
    convolution = Convolution(call.conv, method)
    shape = (call.x.shape[0], call.conv.weight.shape[0], *call.conv.output_size(*call.x.shape[2:]))
    out = torch.full(shape, float("nan"), dtype=call.x.dtype).to(memory_format=torch.channels_last)
    answer = simt_harness.call(
        "resnet_fused_cpu::conv_bn_act", call.x, convolution.packed, convolution.geometry, call.residual,
        call.act == "relu", out, isa, shift=dict.fromkeys((0, 3, 5), bytes_),
    )  # fmt: skip
    result: Tensor = answer.arguments[5]
    return result if answer.outs[0] else None


@pytest.mark.parametrize(
    ("way", "case"), CASES, ids=lambda v: v.id() if isinstance(v, ConvCase) else f"{v[0].name}-{v[2]}"
)
def test_cases(way: Way, case: ConvCase) -> None:
    call = case.make(way[1])
    out = run(call, way)
    if out is not None:
        assert_right(call, out)
    else:
        assert way[0] is WINOGRAD and min(case.h, case.w) == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0].name}-{way[2]}")
@pytest.mark.parametrize("bytes_", (1, 2, 4, 6))
def test_tensors_at_any_address(bytes_: int, way: Way) -> None:
    call = BOTH[1].make(way[1])
    out, want = run(call, way, bytes_), run(call, way)
    assert out is not None and want is not None and torch.equal(out, want)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0].name}-{way[2]}")
@pytest.mark.parametrize("sizes", ((2, 32, 5, 0), (2, 0, 5, 32), (0, 32, 5, 32), (2, 32, 0, 32)), ids=str)
def test_sizes_of_zero(sizes: tuple[int, int, int, int], way: Way) -> None:
    n, c, h, k = sizes
    method, dtype, isa = way
    x = torch.ones(n, c, h, h, dtype=dtype).to(memory_format=torch.channels_last)
    out = torch.zeros(n, k, h + 2, h + 2, dtype=dtype).to(memory_format=torch.channels_last)
    filters = filters_of_one(method, c, k, dtype)
    packed, geometry = [filters, torch.ones(k), torch.full((k,), 3.0)], [int(method), 3, 3, 1, 1, 2, 2, 1, 1]
    answer = simt_harness.call("resnet_fused_cpu::conv_bn_act", x, packed, geometry, None, True, out, isa)
    if answer.outs[0] and (c == 0 or h == 0):
        assert (answer.arguments[5] == 3).all()


def test_filters() -> None:
    weight = torch.randn(64, 48, 3, 3, generator=torch.Generator().manual_seed(0))
    for given in (weight, weight.to(memory_format=torch.channels_last)):
        found = simt_harness.call("resnet_fused_cpu::winograd_filters", given).out
        assert torch.equal(found, torch.ops.resnet_fused_cpu.winograd_filters(weight))


def test_a_block() -> None:
    """A chain in two sub-batches, with a projection, whose last convolution is read while it is written."""
    first = ConvCase(3, 32, 9, 7, 64, kernel=3, stride=2, padding=1).make(FLOAT)
    second = ConvCase(3, 64, 5, 4, 64, kernel=3, padding=1).make(FLOAT, seed=1)
    shortcut = ConvCase(3, 32, 9, 7, 64, stride=2, act="none").make(FLOAT, seed=2)
    steps = [Convolution(first.conv, DIRECT), Convolution(second.conv, WINOGRAD), Convolution(shortcut.conv, DIRECT)]
    packed, geometry = [t for s in steps for t in s.packed], [i for s in steps for i in s.geometry]
    out = torch.full((3, 64, 5, 4), float("nan")).to(memory_format=torch.channels_last)
    arguments = (first.x, packed, geometry, True, None, out, 2)
    answer = simt_harness.call("resnet_fused_cpu::block", *arguments)
    assert answer.outs == (True,) and torch.ops.resnet_fused_cpu.block(*arguments)
    torch.testing.assert_close(answer.arguments[5], out)
