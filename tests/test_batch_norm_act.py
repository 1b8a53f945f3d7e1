"""batch_norm_act: values, statistics and gradients by every backend, on every device that is here."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import devices
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_backends import BACKENDS, RUNNING, device_of, ours
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.ops.batch_norm_act.call import BatchNormCall
from resnet_fused.ops.convbn import short_dtype
from resnet_fused.testing.norm_cases import (
    NORM_CASES,
    NormCase,
    assert_outcome,
    copied,
    eager,
    outcome,
    upstream_of,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def able(call: BatchNormCall) -> list[str]:
    return ["auto", *devices.able("batch_norm_act", call)]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_every_case_by_every_backend(case: NormCase, dtype: torch.dtype, device: str) -> None:
    call = case.make(dtype, device)
    for backend in able(call):
        grad = upstream_of(call)
        assert_outcome(outcome(lambda c, backend=backend: ours(c, backend), copied(call), grad), call, grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_a_large_mean(backend: str) -> None:
    """E[x²] − E[x]² would leave nothing of a variance of 1 beside a mean of 10⁴ in float32.

    A sound method is off by the machine epsilon times the condition number of a variance, mean/deviation.
    """
    call = NormCase(4, 6, 16, 16, act="none", momentum=1.0).make(torch.float32, device_of(backend))
    call = call._replace(x=call.x + 1e4)
    got = copied(call, grad=False)
    ours(got, backend)
    assert got.running_var is not None and got.running_mean is not None
    exact = call.x.double()
    torch.testing.assert_close(got.running_mean, exact.mean((0, 2, 3)).float())
    error = (got.running_var / exact.var((0, 2, 3)) - 1).abs().max()
    assert error < 1e4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_over_several_batches(backend: str, momentum: float | None) -> None:
    device = device_of(backend)
    norm = nn.BatchNorm2d(5, momentum=momentum).to(device)
    other = copy.deepcopy(norm)
    for seed in range(4):
        x = torch.randn(3, 5, 4, 3, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        x = x.to(device)
        functional.batch_norm_act(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum=momentum,
            num_batches_tracked=norm.num_batches_tracked, backend=backend,
        )  # fmt: skip
        other(x)
    for ours_, theirs in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours_, theirs)


@given(data=st.data())
def test_any_shape_and_layout(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, high)) for high in (3, 9, 5, 5)]
    if shape[0] * shape[2] * shape[3] == 1:
        shape[0] = 2
    backend = data.draw(st.sampled_from(RUNNING))
    device = device_of(backend)
    order = data.draw(st.permutations(range(4)))
    step = data.draw(st.sampled_from([1, 2]))

    def strided(seed: int) -> Tensor:
        sizes = [shape[i] for i in order]
        value = torch.randn(*sizes[:-1], sizes[-1] * step, generator=torch.Generator().manual_seed(seed))
        return value.to(device)[..., ::step].permute([order.index(i) for i in range(4)])

    x, residual = strided(0), strided(1) if data.draw(st.booleans()) else None
    act = data.draw(st.sampled_from(["relu", "none"]))
    call = NormCase(*shape, act=act).make(torch.float32, device)
    left, right = (copied(call)._replace(x=x, residual=residual) for _ in range(2))
    out, want = ours(left, backend), eager(right._replace(residual=None, act="none"))
    assert out.stride() == want.stride()
    untracked = right._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    torch.testing.assert_close(out, eager(untracked))
    torch.testing.assert_close(left.running_var, right.running_var)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_specials_stay_in_their_channel(backend: str, special: float) -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32, device_of(backend))
    call.x[1, 2, 0, 0] = special
    assert call.residual is not None
    call.residual[0, 4, 1, 1] = special
    out, want = ours(copied(call), backend), eager(copied(call))
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())
    assert out[:, 2].isnan().all() and not out[:, 3].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_misaligned_and_nothing_written_beside(backend: str) -> None:
    """Every tensor starts one element into a buffer of sentinels."""

    def inside(tensor: Tensor) -> tuple[Tensor, Tensor]:
        buffer = torch.full((tensor.numel() + 17,), 777.0, dtype=tensor.dtype, device=tensor.device)
        view = buffer[1 : 1 + tensor.numel()].as_strided(tensor.shape, tensor.stride(), 1)
        view.copy_(tensor)
        return buffer, view

    call = NormCase(2, 7, 5, 3, residual=True).make(torch.bfloat16, device_of(backend))
    buffers, views = {}, {}
    for name in ("x", "weight", "bias", "running_mean", "running_var", "residual"):
        buffers[name], views[name] = inside(getattr(call, name))
    out = ours(copied(call)._replace(**views), backend)
    assert torch.equal(out, ours(copied(call, grad=False), backend))
    for buffer in buffers.values():
        assert (buffer[0] == 777) and (buffer[-16:] == 777).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32, device_of(backend))
    call = copied(call._replace(x=call.x[:0], residual=call.residual[:0]))  # type: ignore[index]
    found = outcome(lambda c: ours(c, backend), call, call.x)
    assert found["output"].shape == found["grad x"].shape == (0, 5, 4, 3)
    assert found["grad weight"].tolist() == [0.0] * 5
    assert found["num_batches_tracked"] == 3 and found["running_var"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_once_per_replay_of_a_cuda_graph(momentum: float | None, backend: str) -> None:
    norm = nn.BatchNorm2d(24, momentum=momentum).cuda()
    other, warm = copy.deepcopy(norm), copy.deepcopy(norm)
    x = torch.randn(4, 24, 7, 5, device="cuda").contiguous(memory_format=torch.channels_last)

    def call(norm: nn.BatchNorm2d) -> Tensor:
        return functional.batch_norm_act(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum=momentum,
            num_batches_tracked=norm.num_batches_tracked, backend=backend,
        )  # fmt: skip

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        call(warm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        call(norm)
    for _ in range(3):
        graph.replay()
        other(x)
    for ours_, theirs in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours_, theirs)
