"""A network as one plan of launches, as on a GPU: Triton's interpreter computes, so what it computes is compared."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from small_networks import KINDS, blocks_of, convs_of, images, network, norms_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.modules import network_plan
from resnet_fused.ops import arena, device_plan
from resnet_fused.ops.arena import ALIGNMENT, Interval
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.device_plan import DevicePlan
from resnet_fused.ops.tensor_cache import CACHE
from resnet_fused.testing.budget import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not backends.interpreting(), reason="the tests of GPUs run the plans there")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No gradients, and nothing kept from test to test."""
    arena.clear()
    with torch.no_grad():
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[DevicePlan]:
    """The plans of whole networks that computed something, in their order."""
    seen: list[DevicePlan] = []
    run = DevicePlan.__call__

    def noting(self: DevicePlan, x: Tensor) -> Tensor:
        if self._head is not None:
            seen.append(self)
        return run(self, x)

    monkeypatch.setattr(DevicePlan, "__call__", noting)
    return seen


def fused(kind: str = "basic", seed: int = 0, **options: Any) -> nn.Module:
    return rf.fuse(network(kind, seed), backend="triton", **options)


def block_by_block(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes without a plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_plan, "run", lambda *_: None)
        return model(x)


# What it computes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_blocks_own_and_within_the_budget(kind, dtype, runs):
    eager = network(kind).to(dtype)
    model, x = rf.fuse(eager, backend="triton"), images(2, 13, dtype=dtype)
    out = model(x)
    assert len(runs) == 1
    expected = block_by_block(model, x)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    exact = copy.deepcopy(eager).double()(x.double())
    others = [eager(x.contiguous(memory_format=torch.channels_last))]
    assert_within_budget(out, eager(x), exact, *others, tf32=dtype == torch.float32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_an_input_is_read_where_it_lies_or_copied_into_the_arena(layout, runs):
    model = fused()
    for seed in range(3):
        x = images(3, 11, seed=seed).contiguous(memory_format=layout)
        kept = x.clone()
        assert torch.equal(model(x), block_by_block(model, x)) and torch.equal(x, kept)
    assert len(set(runs)) == 1
    assert (0 in runs[0]._outside) == (layout is torch.channels_last)


def test_no_result_lies_in_the_arena(runs):
    model = fused("bottleneck")
    first, second = images(2, 8, seed=1), images(2, 8, seed=2)
    out = model(first)
    kept = out.clone()
    (memory,) = [place._arena.memory for place in arena._local.places.values()]
    memory.fill_(0xFF)  # NaN, whichever the type
    assert torch.equal(model(second), block_by_block(model, second))
    assert torch.equal(out, kept) and torch.equal(model(first), kept)


def test_what_allocates_its_own_result_stands_between_launches(runs, monkeypatch):
    """As cuDNN does for 3x3 convolutions: the launches behind it read at another address each time."""
    model = fused("bottleneck")
    serve = conv_bn_act.server

    def server(call, backend):
        if call.conv.weight.shape[2] == 3 and call.x.shape[1] > 3:
            return backends.implementation("conv_bn_act", "reference")
        return serve(call, backend)

    monkeypatch.setattr(conv_bn_act, "server", server)
    held = []
    for seed in range(4):
        x = images(2, 9, seed=seed)
        held.append(torch.empty(1 << 10 * (seed % 2)))  # so that addresses change
        assert torch.equal(model(x), block_by_block(model, x))
    (plan,) = set(runs)
    own = [step.node.out for step in plan._steps if step.own]
    assert len(own) == 2 and set(own) <= plan._outside and any(plan._ends) and len(runs) == 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [1, 9])
def test_a_block_alone_has_a_plan_and_gives_a_new_feature_map(size, layout, monkeypatch):
    planned: list[Any] = []
    make = device_plan.make
    monkeypatch.setattr(device_plan, "make", lambda *args, **options: planned.append(0) or make(*args, **options))
    for block in (fused("basic").layer2[0], fused("bottleneck").layer2[0]):
        channels = next(block.children()).in_channels
        xs = [torch.randn(2, channels, size, size).contiguous(memory_format=layout) for _ in range(2)]
        first, second = [block(x) for x in xs]
        for out, x in zip((first, second), xs, strict=True):
            expected = block_by_block(block, x)
            assert torch.equal(out, expected) and out.stride() == expected.stride()
        assert first.data_ptr() != second.data_ptr()
    assert len(planned) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_max_pools_keep_what_is_not_finite(value):
    from resnet_fused.ops.max_pool import triton
    from resnet_fused.ops.max_pool.types import PoolCall

    for shape, geometry in (
        ((2, 5, 7, 9), ((3, 3), (2, 2), (1, 1), (1, 1))),
        ((1, 64, 8, 8), ((2, 3), (1, 2), (0, 1), (2, 1))),
    ):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        x.permute(0, 2, 3, 1).reshape(-1)[::37] = value
        call = PoolCall(x, *geometry)
        expected = F.max_pool2d(*call)
        out = torch.full_like(expected, 7).contiguous(memory_format=torch.channels_last)
        for launch in triton.launches(call, out):
            launch()
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# When it computes.


class Listening(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _hook(*args):
    return None


def _on_part(pick: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda model: pick(model).register_forward_hook(_hook)


OBSERVED: dict[str, Callable[[nn.Module], Any]] = {
    "gradients": lambda model: torch.enable_grad(),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda model: Listening(),
    "a function mode": lambda model: Watching(),
    "the profiler": lambda model: torch.profiler.profile(),
    "a hook on a convolution": _on_part(lambda model: convs_of(model)[2]),
    "a hook on a norm": _on_part(lambda model: norms_of(model)[1]),
    "a hook on a block": _on_part(lambda model: blocks_of(model)[0]),
    "a hook on a stage": _on_part(lambda model: model.layer1),
    "a hook on the pool": _on_part(lambda model: model.maxpool),
    "a hook on the last pool": _on_part(lambda model: model.avgpool),
    "a hook on all modules": lambda model: nn.modules.module.register_module_forward_hook(_hook),
}


@pytest.mark.parametrize("who", OBSERVED)
def test_who_looks_on_sees_the_blocks(who, runs):
    model, x = fused(), images()
    model(x)
    assert len(runs) == 1
    context = OBSERVED[who](model)
    try:
        with context if hasattr(context, "__enter__") and not hasattr(context, "remove") else torch.no_grad():
            model(x)
    finally:
        if hasattr(context, "remove"):
            context.remove()
    assert len(runs) == 1
    model(x)
    assert len(runs) == 2


def test_training_mode_and_other_pools_are_not_for_a_plan(runs):
    model, x = fused(), images()
    norms_of(model)[2].train()
    model(x)
    model.eval()
    for change in (
        lambda: setattr(model, "avgpool", nn.AdaptiveAvgPool2d(2)),
        lambda: setattr(model, "maxpool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        lambda: setattr(model, "maxpool", nn.AvgPool2d(2)),
    ):
        kept = model.avgpool, model.maxpool
        change()
        fc, model.fc = model.fc, nn.Identity()
        assert torch.equal(model(x), block_by_block(model, x))
        model.avgpool, model.maxpool, model.fc = *kept, fc
    assert not runs


@pytest.mark.waits
def test_weights_new_at_each_call_make_no_plan(runs):
    model, x = rf.fuse(network(), backend="auto"), images()
    serves = device_plan.serves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_plan, "serves", lambda x, backend: serves(x, "triton"))
        for _ in range(3):
            model(x)
            for p in model.parameters():
                p.mul_(1.01)
        assert not runs
        for _ in range(10):  # it is not tried again at once
            model(x)
        assert len(set(runs)) == 1


# What changes.


def _by_data(model: nn.Module) -> None:
    convs_of(model)[1].weight.data = convs_of(model)[1].weight.data * 2


def _by_optimizer(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a weight in place": lambda model: convs_of(model)[1].weight.mul_(2),
    "a weight's data": _by_data,
    "a weight by numpy": lambda model: convs_of(model)[1].weight.detach().numpy().__imul__(2),
    "a parameter": lambda model: setattr(norms_of(model)[1], "weight", nn.Parameter(norms_of(model)[1].weight * 2)),
    "statistics": lambda model: norms_of(model)[2].running_var.mul_(3),
    "eps": lambda model: setattr(norms_of(model)[2], "eps", 0.5),
    "padding": lambda model: setattr(convs_of(model)[0], "padding", (2, 2)),
    "a module": lambda model: setattr(blocks_of(model)[0], "bn1", copy.deepcopy(norms_of(network(seed=3))[1])),
    "a block": lambda model: model.layer1.__setitem__(0, copy.deepcopy(rf.fuse(network(seed=3)).layer1[0])),
    "the state": lambda model: model.load_state_dict(network(seed=4).state_dict()),
    "the state, assigned": lambda model: model.load_state_dict(network(seed=4).state_dict(), assign=True),
    "an optimizer": _by_optimizer,
    "refreshed": rf.refresh,
    "cleared": lambda model: rf.clear_workspace(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_no_answer_is_stale(what, runs):
    model, x = fused(), images()
    model(x), model(x)
    CHANGES[what](model)
    out = model(x)
    eager = rf.unfuse(model)
    expected, exact = eager(x), copy.deepcopy(eager).double()(x.double())
    assert_within_budget(out, expected, exact, eager(x.contiguous(memory_format=torch.channels_last)), tf32=True)
    if what != "a block":  # that one is of another backend
        model(x)
        assert runs[-1] is not runs[0] or what == "cleared" or len(runs) > 2


def test_switches_of_pytorch_have_plans_of_their_own(runs, monkeypatch):
    model, x = fused(), images()
    model(x)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model(x)
    assert runs[0] is not runs[1]


# How much it keeps.


def test_plans_are_bounded_and_the_least_recently_used_goes(runs):
    model = fused("narrow")
    sizes = [8 + i for i in range(network_plan.MOST_PLANS)]
    for size in sizes:
        model(images(1, size))
    model(images(1, sizes[0]))
    assert runs[-1] is runs[0]
    model(images(1, 30))
    model(images(1, sizes[0]))
    assert runs[-1] is runs[0], "it was used later than the others"
    plans = model._rf_state.prepared.network.guard.kept
    assert len(plans) == network_plan.MOST_PLANS and runs[1] not in plans.values()


def test_nothing_outlives_the_model_or_its_copies(runs):
    model, x = fused(), images()
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._rf_state.prepared.network is None
        assert torch.equal(twin(x), model(x))
    plan, weight = weakref.ref(runs[0]), weakref.ref(convs_of(model)[0])
    runs.clear()
    del model, twin
    gc.collect()
    assert plan() is None and weight() is None


def test_unfused_models_have_no_plan(runs):
    model, x = fused(), images()
    model(x)
    rf.unfuse(model, inplace=True)
    runs.clear()
    model(x)
    assert not runs


def test_replaced_weights_are_let_go(runs):
    model, x = fused(), images()
    model(x)
    weight = weakref.ref(convs_of(model)[1].weight)
    convs_of(model)[1].weight = nn.Parameter(torch.zeros_like(weight()))
    model(x)
    runs.clear()
    gc.collect()
    assert weight() is None


def test_threads_have_arenas_of_their_own(runs):
    model = fused()
    xs = [images(2, 10, seed=seed) for seed in range(3)]
    expected = [block_by_block(model, x) for x in xs]
    model(xs[0])
    failed: list[int] = []
    places: list[Any] = []  # kept, so that no two have one address after the other

    alone = threading.Lock()  # the interpreter is for one thread at a time

    def work(at: int) -> None:
        for _ in range(3):
            with alone, torch.no_grad():
                if not torch.equal(model(xs[at]), expected[at]):
                    failed.append(at)
        places.append(arena._local.places)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(set(map(id, places))) == 3


def test_clear_workspace_drops_the_arenas_of_all_threads():
    model, x = fused(), images()
    ready, go = threading.Event(), threading.Event()
    found: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            model(x)
        found.append(weakref.ref(next(iter(arena._local.places.values()))._arena))
        ready.set()
        go.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(60)
    assert found[0]() is not None
    rf.clear_workspace()
    gc.collect()
    assert found[0]() is None
    go.set()
    thread.join()


def test_the_arena_is_smaller_than_what_it_holds_one_by_one(runs):
    fused("bottleneck")(images(2, 16))
    (plan,) = runs
    sizes = [interval.size for interval in plan._intervals.values()]
    assert plan.bytes < sum(sizes) / 2
    assert plan.bytes >= max(sizes)


intervals = st.lists(
    st.builds(lambda size, first, length: Interval(size, first, first + length),
              st.integers(0, 5000), st.integers(0, 12), st.integers(0, 6)),
    max_size=14,
)  # fmt: skip


@given(intervals)
@hypothesis.settings(max_examples=200)
def test_what_is_needed_at_once_does_not_overlap(found: list[Interval]) -> None:
    offsets, total = arena.lay_out(found)
    for i, a in enumerate(found):
        assert offsets[i] % ALIGNMENT == 0 and offsets[i] + a.size <= total
        for j, b in enumerate(found[:i]):
            if a.first <= b.last and b.first <= a.last and a.size and b.size:
                assert offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
    assert total <= sum(-(-i.size // ALIGNMENT) * ALIGNMENT for i in found)


def test_a_cache_that_keeps_nothing_makes_no_plan(runs, monkeypatch):
    """As for inference tensors on a GPU, of which nothing tells that they were written."""
    monkeypatch.setattr(CACHE, "ticket", lambda *_: None)
    model, x = fused(), images()
    assert torch.equal(model(x), block_by_block(model, x)) and not runs


def test_empty_batches_and_small_images_are_for_the_modules(runs):
    model = fused()
    assert model(images(0, 8)).shape[0] == 0
    with pytest.raises((RuntimeError, ValueError)):
        rf.fuse(network("wide"), backend="triton")(torch.randn(1, 4, 8, 8))
    assert not runs
