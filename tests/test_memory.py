"""What stays in memory: nothing of a dropped model, and nothing that grows with sizes, weights or modes."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable

import pytest
import torch
from small_networks import images, network
from torch import Tensor, nn
from torch.func import functional_call

import resnet_fused as rf

pytestmark = [pytest.mark.waits, pytest.mark.usefixtures("one_thread")]

MODELS = 200
MEGABYTE = 1 << 20


def autocast(enabled: bool = True) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def predict(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def train(model: nn.Module, x: Tensor) -> None:
    model.train()
    model(x).square().sum().backward()
    model.eval()


def tune_finely(model: nn.Module, x: Tensor) -> None:
    """A step with frozen norms."""
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()


def predict_low(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad(), autocast():
        model(x)


def infer_low(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode(), autocast():
        model(x)


def train_low(model: nn.Module, x: Tensor) -> None:
    with autocast():
        y = model(x)
    y.float().square().sum().backward()


def derive(model: nn.Module, x: Tensor) -> None:
    torch.func.jvp(model, (x,), (x,))


def call_with_others(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        functional_call(model, {n: p * 0.9 for n, p in model.named_parameters()}, (x,))


MODES = [predict, infer, train, tune_finely, predict_low, infer_low, train_low, derive, call_with_others]


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> list[Tensor]:
    """All tensors that the collector knows. Asking a stranger's object for its class may run code: by type alone."""
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor)]


def growth(step: Callable[[int], object], times: int, before: int) -> int:
    """By how many bytes the process grows over ``times`` steps that follow ``before`` others."""
    for at in range(before):
        step(at)
    gc.collect()
    rf.clear_workspace()
    start = resident()
    for at in range(before, before + times):
        step(at)
    gc.collect()
    rf.clear_workspace()  # gives freed memory of the heap back; what is held stays
    return resident() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES, ids=lambda f: f.__name__)
def test_a_dropped_model_is_gone(mode: Callable[[nn.Module, Tensor], None], dtype: torch.dtype) -> None:
    """Its parameters, buffers and their storages, at once, with no collection but the collector's."""
    x = images(2, 8, dtype=dtype)
    model = rf.fuse(network("basic").to(dtype))
    for _ in range(3):
        mode(model, x)
    held = [*model.parameters(), *model.buffers()]
    refs = [weakref.ref(t) for t in held] + [weakref.ref(t.untyped_storage()) for t in held]
    del model, held
    gc.collect()
    assert [r() is not None for r in refs].count(True) == 0


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_models_made_run_and_dropped_leave_nothing(kind: str) -> None:
    """As a server does that swaps models: in each mode, float32 and bfloat16 in turn."""
    x = {dtype: images(2, 8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}

    def step(at: int) -> None:
        dtype = list(x)[at % 2]
        model = rf.fuse(network(kind).to(dtype))
        for _ in range(3):
            MODES[at // 2 % len(MODES)](model, x[dtype])

    for at in range(2 * len(MODES)):
        step(at)
    count = len(tensors())
    grown = growth(step, MODELS, 0)
    assert len(tensors()) <= count
    assert grown < 20 * MEGABYTE, f"{grown / MEGABYTE:.1f} MB over {MODELS} models"


def test_casts_keep_no_dead_model() -> None:
    """A bfloat16 weight's cast to bfloat16 is the weight itself: what is kept of it must not keep it."""
    x, refs = images(1, 8), []
    for _ in range(5):
        model = rf.fuse(network("bottleneck")).bfloat16()
        for mode in (predict_low, infer_low, predict_low):
            mode(model, x)
        refs += [weakref.ref(p.untyped_storage()) for p in model.parameters()]
        del model
    gc.collect()
    assert not [r for r in refs if r() is not None]


def test_cleared_memory_is_free() -> None:
    """After clear_workspace nothing is held but the model: packed weights and casts are gone."""
    model, x = rf.fuse(network("bottleneck")), images(2, 8)
    predict(model, x)
    rf.clear_workspace()
    count = len(tensors())
    for mode in (predict, infer, predict_low, infer_low):
        for _ in range(3):
            mode(model, x)
    rf.clear_workspace()
    assert len(tensors()) <= count


@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "gradients"])
def test_ever_new_sizes(recorded: bool) -> None:
    """Each size of an image is as good as forgotten, in a process that knows as many as it keeps.

    By the compiled kernels: oneDNN has a cache of its own, of a thousand shapes, whoever calls it.
    """
    model = rf.fuse(network("basic"))
    sizes = [(8 + at % 28, 8 + at // 28) for at in range(28 * 30)]

    def step(at: int) -> None:
        with torch.set_grad_enabled(recorded):
            model(torch.zeros(1, 3, *sizes[at]))

    grown = growth(step, 440, 400)
    assert grown < 4 * MEGABYTE, f"{grown / MEGABYTE:.1f} MB over 440 sizes"


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_ever_new_weights(low: bool) -> None:
    """A hypernetwork makes other weights for each call, and no one keeps them."""
    model, x = rf.fuse(network("bottleneck")), images(1, 8)
    named = {n: p.detach() for n, p in model.named_parameters()}

    def step(at: int) -> None:
        with torch.no_grad(), autocast(low):
            functional_call(model, {n: p * (1 + at % 7) for n, p in named.items()}, (x,))

    step(0)
    count = len(tensors())
    grown = growth(step, 400, 100)
    assert len(tensors()) <= count
    assert grown < 5 * MEGABYTE, f"{grown / MEGABYTE:.1f} MB over 400 sets of weights"


def test_ever_new_weights_that_live_on() -> None:
    """Weights that somebody keeps, in many tensors: what is packed from them is bounded and goes with them."""
    model, x = rf.fuse(network("basic")), images(1, 8)
    kept = []
    for at in range(50):
        named = {n: p.detach() * (1 + at / 50) for n, p in model.named_parameters()}
        kept.append(named)
        for _ in range(3):
            with torch.no_grad():
                functional_call(model, named, (x,))
    count = len(tensors())
    held = sum(len(named) for named in kept)
    kept.clear()
    del named
    assert len(tensors()) <= count - held


def test_weights_moved_before_each_call() -> None:
    """Old packs go when new ones are made."""
    model, x = rf.fuse(network("bottleneck")), images(1, 8)

    def step(at: int) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1.0)
            for _ in range(3):
                model(x)

    step(0)
    count = len(tensors())
    grown = growth(step, 200, 20)
    rf.clear_workspace()
    assert len(tensors()) <= count
    assert grown < 5 * MEGABYTE, f"{grown / MEGABYTE:.1f} MB over 200 writes"


def test_new_storages_before_each_call() -> None:
    """``.data =`` leaves the parameter and drops its storage, and with it what was packed."""
    model, x = rf.fuse(network("bottleneck")), images(1, 8)

    def step(at: int) -> None:
        for p in model.parameters():
            p.data = p.data * -1.0
        for _ in range(3):
            predict(model, x)

    step(0)
    count = len(tensors())
    grown = growth(step, 200, 20)
    assert len(tensors()) <= count
    assert grown < 5 * MEGABYTE, f"{grown / MEGABYTE:.1f} MB over 200 assignments"
