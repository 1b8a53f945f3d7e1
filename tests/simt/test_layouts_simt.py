"""The emulator's mma.sync and ldmatrix against the PTX ISA, and the host's number conversions against numpy and torch.

The layouts stand here as the sections "Matrix Fragments for mma.m16n8k16", "… mma.m16n8k8" and "ldmatrix" of the PTX
ISA give them, in its names, written without a look at the emulator. Kernels, emulator and conversions could otherwise
share one mistake that no test of a kernel would see.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import simt_harness
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TERM_BITS = 24  # runtime.h


def fragments_16(lane: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, column) of a0 … a7 and of b0 … b3 in m16n8k16."""
    group_id, thread_id_in_group = lane >> 2, lane % 4
    a = []
    for i in range(8):
        row = group_id if 0 <= i < 2 or 4 <= i < 6 else group_id + 8
        column = thread_id_in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
        a.append((row, column))
    b = [(thread_id_in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group_id) for i in range(4)]
    return a, b


def fragments_8(lane: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, column) of a0 … a3 and of b0, b1 in m16n8k8 with .tf32."""
    group_id, thread_id_in_group = lane >> 2, lane % 4
    a = [
        (group_id if i in (0, 2) else group_id + 8, thread_id_in_group if i in (0, 1) else thread_id_in_group + 4)
        for i in range(4)
    ]
    return a, [(thread_id_in_group + 4 * i, group_id) for i in range(2)]


def accumulators(lane: int) -> list[tuple[int, int]]:
    """(row, column) of c0 … c3 in either shape."""
    group_id, thread_id_in_group = lane >> 2, lane % 4
    return [(group_id if i < 2 else group_id + 8, thread_id_in_group * 2 + (i & 1)) for i in range(4)]


def mma(element: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """c [16, 8] + a [16, k] · b [k, 8] by the emulator, through registers filled and read as the ISA says."""
    registers_a, registers_b, registers_c = [], [], []
    for lane in range(32):
        places_a, places_b = fragments_8(lane) if element == "tf32" else fragments_16(lane)
        values_a = torch.stack([a[place] for place in places_a])
        values_b = torch.stack([b[place] for place in places_b])
        if element != "tf32":  # the element of the lower index is in the lower half of the register
            values_a, values_b = values_a.to(DTYPES[element]), values_b.to(DTYPES[element])
        registers_a.append(values_a.view(torch.int32))
        registers_b.append(values_b.view(torch.int32))
        registers_c.append(torch.stack([c[place] for place in accumulators(lane)]))
    found = simt_harness.call(
        "resnet_fused_host::mma", torch.stack(registers_c), torch.stack(registers_a), torch.stack(registers_b), element
    ).out
    d = torch.full((16, 8), float("nan"))
    for lane in range(32):
        for i, place in enumerate(accumulators(lane)):
            d[place] = found[lane, i]
    return d


def depth(element: str) -> int:
    return 8 if element == "tf32" else 16


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("element", ("bf16", "fp16", "tf32"))
def test_mma_layout(element: str) -> None:
    """Whole numbers, whose sums are exact: any element in a wrong place shows."""
    k = depth(element)
    a, b, c = ((8 * normal(seed, *shape)).round() for seed, shape in enumerate(((16, k), (k, 8), (16, 8))))
    assert torch.equal(mma(element, a, b, c), c + a @ b)
    for i in range(16):  # one element at a time
        for j in range(k):
            one = torch.zeros(16, k)
            one[i, j] = 1
            if (i + j) % 5 == 0:
                assert torch.equal(mma(element, one, b, c), c + one @ b), (i, j)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix_layout(count: int, transposed: bool) -> None:
    """Threads 0-7 give the rows of the first matrix, 8-15 of the second, and so on. Of each matrix thread T receives,
    in row T / 4, the elements 2·(T % 4) and the next; with .trans those of the transposed matrix."""
    memory = torch.arange(32 * 8 * 2, dtype=torch.int16)
    order = torch.randperm(32 * 2, generator=torch.Generator().manual_seed(count))[:32]  # rows of 16 bytes, anywhere
    found = simt_harness.call("resnet_fused_host::load_matrix", memory, (order * 16).int(), count, transposed).out
    rows = memory.view(-1, 8)[order]
    for thread in range(32):
        for matrix in range(count):
            elements = rows[8 * matrix : 8 * matrix + 8]
            if transposed:
                elements = elements.T
            low, high = elements[thread // 4, 2 * (thread % 4)], elements[thread // 4, 2 * (thread % 4) + 1]
            assert int(found[thread, matrix]) == int(low) | int(high) << 16


def tensor_core(terms: list[Fraction]) -> Fraction:
    """Exact products, aligned to the largest one and cut to 24 bits; their sum cut to float32."""

    def cut(value: Fraction, step: Fraction) -> Fraction:
        return (1 if value > 0 else -1) * (abs(value) // step) * step

    def exponent(value: Fraction) -> int:
        power = abs(value).numerator.bit_length() - value.denominator.bit_length()
        return power if Fraction(2) ** power <= abs(value) else power - 1

    largest = max(terms, key=abs)
    total = sum((cut(term, Fraction(2) ** (exponent(largest) - TERM_BITS + 1)) for term in terms), Fraction(0))
    return cut(total, Fraction(2) ** (exponent(total) - 23)) if total else total


@pytest.mark.parametrize("element", ("bf16", "fp16", "tf32"))
def test_mma_is_no_more_exact_than_a_tensor_core(element: str) -> None:
    """The kernels' tests run on these sums: that they stay within the error budget does not rest on better ones."""
    k = depth(element)
    a, b, c = normal(0, 16, k), normal(1, k, 8) * 10 ** normal(2, k, 8), normal(3, 16, 8)
    if element == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    else:
        a, b = a.to(DTYPES[element]).float(), b.to(DTYPES[element]).float()
    found, different = mma(element, a, b, c), 0
    for i in range(16):
        for j in range(8):
            terms = [Fraction(a[i, n].item()) * Fraction(b[n, j].item()) for n in range(k)] + [Fraction(c[i, j].item())]
            assert Fraction(found[i, j].item()) == tensor_core(terms)
            error = abs(Fraction(found[i, j].item()) - sum(terms))
            # Each term loses less than one step of the largest, and the result less than one of its own.
            assert error < (k + 2) * 2 * max(map(abs, terms)) / 2 ** (TERM_BITS - 1)
            different += error > 0
    assert different > 64


def patterns() -> Tensor:
    """Float32 bits: all upper halves, each with lower ones at and beside every boundary of rounding."""
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return ((torch.arange(-(1 << 15), 1 << 15) << 16).view(-1, 1) | low).flatten().int()


def convert(what: str, bits: Tensor) -> Tensor:
    return simt_harness.call("resnet_fused_host::convert", what, bits).out


def assert_same_numbers(found: np.ndarray, want: np.ndarray) -> None:
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan], want[~nan]) and np.array_equal(np.signbit(found[~nan]), np.signbit(want[~nan]))


def test_half_types_to_float() -> None:
    bits = torch.arange(1 << 16).int()
    halves = bits.numpy().astype(np.uint16)
    assert_same_numbers(
        convert("fp16 to float", bits).numpy().view(np.float32), halves.view(np.float16).astype(np.float32)
    )
    shifted = (halves.astype(np.uint32) << 16).view(np.float32)
    assert_same_numbers(convert("bf16 to float", bits).numpy().view(np.float32), shifted)


def test_float_to_half_types() -> None:
    bits = patterns()
    floats = bits.numpy().view(np.float32)
    found = convert("float to fp16", bits).numpy().astype(np.uint16).view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_numbers(found, floats.astype(np.float16))
    found = convert("float to bf16", bits).to(torch.int16).view(torch.bfloat16).float().numpy()
    assert_same_numbers(found, bits.view(torch.float32).bfloat16().float().numpy())


def test_float_to_tf32() -> None:
    """Ten bits behind the first, ties away from zero, computed in float64."""
    bits = patterns()
    with np.errstate(invalid="ignore"):  # signalling NaN
        floats = bits.numpy().view(np.float32).astype(np.float64)
    finite = np.isfinite(floats)
    _, exponent = np.frexp(np.where(finite, floats, 1))
    step = np.exp2(np.maximum(exponent - 1, -126).astype(np.float64) - 10)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.where(finite, np.copysign(np.floor(np.abs(floats) / step + 0.5) * step, floats), floats)
        assert_same_numbers(convert("float to tf32", bits).numpy().view(np.float32), rounded.astype(np.float32))


def test_float_arithmetic() -> None:
    positive = patterns()[patterns() > 0]
    floats = positive.numpy().view(np.float32)
    with np.errstate(invalid="ignore"):
        want = np.float32(1) / np.sqrt(floats)
    assert_same_numbers(convert("reciprocal_sqrt", positive).numpy().view(np.float32), want)
    a, b = normal(0, 2000), normal(1, 2000)
    c = -a * b * (1 + 2.0**-22 * normal(2, 2000).round())  # what is left are the bits that a product alone would lose
    found = simt_harness.call("resnet_fused_host::fused_multiply_add", a, b, c).out
    for i in range(2000):
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        assert found[i].item() == float(np.float32(float(exact)))
