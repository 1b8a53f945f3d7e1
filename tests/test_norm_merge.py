"""The merge of batch_norm_act's partial statistics by Triton, against float64, and in how many turns it is done."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from resnet_fused import backends
from resnet_fused.ops.batch_norm_act import triton as norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # NumPy's, in the interpreter
    pytest.mark.skipif(backends.unavailable("triton") is not None, reason=str(backends.unavailable("triton"))),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, LAST, EPS, MOMENTUM = 192, 5, 1e-5, 0.25
SPLITS = (1, 2, 3, 127, 128, 129, 255, 257, 528)  # 528: what an H100 is given for 64 channels


def merge(partial: torch.Tensor, running: list[torch.Tensor]) -> list[torch.Tensor]:
    """(mean, 1/√(var + eps)) of each channel by the kernel; the running statistics move."""
    _, splits, channels = partial.shape
    outs = [torch.full((channels,), math.nan, device=DEVICE) for _ in range(2)]
    norm.merge_kernel[(math.ceil(channels / norm.MERGE.block_c),)](
        partial, *outs, *running, None, ROWS * (splits - 1) + LAST, channels, ROWS, splits, MOMENTUM, EPS,
        BS=norm.MERGE.block_m, BC=norm.MERGE.block_c, num_warps=norm.MERGE.warps,
    )  # fmt: skip
    return outs


def parts(splits: int, channels: int, mean: float) -> torch.Tensor:
    """Means and squared deviations of so many splits about ``mean``, with a deviation near 1."""
    generator = torch.Generator().manual_seed(splits)
    means = mean + torch.randn(splits, channels, generator=generator) / 8
    squares = ROWS * (0.5 + torch.rand(splits, channels, generator=generator))
    return torch.stack([means, squares]).to(DEVICE)


@pytest.mark.parametrize("mean", (0.0, 1e4))
@pytest.mark.parametrize("splits", SPLITS)
def test_any_number_of_splits(splits: int, mean: float) -> None:
    channels = norm.MERGE.block_c + 3
    partial = parts(splits, channels, mean)
    running = [torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)]
    got_mean, got_rstd = merge(partial, running)

    n = torch.full((splits, 1), float(ROWS), dtype=torch.float64, device=DEVICE)
    n[-1] = LAST
    means, squares = partial.double()
    want_mean = (means * n).sum(0) / n.sum()
    deviation = squares.sum(0) + ((means - want_mean) ** 2 * n).sum(0)
    tolerance = 8 * torch.finfo(torch.float32).eps
    condition = max(1.0, mean)  # mean over deviation: what rounding of the means does to the variance
    torch.testing.assert_close(got_mean.double(), want_mean, rtol=tolerance, atol=tolerance)
    want_rstd = 1 / (deviation / n.sum() + EPS).sqrt()
    torch.testing.assert_close(got_rstd.double(), want_rstd, rtol=tolerance * condition, atol=0)
    torch.testing.assert_close(running[0].double(), MOMENTUM * want_mean, rtol=tolerance, atol=tolerance)
    want_var = (1 - MOMENTUM) + MOMENTUM * deviation / (n.sum() - 1)
    torch.testing.assert_close(running[1].double(), want_var, rtol=tolerance * condition, atol=0)


@pytest.mark.parametrize("special", (math.nan, math.inf))
def test_a_special_value_stays_in_its_channel(special: float) -> None:
    partial = parts(130, 4, 0.0)
    partial[0, 129, 1] = special
    mean, rstd = merge(partial, [torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)])
    assert rstd.isnan().tolist() == [False, True, False, False]
    assert mean.isfinite().tolist() == [True, False, True, True]


def test_splits_are_read_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over single splits would read two vectors for each: 1056 dependent turns for 528 splits."""
    if not backends.interpreting():
        return  # counted where the kernel is interpreted; the code is looked at by test_triton_compile
    from triton.runtime import interpreter

    loads: list[int] = []
    load = interpreter.interpreter_builder.create_masked_load
    monkeypatch.setattr(
        interpreter.interpreter_builder, "create_masked_load", lambda *args: loads.append(1) or load(*args)
    )
    merge(parts(528, 4, 0.0), [torch.zeros(4), torch.ones(4)])
    assert len(loads) <= 16
