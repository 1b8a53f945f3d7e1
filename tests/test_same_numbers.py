"""The same numbers, whatever happened between two predictions: nothing stale, nothing that eager can and we cannot.

Each way of writing and changing a model stands alone first; then a state machine mixes them at random.
HYPOTHESIS_PROFILE=nightly takes 3,000 sequences in place of 200, and longer ones.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from small_networks import KINDS
from torch import Tensor, nn
from twins import MODES, Look, Side, Twins, in_float64, run
from ways_of_changing import CHANGES, PATCHES
from ways_of_replacing import WAYS
from ways_of_writing import moved, tensors

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SEQUENCES, STEPS = (3000, 20) if NIGHTLY else (200, 7)

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

pytestmark = [
    pytest.mark.waits,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of non-leaf gradients, odd optimizers, old formats
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LOOKS = [Look(mode, autocast) for autocast in (False, True) for mode in MODES]


def _sparse(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    for p in parameters:
        p.grad = p.grad.to_sparse()
    return torch.optim.SparseAdam(parameters, lr=0.01)


def _optimizers() -> Iterator[tuple[str, Make]]:
    """Every class of torch.optim in each implementation that it has."""
    rates = {"SGD": 0.5, "ASGD": 0.5, "Adadelta": 10.0, "LBFGS": 0.05}
    for name, cls in inspect.getmembers(torch.optim, inspect.isclass):
        if not issubclass(cls, torch.optim.Optimizer) or cls is torch.optim.Optimizer or cls is torch.optim.SparseAdam:
            continue
        has = inspect.signature(cls).parameters
        options = [{"foreach": False}, {"foreach": True}] if "foreach" in has else [{}]
        options += [{"fused": True}] if "fused" in has else []

        def made(parameters: list[nn.Parameter], cls: Any = cls, name: str = name, **option: Any) -> Any:
            chosen = [p for p in parameters if p.dim() == 2] if name == "Muon" else parameters
            return cls(chosen, lr=rates.get(name, 0.01), **option)

        for option in options:
            label = "-".join([name, *(f"{k}={v}" for k, v in option.items())])
            yield label, lambda parameters, made=made, option=option: made(parameters, **option)
    yield "SparseAdam", _sparse


OPTIMIZERS: dict[str, Make] = dict(_optimizers())


def look_id(look: Look) -> str:
    return f"{look.mode}{'-autocast' if look.autocast else ''}"


@pytest.mark.parametrize("look", LOOKS, ids=look_id)
@pytest.mark.parametrize("way", WAYS)
def test_a_write_is_seen(way: str, look: Look) -> None:
    """Packed or not, what was written counts at the next prediction, and again after a second write."""
    twins = Twins("basic")
    twins.check(look)
    for seed in range(2):
        twins.do(WAYS[way], seed)
        twins.check(look)


@pytest.mark.parametrize("way", ["data_copy", "numpy_views", "norms_recalibrated", "ema", "load_swapping"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_write_is_seen_by_every_backend(way: str, kind: str, dtype: torch.dtype) -> None:
    look = Look("no_grad", size=16)
    for backend in ("auto", "cpu", "onednn", "reference"):
        twins = Twins(kind, dtype, backend)
        twins.check(look)
        twins.do(WAYS[way], 3)
        twins.check(look)


@pytest.mark.parametrize("look", [Look(), Look("grad"), Look("inference", True)], ids=look_id)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, look: Look) -> None:
    for seed in range(3):
        twins = Twins("bottleneck" if seed else "basic")
        twins.check(look)
        twins.do(CHANGES[change], seed)
        twins.check(look)


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("name", PATCHES)
def test_replaced_code_is_seen(name: str, late: bool) -> None:
    for kind in ("basic", "bottleneck"):
        with pytest.MonkeyPatch.context() as patch:
            if not late:
                PATCHES[name](patch)
            twins = Twins(kind)
            twins.check(Look())
            if late:
                PATCHES[name](patch)
            for look in LOOKS[:3]:
                twins.check(look)
        twins.check(Look())  # as written again


@pytest.mark.parametrize("norms", ["frozen", "trained"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_step_is_seen(name: str, norms: str) -> None:
    look = Look()
    twins = Twins("basic")
    twins.check(look)
    for _ in range(2):
        if norms == "trained":
            twins.do(CHANGES["trains"])
        twins.train(look, OPTIMIZERS[name])
        if norms == "trained":
            twins.do(CHANGES["evaluates"])
        twins.check(look)


@pytest.mark.parametrize("look", LOOKS, ids=look_id)
def test_modes_follow_one_another(look: Look) -> None:
    """What one mode packed must serve another, or stand aside: gradients after inference mode, say."""
    for before in LOOKS:
        twins = Twins("bottleneck")
        twins.check(before)
        twins.check(look)
        twins.do(WAYS["data_copy"])
        twins.check(look, calls=1)
        twins.check(before)


def outputs(side: Side, x: Tensor, look: Look) -> Tensor:
    with look.context():
        return side.model(x)


class SameNumbers(RuleBasedStateMachine):
    """Predictions between whatever can write to a model, or replace a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        torch.manual_seed(0)

    @initialize(
        kind=st.sampled_from(list(KINDS)),
        dtype=st.sampled_from([torch.float32] * 3 + DTYPES),
        backend=st.sampled_from(["auto"] * 6 + ["cpu", "onednn"]),
        rare=st.sampled_from([False] * 15 + [True]),
    )
    def start(self, kind: str, dtype: torch.dtype, backend: str, rare: bool) -> None:
        self.twins, self.look, self.rare = Twins(kind, dtype, backend), Look(), rare
        self.twins.check(self.look)

    @rule(
        mode=st.sampled_from(list(MODES)), autocast=st.booleans(), batch=st.sampled_from([1, 2, 3, 5]),
        size=st.sampled_from([8, 11, 16]), channels_last=st.booleans(),
    )  # fmt: skip
    def predict_otherwise(self, mode: str, autocast: bool, batch: int, size: int, channels_last: bool) -> None:
        self.look = Look(mode, autocast, batch, size, channels_last)
        self.twins.check(self.look)

    @rule(way=st.sampled_from(list(WAYS)), seed=st.integers(0, 999))
    def write(self, way: str, seed: int) -> None:
        self.twins.do(WAYS[way], seed)
        self.twins.check(self.look)

    @rule(way=st.sampled_from(list(WAYS)), other=st.sampled_from(list(WAYS)), seed=st.integers(0, 999))
    def write_twice(self, way: str, other: str, seed: int) -> None:
        """No prediction between the two."""
        self.twins.do(WAYS[way], seed)
        self.twins.do(WAYS[other], seed + 1)
        self.twins.check(self.look)

    @rule(change=st.sampled_from(list(CHANGES)), seed=st.integers(0, 999))
    def change(self, change: str, seed: int) -> None:
        self.twins.do(CHANGES[change], seed)
        self.twins.check(self.look)

    @rule(name=st.sampled_from(list(OPTIMIZERS)), norms=st.sampled_from(["as they are", "frozen", "trained"]))
    def train(self, name: str, norms: str) -> None:
        if norms != "as they are":
            self.twins.do(CHANGES["norms_frozen" if norms == "frozen" else "trains"])
        self.twins.train(self.look, OPTIMIZERS[name])
        self.twins.check(self.look)
        if norms != "as they are":
            self.twins.do(CHANGES["evaluates"])
            self.twins.check(self.look)

    @rule(name=st.sampled_from(list(PATCHES)))
    def replace_code(self, name: str) -> None:
        self.patches.undo()
        PATCHES[name](self.patches)
        self.twins.check(self.look)

    @rule()
    def take_everything_back(self) -> None:
        self.patches.undo()
        self.twins.do(CHANGES["hooks_removed"])
        self.twins.do(CHANGES["evaluates"])
        self.twins.check(self.look)

    @rule(seed=st.integers(0, 99))
    def call_with_other_tensors(self, seed: int) -> None:
        """functional_call, and derivatives through it."""

        def call(side: Side) -> None:
            side.random.manual_seed(seed)
            named = {n: moved(p) for n, p in side.model.named_parameters()}
            x = self.look.images(self.twins.dtype)
            with torch.no_grad():
                found = torch.func.functional_call(side.model, named, (x,))
            side.kept[:] = [found, torch.func.functional_call(in_float64(side.model), _double(named), (x.double(),))]

        self.compare(call)
        self.twins.check(self.look)

    @rule(seed=st.integers(0, 99))
    def derive(self, seed: int) -> None:
        """Forward-mode and per-sample derivatives."""

        def derivatives(model: nn.Module, x: Tensor) -> Tensor:
            tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
            along = torch.func.jvp(model, (x,), (tangent,))[1]
            each = torch.func.vmap(lambda image: model(image[None])[0])(x)
            slope = torch.func.grad(lambda images: model(images).square().sum())(x)
            return torch.cat([along.flatten(), each.flatten(), slope.flatten()])

        def call(side: Side) -> None:
            x = self.look.images(self.twins.dtype)
            side.kept[:] = [derivatives(side.model, x), derivatives(in_float64(side.model), x.double())]

        self.compare(call)
        self.twins.check(self.look)

    @precondition(lambda self: self.rare)
    @rule(backend=st.sampled_from(["eager", "aot_eager"]))
    def compile(self, backend: str) -> None:
        """The compiled model, before and after a write."""

        def call(side: Side) -> None:
            torch._dynamo.reset()
            compiled = torch.compile(side.model, backend=backend)
            x = self.look.images(torch.float32 if self.look.autocast else self.twins.dtype)
            outputs(Side(compiled), x, self.look)
            for t in tensors(side.model):
                t.data.copy_(moved(t))
            found = outputs(Side(compiled), x, self.look).detach()
            side.kept[:] = [found, run(in_float64(side.model), x.double(), Look("no_grad"))["y"]]

        self.compare(call)
        self.twins.check(self.look)

    @precondition(lambda self: self.rare)
    @rule()
    def fork(self) -> None:
        """A child predicts what its parent would."""
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                self.twins.check(self.look)
                self.twins.do(WAYS["data_copy"])
                self.twins.check(self.look)
                status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0, "the child's prediction is another"

    def compare(self, call: Callable[[Side], None]) -> None:
        """What both leave in ``kept``: their result, and the one in float64."""
        if any(m.training for m in self.twins.eager.model.modules()):
            return  # what is called several times moves the statistics
        for side in (self.twins.eager, self.twins.fused):
            side.kept.clear()
        self.twins.do(call)
        if self.twins.eager.kept and self.twins.fused.kept:
            (eager, exact), (ours, _) = self.twins.eager.kept, self.twins.fused.kept
            error, eagers = (t.double().sub(exact.double()).norm() for t in (ours, eager))
            share = 0.4 if self.look.autocast or self.twins.dtype.itemsize == 2 else 0.1  # as twins.check_gradients
            assert error <= 2 * eagers + share * exact.double().norm(), f"off by {error:.3g}, eager by {eagers:.3g}"

    def teardown(self) -> None:
        self.patches.undo()


def _double(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() for n, t in named.items()}


SameNumbers.TestCase.settings = hypothesis.settings(
    max_examples=SEQUENCES, stateful_step_count=STEPS, deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
)  # fmt: skip
TestSequences = pytest.mark.timeout(SEQUENCES * STEPS)(SameNumbers.TestCase)
