"""One plan for a network on the CPU: that it is used, what it costs in Python, and that it never gives a stale answer.

HYPOTHESIS_PROFILE=nightly takes 2,000 sequences of changes in place of 100.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import extension
from resnet_fused.modules import guard as guard_module
from resnet_fused.modules import network_plan
from resnet_fused.modules.guard import Guard
from resnet_fused.ops import cpu_convolution, cpu_plan, workspace
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.eager import eager_copy
from resnet_fused.testing.networks import randomise_norms

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import frames

SEQUENCES = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 60

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        extension.missing() is not None or cpu_convolution.unavailable() is not None, reason="needs the CPU's kernels"
    ),
]


def network(blocks: tuple[int, ...] = (1, 1), block: Any = rf.FusedBottleneck, seed: int = 0) -> rf.ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = rf.ResNet(block, blocks, num_classes=8, planes=(32, 32, 32, 32))
        return randomise_norms(model, seed).eval()


def images(n: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def planned(model: Any) -> bool:
    return model._rf_state.prepared.network is not None


def used(model: nn.Module, x: Tensor) -> bool:
    """Whether a plan computes the model, asked at its third call."""
    with torch.no_grad():
        model(x), model(x)
        return network_plan.run(model, x, ("maxpool", *model.stages, "avgpool")) is not None  # type: ignore[arg-type]


def right(model: nn.Module, x: Tensor) -> None:
    eager = eager_copy(model)
    with torch.no_grad():
        assert_within_budget(model(x), eager(x), copy.deepcopy(eager).double()(x.double()))


@pytest.mark.parametrize("block", [rf.FusedBasicBlock, rf.FusedBottleneck])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("size", [16, 33, 64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_numbers(block: Any, n: int, size: int, layout: torch.memory_format) -> None:
    model, x = network((2, 1), block), images(n, size).contiguous(memory_format=layout)
    assert used(model, x)
    right(model, x)


def test_sub_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two images each, the last of one."""
    whole, parts, x = network((2, 2)), network((2, 2)), images(5, 32)
    assert used(whole, x)
    monkeypatch.setattr(cpu_plan, "BYTES", 5 * 32 * 16 * 16 * 4)
    assert used(parts, x)
    with torch.no_grad():
        torch.testing.assert_close(parts(x), whole(x), rtol=1e-5, atol=1e-5)
    right(parts, x)
    monkeypatch.setattr(workspace, "LARGEST_BUFFER", 1)
    one_by_one = network((2, 2))
    assert used(one_by_one, x)
    right(one_by_one, x)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e30])
def test_special_values_stay_with_their_image(special: float) -> None:
    """Winograd's method refuses such input: the plan then has the direct sum at hand."""
    model, x = network((2, 2), rf.FusedBasicBlock), images(3, 32)
    assert used(model, x)
    with torch.no_grad():
        before = model(x)
        x[1, 0, 3, 3] = special
        out = model(x)
        want = eager_copy(model)(x)
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(out[[0, 2]], before[[0, 2]], rtol=1e-4, atol=1e-5)
    assert used(model, x)


def test_a_block_alone() -> None:
    block = randomise_norms(nn.Sequential(rf.FusedBottleneck(32, 32, 1, projection(32, 128)))).eval()[0]
    x = torch.randn(2, 32, 9, 9)
    eager = eager_copy(block)
    with torch.no_grad():
        block(x), block(x)
        assert planned(block)
        assert_within_budget(block(x), eager(x), copy.deepcopy(eager).double()(x.double()))
        assert block(x).stride() == eager(x.contiguous(memory_format=torch.channels_last)).stride()


def projection(inplanes: int, planes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))


def test_frames_of_resnet50() -> None:
    found = frames.frames(rf.resnet50().eval(), images(1, 64))
    assert found.total() <= 120, found.most_common()


def test_plans_are_bounded() -> None:
    model = network()
    with torch.no_grad():
        for size in range(16, 16 + 2 * network_plan.MOST_PLANS):
            for _ in range(2):
                model(images(1, size))
        assert len(model._rf_state.prepared.network.guard.kept) == network_plan.MOST_PLANS


def test_a_plan_goes_with_its_model() -> None:
    model, x = network(), images()
    assert used(model, x)
    seen = [weakref.ref(model), weakref.ref(model._rf_state.prepared.network), *map(weakref.ref, model.layer1)]
    del model
    assert [ref() for ref in seen] == [None] * len(seen)  # at once: there is no circle


def test_copies_plan_for_themselves() -> None:
    model, x = network(), images()
    assert used(model, x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        if copied._rf_state is not model._rf_state:
            assert not planned(copied)
        with torch.no_grad():
            copied.layer1[0].bn1.weight.mul_(2)
        right(copied, x), right(model, x)
        assert used(copied, x)


def test_threads() -> None:
    model, wrong = network(), []
    inputs = [images(n, size, seed=n) for n in (1, 2) for size in (16, 24)]
    with torch.no_grad():
        want = [eager_copy(model)(x) for x in inputs]

    def call(i: int) -> None:
        with torch.no_grad():
            for at in range(40):
                x, y = inputs[(i + at) % 4], want[(i + at) % 4]
                if not torch.allclose(model(x), y, rtol=1e-3, atol=1e-4):
                    wrong.append((i, at))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_others_may_be_served_meanwhile() -> None:
    """The optimizer of one model leaves the plan of another."""
    student, teacher, x = network(seed=1), network(), images()
    assert used(teacher, x)
    before = teacher._rf_state.prepared.network
    student.train()(x).sum().backward()
    torch.optim.SGD(student.parameters(), 0.1).step()
    with torch.no_grad():
        teacher(x)
    assert teacher._rf_state.prepared.network is before


@pytest.mark.parametrize("who", ["grad", "autocast", "hook", "global_hook", "profiler", "mode"])
def test_observed_calls_go_the_other_way(who: str) -> None:
    model, x = network(), images()
    assert used(model, x)
    seen: list[Any] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(who == "grad"))
        if who == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if who == "hook":
            model.layer2[0].conv2.register_forward_hook(lambda *_: seen.append(1))
        if who == "global_hook":
            handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
            stack.callback(handle.remove)
        if who == "profiler":
            stack.enter_context(torch.profiler.profile())
        if who == "mode":
            stack.enter_context(Sees(seen))
        model(x)
        assert network_plan.run(model, x, ("maxpool", *model.stages, "avgpool")) is None
    assert bool(seen) == (who in ("hook", "global_hook", "mode"))


class Sees(torch.overrides.TorchFunctionMode):
    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


# Every kind of change, by itself: the guard sees each one.

Change = Callable[[Any], object]


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


CHANGES: dict[str, Change] = {
    "forward of a conv": lambda m: _set(
        m.layer1[0].conv1, "forward", lambda x: 2 * nn.Conv2d.forward(m.layer1[0].conv1, x)
    ),
    "forward of a block": lambda m: _set(m.layer1[0], "forward", lambda x: torch.cat([x] * 4, 1)),
    "forward of a stage": lambda m: _set(m.layer2, "forward", lambda x: 2 * nn.Sequential.forward(m.layer2, x)),
    "forward of the pool": lambda m: _set(m.maxpool, "forward", lambda x: 2 * nn.MaxPool2d.forward(m.maxpool, x)),
    "forward after an entry left": lambda m: (
        delattr(m.layer1[0].conv1, "in_channels"),
        _set(m.layer1[0].conv1, "forward", lambda x: 2 * nn.Conv2d.forward(m.layer1[0].conv1, x)),
    ),
    "hook": lambda m: m.layer1[0].bn2.register_forward_hook(lambda _, __, y: 2 * y),
    "hook before": lambda m: m.layer2.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "other hooks": lambda m: _set(m.layer1[0].bn2, "_forward_hooks", {1: lambda _, __, y: 2 * y}),
    "stride": lambda m: _set(m.layer2[0].conv2, "stride", (1, 1)) or _set(m.layer2[0].downsample[0], "stride", (1, 1)),
    "padding": lambda m: _set(m.conv1, "padding", (2, 2)),
    "padding_mode": lambda m: (_set(m.conv1, "padding_mode", "reflect"),),
    "eps": lambda m: _set(m.layer1[0].bn2, "eps", 0.7),
    "norm trains": lambda m: _set(m.layer1[0].bn2, "training", True),
    "model trains": lambda m: m.train(),
    "norm": lambda m: _set(m.layer1[0], "bn1", randomise_norms(nn.Sequential(nn.BatchNorm2d(32)), 7)[0].eval()),
    "conv": lambda m: _set(m.layer1[0], "conv1", nn.Conv2d(32, 32, 1)),
    "relu": lambda m: _set(m.layer1[0], "relu", nn.Hardswish()),
    "class of a relu": lambda m: _set(m.layer1[0].relu, "__class__", nn.Hardswish),
    "pool": lambda m: _set(m.maxpool, "kernel_size", 2),
    "last pool": lambda m: _set(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "stage longer": lambda m: m.layer2.append(Twice()),
    "stage": lambda m: _set(m, "layer2", nn.Sequential(nn.Conv2d(128, 128, 1))),
    "shortcut gone": lambda m: _set(m.layer2[0], "downsample", nn.MaxPool2d(1, 2)),
    "weight": lambda m: m.layer1[0].conv2.weight.data.mul_(2),
    "new weight": lambda m: _set(m.layer1[0].conv2, "weight", nn.Parameter(torch.randn(32, 32, 3, 3))),
    "weight data": lambda m: _set(m.layer1[0].conv2.weight, "data", torch.randn(32, 32, 3, 3)),
    "weight turned": lambda m: _set(m.layer1[0].conv1.weight, "data", m.layer1[0].conv1.weight.data.transpose(0, 1)),
    "bias as one": lambda m: _set(m.bn1.bias, "data", m.bn1.bias.data[:1].expand(32)),
    "mean by numpy": lambda m: m.bn1.running_mean.numpy().__imul__(3),
    "no weight": lambda m: _set(m.bn1, "weight", None),
    "bias": lambda m: _set(m.conv1, "bias", nn.Parameter(torch.randn(32))),
    "double": lambda m: m.double(),
    "format": lambda m: m.to(memory_format=torch.channels_last),
    "state": lambda m: m.load_state_dict(network((1, 1), seed=9).state_dict()),
    "assigned": lambda m: m.load_state_dict(network((1, 1), seed=9).state_dict(), assign=True),
    "name hidden": lambda m: m.layer1[0].__dict__.__setitem__("conv2", nn.Conv2d(32, 32, 3, padding=1)),
    "stage hidden": lambda m: m.__dict__.__setitem__("layer2", nn.Conv2d(128, 128, 1)),
    "optimizer": lambda m: _step(m),
    "some elements": lambda m: m.layer1[0].conv2.weight.detach()[:, :, 1, 1].add_(9),
    "padding of a pool": lambda m: _set(m.maxpool, "padding", 2),
}


def _step(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


def as_eager(model: nn.Module, x: Tensor) -> None:
    """Compared with the same objects' own module calls: by a mode that looks on, nothing is bypassed."""
    x = x.to(next(model.parameters()).dtype)
    state = copy.deepcopy(dict(model.named_buffers()))  # of norms that train
    found: list[Any] = []
    for look in (contextlib.nullcontext, lambda: Sees([])):
        try:
            with torch.no_grad(), look():
                found.append(model(x))
        except (RuntimeError, ValueError, TypeError) as error:
            found.append(type(error))
        with torch.no_grad():
            for name, tensor in model.named_buffers():
                tensor.copy_(state[name])
    if isinstance(found[1], Tensor):
        assert isinstance(found[0], Tensor), found
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * max(1.0, float(found[1].abs().max())))
    else:
        assert not isinstance(found[0], Tensor), found  # both refuse it, ours perhaps in other words


@pytest.mark.parametrize("sweep", ["compiled", "python"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, sweep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if sweep == "python":
        monkeypatch.setattr(guard_module, "_unchanged", lambda: guard_module._sweep)
    model, x = network(), images(2, 32)
    assert used(model, x)
    with torch.no_grad():
        before = model(x)
    guard: Guard = model._rf_state.prepared.network.guard
    CHANGES[change](model)
    assert change == "mean by numpy" or not guard.holds(model) or planned(model) is False
    for _ in range(3):
        as_eager(model, x)
    if change not in ("format", "double", "name hidden", "stage hidden"):  # those change no number
        with contextlib.suppress(RuntimeError, ValueError), torch.no_grad():
            assert not torch.allclose(model(x.to(next(model.parameters()).dtype)).float(), before, rtol=1e-4)


@pytest.mark.parametrize("value", [torch.tensor(1e-5), [1e-5]], ids=["tensor", "list"])
def test_numbers_that_can_be_written_have_no_plan(value: Any) -> None:
    model = network()
    model.layer1[0].bn2.eps = value[0] if isinstance(value, list) else value
    assert used(model, images()) == isinstance(value, list)


PATCHES = [
    (F, "max_pool2d"), (F, "adaptive_avg_pool2d"), (torch, "flatten"),
    (nn.Conv2d, "forward"), (nn.BatchNorm2d, "forward"), (nn.ReLU, "forward"), (nn.MaxPool2d, "forward"),
    (nn.AdaptiveAvgPool2d, "forward"), (nn.Sequential, "forward"), (rf.FusedBottleneck, "forward"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "name"), PATCHES, ids=lambda v: getattr(v, "__name__", v))
def test_a_replaced_function_of_a_class_is_seen(cls: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = network(), images(), []
    assert used(model, x)
    plain = getattr(cls, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(cls, name, replaced)
    with torch.no_grad():
        model(x)
    assert calls
    monkeypatch.undo()
    calls.clear()
    assert used(model, x) and not calls


def test_a_broken_description_is_an_error() -> None:
    make = torch.ops.resnet_fused_cpu.plan_create
    for description in ([], [0, 3, 8, 8, 1, 0, 1], [0, 3, 8, 8, 1, 0, 1, 0, 2, 1], [2]):
        with pytest.raises(RuntimeError):
            make([], description)
    with pytest.raises(RuntimeError, match="plan_create"):
        torch.ops.resnet_fused_cpu.plan_run(torch.zeros(1, dtype=torch.int64), images())
    model, x = network(), images()
    assert used(model, x)
    with torch.no_grad():
        handle = model._rf_state.prepared.network.plan(x, on_device=False)._handle
    with pytest.raises(RuntimeError, match="plan_create"):
        torch.ops.resnet_fused_cpu.plan_run(handle.clone(), images())
    with pytest.raises(RuntimeError, match="need"):
        torch.ops.resnet_fused_cpu.plan_run(handle, images(2, 17))
    with pytest.raises(RuntimeError, match="need"):
        torch.ops.resnet_fused_cpu.plan_run(handle, images().double())


@pytest.mark.parametrize(
    ("owner", "name"),
    [(F, "max_pool2d"), (torch, "max_pool2d"), (F, "adaptive_avg_pool2d"), (torch, "flatten")],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_functions_that_were_replaced_are_called(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, function = network(), images(), getattr(owner, name)
    assert used(model, x)
    found: list[str] = []
    monkeypatch.setattr(owner, name, lambda *a, **k: found.append(name) or function(*a, **k))
    with torch.no_grad():
        model(x)
    assert found == [name]


def test_geometry_that_can_be_written_to_is_read_at_each_call() -> None:
    x = images()
    model = network()
    model.layer1[0].bn1.eps = torch.tensor(1e-5)
    right(model, x)
    right(model, x)
    right(model, x)
    model.layer1[0].bn1.eps.fill_(3.0)
    right(model, x)


def test_what_only_eager_computes_or_refuses() -> None:
    model, x = network(), images()
    assert used(model, x)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(model(x.to_mkldnn()).to_dense(), want, rtol=1e-4, atol=1e-4)
        model.maxpool.padding = 3
        with pytest.raises(RuntimeError, match="pad should be"):
            model(x)


# All of that at random, one after the other, on a network of a class that is not ours.


@pytest.mark.waits
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@hypothesis.settings(max_examples=SEQUENCES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.data())
def test_sequences_of_changes(data: st.DataObject) -> None:
    model = network((1, 1), data.draw(st.sampled_from([rf.FusedBasicBlock, rf.FusedBottleneck])))
    planned_once = False
    for _ in range(data.draw(st.integers(1, 6))):
        x = images(data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([8, 16, 21])))
        if data.draw(st.booleans()):
            x = x.contiguous(memory_format=torch.channels_last)
        for _ in range(data.draw(st.integers(1, 3))):
            as_eager(model, x)
        planned_once |= planned(model)
        name = data.draw(st.sampled_from(sorted(CHANGES)))
        with contextlib.suppress(AttributeError, RuntimeError, TypeError, KeyError, IndexError), torch.no_grad():
            CHANGES[name](model)  # what an earlier one has left no place for
    as_eager(model, images())
