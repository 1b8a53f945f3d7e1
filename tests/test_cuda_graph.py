"""fuse(cuda_graph=True), with the CPU standing in for a GPU: a graph is what ran while it was captured, run again."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_networks import blocks_of, convs_of, images, network, norms_of
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.modules import network_plan
from resnet_fused.ops import arena, device_plan
from resnet_fused.ops.device_plan import DevicePlan

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not backends.interpreting(), reason="needs Triton's interpreter")

GPU = torch.device("cuda", 0)


class Graph:
    """torch.cuda.CUDAGraph and torch.cuda.graph: the launches in between, and the tensor that they end in."""

    captured: list[Graph] = []  # noqa: RUF012
    capturing: Graph | None = None

    def __init__(self) -> None:
        self.replays, self.again = 0, None

    def replay(self) -> None:
        plan, bound, result = self.again
        with torch.inference_mode(False):
            result.copy_(LAUNCH(plan(), bound, bound.values.copy()))
        self.replays += 1


LAUNCH = DevicePlan._launch


@contextlib.contextmanager
def capture(graph: Graph, *, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local" and not torch.is_inference_mode_enabled()
    Graph.capturing = graph
    Graph.captured.append(graph)
    try:
        yield
    finally:
        Graph.capturing = None


def launch(plan: DevicePlan, bound: Any, values: list[Any]) -> Tensor:
    result = LAUNCH(plan, bound, values)
    if Graph.capturing is not None:
        Graph.capturing.again = (weakref.ref(plan), bound, result)
    return result


class OnGPU(DevicePlan):
    """A plan that is for a GPU, of tensors on the CPU."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.device = GPU


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One GPU, on whose current stream a test may write: [handle, whether it is being captured]."""
    current = [0, False]
    empty = torch.empty
    told = {
        "CUDAGraph": Graph, "graph": capture, "is_available": lambda: True, "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: current[1],
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current[0], raising=False)

    def here(*args: Any, device: Any = None, **options: Any) -> Tensor:
        return empty(*args, device=None if device == GPU else device, **options)

    monkeypatch.setattr(torch, "empty", here)
    monkeypatch.setattr(device_plan, "DevicePlan", OnGPU)
    monkeypatch.setattr(DevicePlan, "_launch", launch)
    Graph.captured = []
    arena.clear()
    with torch.no_grad():
        yield current


def graphed(kind: str = "basic", **options: Any) -> nn.Module:
    return rf.fuse(network(kind), backend="triton", cuda_graph=True, **options)


def block_by_block(model: nn.Module, x: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_plan, "run", lambda *_: None)
        return model(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_each_shape_is_captured_once_and_replayed(layout):
    model = graphed()
    model.fc = nn.Identity()  # which hands on what the graph gives
    outs = []
    for seed in range(3):
        for size in (8, 11):
            x = images(2, size, seed=seed).contiguous(memory_format=layout)
            outs.append((model(x), block_by_block(model, x)))
    assert len(Graph.captured) == 2 and [graph.replays for graph in Graph.captured] == [3, 3]
    for out, expected in outs:  # all at the end: none lies in a graph
        assert torch.equal(out, expected)


def test_results_are_of_the_callers_mode():
    model = graphed()
    with torch.inference_mode():
        assert model(images()).is_inference()
    assert not model(images()).is_inference() and len(Graph.captured) == 1


@pytest.mark.parametrize("change", [
    lambda model: convs_of(model)[1].weight.mul_(2),
    lambda model: setattr(norms_of(model)[1], "weight", nn.Parameter(norms_of(model)[1].weight * 2)),
    lambda model: setattr(norms_of(model)[2], "eps", 0.5),
    lambda model: model.load_state_dict(network(seed=4).state_dict()),
    lambda model: rf.refresh(model),
], ids=["in place", "replaced", "eps", "loaded", "refreshed"])  # fmt: skip
def test_what_changed_is_captured_anew(change):
    model, x = graphed(), images()
    model(x), change(model)
    out = model(x)
    assert len(Graph.captured) == 2 and torch.equal(out, block_by_block(model, x))


def test_a_hook_is_called_and_the_network_is_captured_again_without_it():
    model, x, seen = graphed(), images(), []
    model(x)
    handle = blocks_of(model)[0].register_forward_hook(lambda *_: seen.append(0))
    model(x)
    handle.remove()
    model(x)
    assert seen == [0] and len(Graph.captured) == 2 and [graph.replays for graph in Graph.captured] == [1, 1]


def test_graphs_are_bounded_and_the_least_recently_used_goes():
    model = graphed("narrow")
    sizes = [8 + i for i in range(device_plan._MOST_GRAPHS)]
    for size in (*sizes, sizes[0], 30):
        model(images(1, size))
    assert len(Graph.captured) == len(sizes) + 1
    (place,) = arena._local.places.values()
    assert len(place.graphs) <= device_plan._MOST_GRAPHS
    model(images(1, sizes[0]))
    assert len(Graph.captured) == len(sizes) + 1 and Graph.captured[0].replays == 3
    model(images(1, sizes[1]))
    assert len(Graph.captured) == len(sizes) + 2


def test_streams_have_graphs_of_their_own(stream):
    model, x = graphed(), images()
    for stream[0] in (0, 5, 0):
        assert torch.equal(model(x), block_by_block(model, x))
    assert len(Graph.captured) == 2


def test_within_somebody_elses_capture_nothing_is_captured_nor_shared(stream):
    model, x = graphed(), images()
    expected = model(x)
    stream[1] = True
    assert torch.equal(model(x), expected)
    assert len(Graph.captured) == 1 and Graph.captured[0].replays == 1
    model = rf.fuse(network(), backend="triton")
    taken: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "place", lambda *_: taken.append(0))
        model(x), model(x)
    assert not taken, "the arena of the stream is not for a graph's launches"


def test_copies_pickles_and_unfused_models_take_no_graph_along():
    model, x = graphed(), images()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = len(Graph.captured)
        assert torch.equal(twin(x), expected) and len(Graph.captured) == before + 1
    graph = weakref.ref(Graph.captured[0])
    before = len(Graph.captured)
    plain = rf.unfuse(model)
    plain(x)
    assert len(Graph.captured) == before
    Graph.captured.clear()
    del model
    gc.collect()
    assert graph() is None


def test_clear_workspace_drops_graphs():
    model, x = graphed(), images()
    model(x)
    rf.clear_workspace()
    assert torch.equal(model(x), block_by_block(model, x)) and len(Graph.captured) == 2


def test_training_and_gradients_are_for_the_modules():
    model, x = graphed(), images()
    with torch.enable_grad():
        model(x).sum().backward()
    model.train()(x)
    assert not Graph.captured and convs_of(model)[0].weight.grad is not None


def test_refusals_say_what_is_needed(monkeypatch):
    with pytest.raises(ValueError, match=r"cuda_graph: .* Sequential"):
        rf.fuse(nn.Sequential(rf.FusedBasicBlock(4, 4)), cuda_graph=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = network()
    with pytest.raises(ValueError, match=r"cuda_graph: got True, but there is no CUDA device"):
        rf.fuse_(model, cuda_graph=True)
    assert not rf.is_fused(model)
