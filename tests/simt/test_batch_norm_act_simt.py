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
from resnet_fused.testing import norm_cases
from resnet_fused.testing.norm_cases import NORM_CASES, NormCase, assert_outcome, copied, eager, upstream_of

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


def test_many_splits() -> None:
    """More splits than a thread that merges takes at once."""
    case = NormCase(1, 32, 71, 61, residual=True)
    call = case.make(torch.bfloat16)
    options = Options(multiprocessors=64, shift=dict.fromkeys(("x", "grad", "out"), 2))
    check(call, options, "channels_last elements lanes 32 chunks 1 splits 136")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("channels_last", (True, False))
def test_order_of_threads_does_not_matter(channels_last: bool, seed: int) -> None:
    call = NormCase(5, 24, 8, 9, residual=True, channels_last=channels_last).make(torch.float32)
    grad = upstream_of(call)
    first, second = (outcome(copied(call, grad=False), grad, Options(seed=s))[1] for s in (0, seed + 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@DTYPES
@pytest.mark.parametrize(
    "names", ("x", "residual", "out", "grad", "output", "dx", "dresidual", "gamma mean scale running_var"), ids=str
)
def test_misaligned(names: str, dtype: torch.dtype) -> None:
    """Full-size tensors that cannot take vectors together are read element by element; vectors are never assumed."""
    call = NormCase(2, 8, 7, 5, residual=True).make(dtype)
    shift = dict.fromkeys(names.split(), 4 if "gamma" in names else dtype.itemsize)
    check(call, Options(shift=shift))


@pytest.mark.parametrize("channels_last", (True, False))
@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("training", (True, False))
def test_the_output_again_has_the_same_bits(training: bool, residual: bool, channels_last: bool) -> None:
    case = NormCase(3, 40, 6, 4, residual=residual, training=training, channels_last=channels_last)
    call = case.make(torch.bfloat16)
    _, out, mean, scale = norm_calls.forward(copied(call, grad=False), Options())
    given = (mean, scale) if training else (call.running_mean, call.running_var)
    again = norm_calls.apply(call, *given, Options())[1]  # type: ignore[arg-type]
    assert torch.equal(out, again)


@pytest.mark.parametrize("channels_last", (True, False))
def test_statistics_of_a_large_mean(channels_last: bool) -> None:
    """A sound method is off by the machine epsilon times the condition number of a variance, mean/deviation."""
    call = NormCase(4, 8, 16, 16, act="none", momentum=1.0, channels_last=channels_last).make(torch.float32)
    call = call._replace(x=call.x + 1e4)
    norm_calls.forward(call, Options())
    assert call.running_mean is not None and call.running_var is not None
    exact = call.x.double()
    torch.testing.assert_close(call.running_mean, exact.mean((0, 2, 3)).float())
    error = (call.running_var / exact.var((0, 2, 3)) - 1).abs().max()
    assert error < 1e4 * torch.finfo(torch.float32).eps


@DTYPES
@pytest.mark.parametrize("special", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("training", (True, False))
def test_specials_stay_in_their_channel(training: bool, special: float, dtype: torch.dtype) -> None:
    call = NormCase(2, 8, 4, 3, residual=True, training=training).make(dtype)
    call.x[1, 2, 0, 0] = special
    assert call.residual is not None
    call.residual[0, 4, 1, 1] = special
    grad = upstream_of(call)
    found = outcome(copied(call, grad=False), grad, Options())[1]
    want = norm_cases.outcome(eager, copied(call), grad)
    for name in ("output", "grad x", "grad residual"):
        torch.testing.assert_close(found[name].isnan(), want[name].isnan(), msg=name)
        torch.testing.assert_close(found[name].isinf(), want[name].isinf(), msg=name)
    assert not found["grad x"][:, 3].isnan().any()


@pytest.mark.parametrize("need_x", (True, False))
@pytest.mark.parametrize("need_residual", (True, False))
def test_only_what_is_wanted_is_written(need_x: bool, need_residual: bool) -> None:
    call = NormCase(2, 8, 4, 3).make(torch.float32)
    _, out, mean, scale = norm_calls.forward(call, Options())
    gradient = GradientCall(
        upstream_of(call), call.x, call.weight, None, None, mean, scale, out, True, call.eps, need_x, need_residual
    )
    _, grads = norm_calls.backward(gradient, Options())
    assert ("dx" in grads, "dresidual" in grads) == (need_x, need_residual)
    assert grads["dgamma"].isfinite().all() and grads["dbeta"].isfinite().all()


def test_refusals_give_a_reason() -> None:
    call = NormCase(2, 8, 4, 3).make(torch.bfloat16)
    with pytest.raises(simt_harness.Refused, match="batch_norm_act by cuda: a pointer is not aligned to its element"):
        norm_calls.forward(copied(call, grad=False), Options(shift={"x": 1}))
    one = NormCase(1, 8, 1, 1).make(torch.bfloat16)
    with pytest.raises(simt_harness.Refused, match="batch_norm_act by cuda: one value per channel has no variance"):
        norm_calls.forward(one, Options())
    with pytest.raises(simt_harness.Refused, match=r"weight: got shape \[4\], need \[8\]"):
        norm_calls.forward(copied(call, grad=False)._replace(weight=torch.ones(4)), Options())
