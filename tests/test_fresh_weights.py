"""Weights that are new at each call are packed at none; weights that stay are packed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_networks import images, network, norms_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused.ops import cpu_convolution, packed
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.testing.networks import compare

pytestmark = [pytest.mark.waits, pytest.mark.usefixtures("one_thread")]

KINDS = ["basic", "bottleneck", "narrow"]


class Packs(list[str]):
    """The names of the makers that were called."""


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Packs:
    """What is packed to be kept: filters put into another order, transformed or folded."""
    found, build = Packs(), packed.outside_of_modes

    def watched(make: Callable[..., object], *args: object) -> object:
        if make is not conv_bn_act._channels_last:  # of weights that stay while norms are trained
            found.append(make.__name__)
        return build(make, *args)

    monkeypatch.setattr(packed, "outside_of_modes", watched)
    return found


class Reorders(TorchDispatchMode):
    """Counts the calls that put weights into an order of oneDNN's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "reorder" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def packs_bfloat16() -> bool:
    """Whether a kernel of this CPU computes bfloat16 from packed weights."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() or (
        not cpu_convolution.unavailable() and bool(cpu_convolution.instructions(bf16=True))
    )


def predict(model: nn.Module, x: Tensor, low: bool = False) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        return model(x)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_stay_are_packed_once(kind: str, low: bool, packs: Packs) -> None:
    model, x = rf.fuse(network(kind)), images(2, 8)
    predict(model, x, low)
    assert not packs, "the first call cannot know that its weights stay"
    for _ in range(3):
        predict(model, x, low)
    assert packs or (low and not packs_bfloat16())
    made = len(packs)
    for _ in range(3):
        predict(model, x, low)
    assert len(packs) == made


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_packs_at_once(kind: str, packs: Packs) -> None:
    model, x = rf.fuse(network(kind)), images(2, 8)
    rf.warmup(model, x)
    assert packs
    made = len(packs)
    predict(model, x)
    assert len(packs) == made


@pytest.mark.parametrize("backend", ["cpu", "onednn"])
def test_a_backend_that_was_named_packs_at_once(backend: str, packs: Packs) -> None:
    model, x = rf.fuse(network("basic"), backend=backend), images(2, 8)
    predict(model, x)
    assert packs
    made = len(packs)
    predict(model, x)
    assert len(packs) == made


def by_functional_call(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        functional_call(model, {n: p.detach().clone() for n, p in model.named_parameters()}, (x,))


def by_a_hypernetwork(model: nn.Module, x: Tensor) -> None:
    scale = torch.ones((), requires_grad=True)
    functional_call(model, {n: p.detach() * scale for n, p in model.named_parameters()}, (x,)).sum().backward()


def moved(model: nn.Module, x: Tensor) -> None:
    """Test-time adaptation."""
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.01)
    predict(model, x)


def moved_unseen(model: nn.Module, x: Tensor) -> None:
    for p in model.parameters():
        p.data.mul_(1.01)
    predict(model, x)


def moved_under_autocast(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.01)
    predict(model, x, low=True)


def stepped(model: nn.Module, x: Tensor) -> None:
    """Fine-tuning with frozen norms."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def stepped_by_a_fused_optimizer(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    model(x).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def norms_stepped(model: nn.Module, x: Tensor) -> None:
    model.requires_grad_(False)
    vectors = [p for n in norms_of(model) for p in n.requires_grad_(True).parameters()]
    optimizer = torch.optim.SGD(vectors, 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def loaded(model: nn.Module, x: Tensor) -> None:
    model.load_state_dict({k: v * 1.01 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    predict(model, x)


def recalibrated(model: nn.Module, x: Tensor) -> None:
    norms = norms_of(model)
    for norm in norms:
        norm.train()
    predict(model, x)
    for norm in norms:
        norm.eval()
    predict(model, x)


FRESH = [by_functional_call, by_a_hypernetwork, moved, moved_unseen, moved_under_autocast, stepped,
         stepped_by_a_fused_optimizer, norms_stepped, loaded, recalibrated]  # fmt: skip


@pytest.mark.parametrize("way", FRESH, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_new_are_not_packed(kind: str, way: Callable[[nn.Module, Tensor], None], packs: Packs) -> None:
    model, x = rf.fuse(network(kind)), images(2, 8)
    for _ in range(5):
        way(model, x)
    assert not packs, f"packed in 5 calls: {sorted(set(packs))}, {len(packs)} times"


@pytest.mark.parametrize("way", FRESH, ids=lambda f: f.__name__)
def test_what_is_packed_does_not_return(way: Callable[[nn.Module, Tensor], None], packs: Packs) -> None:
    """After packing, calls with new weights, and then weights that stay: packed anew once, with right numbers."""
    eager = network("basic")
    model, x = rf.fuse(eager), images(2, 8)
    for _ in range(3):
        predict(model, x)
    packs.clear()
    for _ in range(4):
        way(model, x)
    assert not packs
    eager.load_state_dict(model.state_dict())
    for _ in range(3):
        assert compare(model, eager, x).ok


def test_nothing_is_reordered_in_an_op() -> None:
    """The same as the dispatcher sees it: observed, no call puts new weights into another order."""
    model, x = rf.fuse(network("narrow")), images(2, 8)
    with Reorders() as seen:
        for _ in range(4):
            moved(model, x)
            stepped(model, x)
    assert not seen.names
