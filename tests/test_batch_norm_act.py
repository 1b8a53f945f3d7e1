"""batch_norm_act: values, statistics, gradients, registration, layouts, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from resnet_fused import backends, functional
from resnet_fused.ops.batch_norm_act import api
from resnet_fused.ops.batch_norm_act.call import BatchNormCall
from resnet_fused.ops.convbn import short_dtype
from resnet_fused.testing.budget import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass(frozen=True)
class NormCase:
    """One problem; ``mixed`` keeps γ, β and the running statistics in float32 beside a half-precision x."""

    n: int
    c: int
    h: int
    w: int
    residual: bool = False
    act: str = "relu"
    training: bool = True
    momentum: float | None = 0.1
    affine: bool = True
    tracked: bool = True
    channels_last: bool = True
    mixed: bool = False

    def __str__(self) -> str:
        text = f"N{self.n}-C{self.c}x{self.h}x{self.w}-{self.act}" + "-res" * self.residual
        text += "-eval" * (not self.training) + "-average" * (self.momentum is None)
        text += "-noaffine" * (not self.affine) + "-untracked" * (not self.tracked)
        return text + "-nchw" * (not self.channels_last) + "-mixed" * self.mixed

    def make(self, dtype: torch.dtype, device: str = "cpu") -> BatchNormCall:
        """Fresh tensors, whose mean is far from zero beside their deviation."""
        wide = torch.float32 if self.mixed and dtype != torch.float64 else dtype
        layout = torch.channels_last if self.channels_last else torch.contiguous_format

        def image(shift: float) -> Tensor:
            value = torch.randn(self.n, self.c, self.h, self.w) + shift
            return value.to(device, dtype).contiguous(memory_format=layout)

        def vector(low: float, high: float) -> Tensor:
            return (torch.rand(self.c) * (high - low) + low).to(device, wide)

        gamma, beta = (vector(0.5, 1.5), vector(-0.5, 0.5)) if self.affine else (None, None)
        mean, var = (vector(-0.5, 0.5), vector(0.5, 1.5)) if self.tracked else (None, None)
        count = torch.tensor(2, device=device) if self.tracked else None
        return BatchNormCall(
            image(1.0), gamma, beta, mean, var, count, image(0.0) if self.residual else None, self.training,
            self.momentum, 1e-5, self.act,
        )  # fmt: skip


CASES = [
    NormCase(2, 5, 7, 3),
    NormCase(2, 5, 7, 3, residual=True),
    NormCase(3, 64, 5, 6, residual=True, channels_last=False),
    NormCase(2, 8, 4, 4, act="none", channels_last=False),
    NormCase(2, 33, 1, 1, residual=True, act="none"),
    NormCase(1, 40, 9, 8, momentum=None),
    NormCase(4, 7, 3, 5, affine=False, residual=True),
    NormCase(2, 16, 5, 5, tracked=False),
    NormCase(2, 16, 5, 5, tracked=False, momentum=None),
    NormCase(2, 9, 6, 5, mixed=True, residual=True),
    NormCase(2, 9, 6, 5, mixed=True, momentum=None, affine=False, channels_last=False),
    NormCase(2, 12, 5, 4, training=False, residual=True),
    NormCase(2, 12, 5, 4, training=False, act="none", mixed=True, channels_last=False),
    NormCase(1, 6, 1, 1, training=False, affine=False),
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def eager(call: BatchNormCall) -> Tensor:
    """The documented equivalent; it moves the call's own statistics."""
    factor = call.momentum or 0.0
    if call.training and call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
        factor = 1 / float(call.num_batches_tracked) if call.momentum is None else factor
    y = F.batch_norm(
        call.x, call.running_mean, call.running_var, call.weight, call.bias, call.training, factor, call.eps
    )  # fmt: skip
    y = y if call.residual is None else y + call.residual
    return F.relu(y) if call.act == "relu" else y


def ours(call: BatchNormCall, backend: str = "auto") -> Tensor:
    x, weight, bias, mean, var, count, residual, training, momentum, eps, act = call
    return functional.batch_norm_act(
        x, weight, bias, mean, var, residual, training=training, momentum=momentum, eps=eps, act=act,
        num_batches_tracked=count, backend=backend,
    )  # fmt: skip


def copied(call: BatchNormCall, dtype: torch.dtype | None = None, grad: bool = True) -> BatchNormCall:
    """The call on copies of its tensors, floating ones in ``dtype``; inputs of the gradient ask for one."""

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        return value.requires_grad_() if grad and name in ("x", "weight", "bias", "residual") else value

    return BatchNormCall(*(one(name, value) for name, value in zip(call._fields, call, strict=True)))


def outcome(run: Callable[[BatchNormCall], Tensor], call: BatchNormCall, upstream: Tensor) -> dict[str, Tensor]:
    """What a call and its backward pass leave: output, gradients, statistics."""
    y = run(call)
    y.backward(upstream.to(y.dtype))
    found = {"output": y.detach()}
    for name in ("x", "weight", "bias", "residual"):
        if (value := getattr(call, name)) is not None:
            found[f"grad {name}"] = value.grad
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if (value := getattr(call, name)) is not None:
            found[name] = value
    return found


def upstream_of(call: BatchNormCall) -> Tensor:
    grad = torch.randn(call.x.shape).to(call.x.device, call.x.dtype)
    return grad.contiguous(memory_format=torch.channels_last)


def check(call: BatchNormCall, backend: str) -> None:
    """Output, gradients and statistics against eager's and a float64 run's.

    Where eager rounds before the sum or the ReLU and the kernel does not, a value at the ReLU's edge may fall on the
    other side: the gradient's yardstick takes the mask of the output itself.
    """
    grad = upstream_of(call)
    got = outcome(lambda c: ours(c, backend), copied(call), grad)
    theirs = outcome(eager, copied(call), grad)
    if call.act == "relu":
        grad = torch.where(got["output"] > 0, grad, 0)
        linear = call._replace(act="none")
        exact = outcome(eager, copied(linear, torch.float64), grad.double())
        theirs = {**outcome(eager, copied(linear), grad), "output": theirs["output"]}
        exact["output"] = F.relu(exact["output"])
    else:
        exact = outcome(eager, copied(call, torch.float64), grad.double())
    assert list(got) == list(theirs)
    for name, value in got.items():
        assert value.stride() == theirs[name].stride(), name
        if value.is_floating_point():
            assert_within_budget(value, theirs[name], exact[name].double())
        else:
            assert torch.equal(value, theirs[name]), name


def able(call: BatchNormCall) -> list[str]:
    names = [name for name in backends.NAMES if backends.refusal("batch_norm_act", name, call) is None]
    return ["auto", *names]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=short_dtype)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_by_every_backend(case: NormCase, dtype: torch.dtype, device: str) -> None:
    call = case.make(dtype, device)
    for backend in able(call):
        check(call, backend)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_statistics_of_a_large_mean(backend: str, device: str) -> None:
    """E[x²] − E[x]² would leave nothing of a variance of 1 beside a mean of 10⁴ in float32.

    A sound method is off by the machine epsilon times the condition number of a variance, mean/deviation.
    """
    call = NormCase(4, 6, 16, 16, act="none", momentum=1.0).make(torch.float32, device)
    call = call._replace(x=call.x + 1e4)
    if backend != "auto" and backends.refusal("batch_norm_act", backend, call):
        pytest.skip("needs a CUDA GPU")
    got = copied(call, grad=False)
    ours(got, backend)
    assert got.running_var is not None and got.running_mean is not None
    exact = call.x.double()
    torch.testing.assert_close(got.running_mean, exact.mean((0, 2, 3)).float())
    error = (got.running_var / exact.var((0, 2, 3)) - 1).abs().max()
    assert error < 1e4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_running_statistics_over_several_batches(backend: str, momentum: float | None) -> None:
    norm = nn.BatchNorm2d(5, momentum=momentum)
    other = copy.deepcopy(norm)
    for seed in range(4):
        x = torch.randn(3, 5, 4, 3, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
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
    order = data.draw(st.permutations(range(4)))
    step = data.draw(st.sampled_from([1, 2]))

    def strided(seed: int) -> Tensor:
        sizes = [shape[i] for i in order]
        value = torch.randn(*sizes[:-1], sizes[-1] * step, generator=torch.Generator().manual_seed(seed))
        return value[..., ::step].permute([order.index(i) for i in range(4)])

    x, residual = strided(0), strided(1) if data.draw(st.booleans()) else None
    act = data.draw(st.sampled_from(["relu", "none"]))
    call = NormCase(*shape, act=act).make(torch.float32)
    backend = data.draw(st.sampled_from(["auto", "reference", "triton"]))
    left, right = (copied(call)._replace(x=x, residual=residual) for _ in range(2))
    out, want = ours(left, backend), eager(right._replace(residual=None, act="none"))
    assert out.stride() == want.stride()
    untracked = right._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    torch.testing.assert_close(out, eager(untracked))
    torch.testing.assert_close(left.running_var, right.running_var)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_specials_stay_in_their_channel(backend: str, special: float) -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32)
    call.x[1, 2, 0, 0] = special
    assert call.residual is not None
    call.residual[0, 4, 1, 1] = special
    out, want = ours(copied(call), backend), eager(copied(call))
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())
    assert out[:, 2].isnan().all() and not out[:, 3].isnan().any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_misaligned_and_nothing_written_beside(backend: str) -> None:
    """Every tensor starts one element into a buffer of sentinels."""

    def inside(tensor: Tensor) -> tuple[Tensor, Tensor]:
        buffer = torch.full((tensor.numel() + 17,), 777.0, dtype=tensor.dtype)
        view = buffer[1 : 1 + tensor.numel()].as_strided(tensor.shape, tensor.stride(), 1)
        view.copy_(tensor)
        return buffer, view

    call = NormCase(2, 7, 5, 3, residual=True).make(torch.bfloat16)
    buffers, views = {}, {}
    for name in ("x", "weight", "bias", "running_mean", "running_var", "residual"):
        buffers[name], views[name] = inside(getattr(call, name))
    out = ours(copied(call)._replace(**views), backend)
    assert torch.equal(out, ours(copied(call, grad=False), backend))
    for buffer in buffers.values():
        assert (buffer[0] == 777) and (buffer[-16:] == 777).all()


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_an_empty_batch(backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32)
    call = copied(call._replace(x=call.x[:0], residual=call.residual[:0]))  # type: ignore[index]
    found = outcome(lambda c: ours(c, backend), call, call.x)
    assert found["output"].shape == found["grad x"].shape == (0, 5, 4, 3)
    assert found["grad weight"].tolist() == [0.0] * 5
    assert found["num_batches_tracked"] == 3 and found["running_var"].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend: str, act: str, residual: bool, training: bool) -> None:
    """First and second derivatives; the affine part off as well."""
    for affine in (True, False):
        case = NormCase(2, 3, 2, 3, residual=residual, act=act, training=training, affine=affine)
        call = copied(case.make(torch.float64))
        names = [n for n in ("x", "weight", "bias", "residual") if getattr(call, n) is not None]

        def function(*values: Tensor, call: BatchNormCall = call, names: list[str] = names) -> Tensor:
            fresh = copied(call._replace(**dict.fromkeys(names)))
            return ours(fresh._replace(**dict(zip(names, values, strict=True))), backend)

        inputs = tuple(getattr(call, n) for n in names)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_second_derivative_is_eagers(backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32)

    def penalty(run: Callable[[BatchNormCall], Tensor]) -> Tensor:
        fresh = copied(call)
        y = run(fresh)
        loss = (y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum()
        (grad,) = torch.autograd.grad(loss, fresh.x, create_graph=True)
        grad.square().sum().backward()
        assert fresh.x.grad is not None
        return fresh.x.grad

    torch.testing.assert_close(penalty(lambda c: ours(c, backend)), penalty(eager))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "case",
    [CASES[1], CASES[5], CASES[6], CASES[7], CASES[10], CASES[11], CASES[13]],
    ids=str,
)
def test_opcheck(case: NormCase, grad: bool) -> None:
    torch.library.opcheck(api.OP, (*copied(case.make(torch.float32), grad=grad), "reference"))


def test_only_what_wants_a_gradient_gets_one() -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32)
    for name in ("x", "weight", "bias", "residual"):
        for backend in ("auto", "reference", "triton"):
            fresh = copied(call, grad=False)
            getattr(fresh, name).requires_grad_()
            ours(fresh, backend).sum().backward()
            assert getattr(fresh, name).grad is not None
            assert all(getattr(fresh, n).grad is None for n in ("x", "weight", "bias", "residual") if n != name)


def test_no_mask_is_kept() -> None:
    """x, the output and two vectors."""
    call = copied(NormCase(2, 16, 8, 8, residual=True).make(torch.float32))
    for backend in ("auto", "reference", "triton"):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(call, backend)
        assert sum(kept.values()) <= 2 * call.x.numel() * 4 + 8 * 16 * 4


def test_statistics_changed_before_the_backward_pass_are_noticed() -> None:
    """Frozen ones are read again; eager raises too."""
    for backend in ("auto", "reference", "triton"):
        call = copied(NormCase(2, 5, 4, 3, training=False).make(torch.float32))
        out = ours(call, backend).sum()
        assert call.running_mean is not None
        call.running_mean.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_autocast(backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True, mixed=True).make(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(copied(call), backend).dtype == torch.bfloat16
        wide = call._replace(residual=call.residual.float())  # type: ignore[union-attr]
        out, want = ours(copied(wide), backend), eager(copied(wide))
    assert out.dtype == want.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training: bool, backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True, training=training).make(torch.float32)
    compiled = torch.compile(lambda c: ours(c, backend), fullgraph=True, backend="aot_eager")
    grad = upstream_of(call)
    found, want = outcome(compiled, copied(call), grad), outcome(eager, copied(call), grad)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_bad_input_is_named() -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32)
    assert call.residual is not None and call.weight is not None and call.running_var is not None

    def expect(kind: type[Exception], match: str, **changed: Any) -> None:
        for backend in ("auto", "reference"):
            before = None if call.running_mean is None else call.running_mean.clone()
            with pytest.raises(kind, match=match):
                ours(call._replace(**changed), backend)
            assert before is not None and torch.equal(before, call.running_mean), "statistics moved"  # type: ignore[arg-type]
            assert call.num_batches_tracked == 2

    expect(ValueError, r"x: got shape \(5, 4, 3\), need 4 dimensions", x=call.x[0])
    expect(TypeError, r"x: got torch.int64", x=call.x.long())
    expect(ValueError, r"weight: got shape \(4,\), need \(5,\)", weight=call.weight[:4])
    expect(TypeError, r"running_var: got torch.float64, need torch.float32", running_var=call.running_var.double())
    expect(ValueError, r"residual: got shape \(2, 5, 4, 2\)", residual=call.residual[..., :2])
    expect(TypeError, r"residual: got torch.bfloat16", residual=call.residual.bfloat16())
    expect(ValueError, r"act: got 'gelu'", act="gelu")
    expect(ValueError, r"running_var: got None, need both", running_var=None)
    none = {"running_mean": None, "running_var": None}
    expect(ValueError, r"running_mean: got None, need the statistics", **none, training=False)
    expect(ValueError, r"num_batches_tracked: got None", num_batches_tracked=None, momentum=None)
    expect(ValueError, r"more than 1 value per channel", x=call.x[:1, :, :1, :1], residual=None)
    expect(ValueError, r"one device", bias=torch.empty(5, device="meta"))
    with pytest.raises(ValueError, match=r"backend: got 'nope'"):
        ours(call, "nope")
    with pytest.raises(backends.BackendError, match=r"onednn has no batch_norm_act"):
        ours(call, "onednn")


def test_one_value_per_channel_says_what_batch_norm_says() -> None:
    x = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError) as theirs:
        nn.BatchNorm2d(3)(x)
    with pytest.raises(ValueError) as mine:
        functional.batch_norm_act(x, None, None, None, None)
    assert str(mine.value) == str(theirs.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_once_per_replay_of_a_cuda_graph(momentum: float | None) -> None:
    norm = nn.BatchNorm2d(24, momentum=momentum).cuda()
    other, warm = copy.deepcopy(norm), copy.deepcopy(norm)
    x = torch.randn(4, 24, 7, 5, device="cuda").contiguous(memory_format=torch.channels_last)

    def call(norm: nn.BatchNorm2d) -> Tensor:
        return functional.batch_norm_act(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum=momentum,
            num_batches_tracked=norm.num_batches_tracked,
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
