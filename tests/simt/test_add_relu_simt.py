"""The CUDA kernels of add_relu on the host runtime: equal to eager, bit for bit."""

from __future__ import annotations

import pytest
import simt_harness
import torch
from torch import Tensor

from resnet_fused.ops.convbn import short_dtype

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)

DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=short_dtype)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values with NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0], dtype=dtype)
    places = torch.randint(tensor.numel(), (min(tensor.numel(), 8),), generator=generator)
    flat = tensor.view(-1)
    flat[places] = special[torch.arange(len(places)) % len(special)]
    return tensor


def run(a: Tensor, b: Tensor, op: str = "add_relu", shift: dict[str, int] | None = None) -> tuple[str, Tensor]:
    """What was printed and the result. ``shift``: bytes by which a and b miss alignment; "out": by one element."""
    shift = dict(shift or {})
    out = shift.pop("out", 0)
    places = {("a", "b").index(name): bytes_ for name, bytes_ in shift.items()}
    answer = simt_harness.call(f"resnet_fused_cuda::{op}", a, b, shift=places, shifted=int(out > 0))
    return answer.text, answer.out


def assert_same(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("count", (1, 7, 64, 1023, 2 * 256 * 4 * 8 + 5))
def test_flat(count: int, dtype: torch.dtype) -> None:
    a, b = values((count,), dtype, 1), values((count,), dtype, 2)
    text, out = run(a, b)
    assert text.startswith("vectors")
    assert_same(out, torch.relu(a + b))


@DTYPES
def test_in_place(dtype: torch.dtype) -> None:
    a, b = values((3, 5, 7, 9), dtype, 1), values((3, 5, 7, 9), dtype, 2)
    assert_same(run(a, b, "add_relu_")[1], torch.relu(a + b))


@DTYPES
@pytest.mark.parametrize("count", (1, 3, 517))
@pytest.mark.parametrize("shifted", (("a", "b", "out"), ("a",), ("b", "out")), ids="+".join)
def test_misaligned(shifted: tuple[str, ...], count: int, dtype: torch.dtype) -> None:
    """All three alike: a head of single elements and then vectors; otherwise single elements throughout."""
    a, b = values((1, 1, 1, count), dtype, 1), values((1, 1, 1, count), dtype, 2)
    text, out = run(a, b, shift=dict.fromkeys(shifted, dtype.itemsize))
    assert text.startswith("vectors" if len(shifted) == 3 else "elements")
    assert_same(out, torch.relu(a + b))


@DTYPES
def test_layouts(dtype: torch.dtype) -> None:
    a, b = values((2, 6, 5, 4), dtype, 1), values((2, 6, 5, 4), dtype, 2)
    expected = torch.relu(a + b)
    last = {"memory_format": torch.channels_last}
    text, out = run(a.contiguous(**last), b.contiguous(**last))
    assert text.startswith("vectors")
    assert_same(out, expected)
    text, out = run(a.contiguous(**last), b)
    assert text.startswith("strided")
    assert_same(out, expected)
    assert out.stride() == (a.contiguous(**last) + b).stride()


@DTYPES
def test_views(dtype: torch.dtype) -> None:
    """Crops, steps, expanded and five-dimensional views."""
    a, b = values((3, 8, 9, 10), dtype, 1), values((3, 8, 9, 10), dtype, 2)
    assert_same(run(a[:, ::2, 1:8], b[:, 1::2, 2:])[1], torch.relu(a[:, ::2, 1:8] + b[:, 1::2, 2:]))
    row = b[:, :, :1, :].expand_as(a)
    assert_same(run(a, row)[1], torch.relu(a + row))
    five = values((2, 3, 4, 5, 6), dtype, 3).permute(4, 2, 0, 3, 1)
    other = values(tuple(five.shape), dtype, 4)
    assert_same(run(five, other)[1], torch.relu(five + other))


@DTYPES
def test_backward(dtype: torch.dtype) -> None:
    grad, output = values((2, 3, 9, 5), dtype, 1), torch.relu(values((2, 3, 9, 5), dtype, 2))
    assert torch.isnan(output).any()
    expected = torch.ops.aten.threshold_backward(grad, output, 0)
    assert_same(run(grad, output, "relu_backward")[1], expected)
    step = run(grad[:, :, ::2], output[:, :, ::2], "relu_backward")[1]
    assert_same(step, expected[:, :, ::2])


def test_refusals_give_a_reason() -> None:
    six = torch.zeros(2, 2, 2, 2, 2, 2).permute(5, 3, 1, 4, 2, 0)
    with pytest.raises(simt_harness.Refused, match="more than 5 dimensions that cannot be merged"):
        run(six, torch.zeros(2, 2, 2, 2, 2, 2))
    with pytest.raises(simt_harness.Refused, match="a pointer is not aligned to its element"):
        run(torch.zeros(4), torch.zeros(4), shift={"b": 2})
    with pytest.raises(simt_harness.Refused, match=r"b: got shape \[5\], need that of a, \[4\]"):
        run(torch.zeros(4), torch.zeros(5))
    with pytest.raises(simt_harness.Refused, match="b: need the dtype of a"):
        run(torch.zeros(4), torch.zeros(4).half())
    with pytest.raises(simt_harness.Refused, match="a: need bfloat16, float16 or float32"):
        run(torch.zeros(4).double(), torch.zeros(4).double())
