"""Functions replaced for a class, on an instance or by a global name, before and after ``fuse``, run."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import optional
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.testing.networks import randomise_norms

tv = optional.torchvision().models.resnet


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.shortcut = nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):  # type: ignore[no-untyped-def]
        out = self.act(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Child(Residual):
    pass


def small() -> nn.Module:
    torch.manual_seed(0)
    model = tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], num_classes=4)
    return randomise_norms(model).eval()


def block() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(Residual()).eval()


def child() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(Child()).eval()


def same(fused: nn.Module, eager: nn.Module) -> None:
    """Also with gradients, and in training."""
    fused, eager = copy.deepcopy(fused), copy.deepcopy(eager)
    size = (2, 3, 40, 40) if hasattr(eager, "fc") else (2, 8, 6, 6)
    for training in (False, True):
        fused.train(training), eager.train(training)
        for grad in (False, True):
            x = torch.randn(size)
            with torch.set_grad_enabled(grad):
                ours, eagers = fused(x), eager(x)
            assert (ours - eagers).abs().max() <= 2e-3 * eagers.abs().max()


# Where a function is replaced, and a model whose forward reaches it.
PLACES: dict[str, tuple[Any, str, Callable[[], nn.Module]]] = {
    "Conv2d.forward": (nn.Conv2d, "forward", small),
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward", small),
    "Conv2d.__call__": (nn.Conv2d, "__call__", small),
    "BatchNorm2d.forward": (nn.BatchNorm2d, "forward", small),
    "_BatchNorm.forward": (nn.BatchNorm2d.__mro__[1], "forward", small),
    "ReLU.forward": (nn.ReLU, "forward", small),
    "Sequential.forward": (nn.Sequential, "forward", block),
    "Module.__call__": (nn.Module, "__call__", block),
    "F.conv2d": (F, "conv2d", small),
    "F.batch_norm": (F, "batch_norm", small),
    "F.relu": (F, "relu", block),
    "torch.relu": (torch, "relu", block),
    "BasicBlock.forward": (tv.BasicBlock, "forward", small),
    "ResNet.forward": (tv.ResNet, "forward", small),
    "ResNet._forward_impl": (tv.ResNet, "_forward_impl", small),
    "a class of one's own": (Residual, "forward", block),
    "its base class": (Residual, "forward", child),
    "a subclass": (Child, "forward", child),
    "its call": (Residual, "__call__", block),
}


def replacement(original: Any, how: str) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) * 0.75

    return functools.wraps(original)(changed) if how == "wraps" else changed


@pytest.mark.parametrize("how", ["plain", "wraps"])
@pytest.mark.parametrize("place", PLACES)
def test_a_replaced_function_is_seen(place: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, make = PLACES[place]
    early, eager = rf.fuse(make()), make()
    same(early, eager)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement(getattr(owner, name), how))
        late = rf.fuse(make())
        same(early, eager)
        same(late, eager)
        skipped = rf.report(early).skipped
        assert skipped and all(entry.reason for entry in skipped)
    same(early, eager)
    same(late, eager)
    assert rf.report(early).fused and not rf.report(early).skipped


def test_other_code_in_the_same_function_is_seen() -> None:
    def other(self: Any, x: Tensor) -> Tensor:
        return self.conv1(x)  # type: ignore[no-any-return]

    fused, eager = rf.fuse(block(), strict=True), block()
    before = Residual.forward.__code__
    try:
        Residual.forward.__code__ = other.__code__
        same(fused, eager)
    finally:
        Residual.forward.__code__ = before


def test_torch_patched_before_this_package_is_imported() -> None:
    code = """
import torch, functools
from torch import nn
plain = nn.BatchNorm2d.forward
@functools.wraps(plain)
def patched(self, x): return plain(self, x) * 0.5
nn.BatchNorm2d.forward = patched
import resnet_fused as rf
block = rf.FusedBasicBlock(8, 8).eval()
x = torch.randn(1, 8, 5, 5)
h = torch.relu(block.bn1(block.conv1(x)))
with torch.no_grad():
    want = torch.relu(block.bn2(block.conv2(h)) + x)
    assert torch.allclose(block(x), want, atol=1e-5)
    assert "BatchNorm2d.forward was replaced" in str(rf.report(block))
    del nn.BatchNorm2d.forward
    h = torch.relu(block.bn1(block.conv1(x)))
    assert torch.allclose(block(x), torch.relu(block.bn2(block.conv2(h)) + x), atol=1e-5)
    assert rf.report(block).fused
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_global_relu_that_is_rebound(monkeypatch: pytest.MonkeyPatch) -> None:
    class Smooth:
        relu = staticmethod(F.silu)

    early = rf.fuse(block(), strict=True)
    monkeypatch.setitem(globals(), "F", Smooth)
    eager, late = block(), rf.fuse(block())
    same(early, eager)
    same(late, eager)
    assert not rf.is_fused(late) and rf.report(early).skipped
    monkeypatch.undo()
    same(early, block())
    assert rf.is_fused(rf.fuse(block()))


def test_methods_that_a_registered_forward_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused.fusion import adapters

    class Mine(Residual):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return F.relu(self.branch(x) + self.shortcut(x))

        def branch(self, x):  # type: ignore[no-untyped-def]
            return self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))

    class Doubled(Mine):
        def branch(self, x):  # type: ignore[no-untyped-def]
            return super().branch(x) * 2

    monkeypatch.setattr(adapters, "_REGISTERED", {})
    rf.register_adapter(Mine, convs=("conv1", "conv2"), norms=("bn1", "bn2"), acts=("act",), shortcut="shortcut")
    mine, doubled = randomise_norms(Mine()).eval(), randomise_norms(Doubled()).eval()
    fused = rf.fuse(mine, strict=True)
    assert not rf.is_fused(rf.fuse(doubled))
    monkeypatch.setattr(Mine, "branch", lambda self, x: self.conv1(x))
    same(fused, mine)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_know_what_they_were_matched_with(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, eager = rf.fuse(block(), strict=True), block()
    twin = copy.deepcopy(fused) if way == "deepcopy" else pickle.loads(pickle.dumps(fused))
    assert rf.report(twin).fused
    monkeypatch.setattr(Residual, "forward", replacement(Residual.forward, "wraps"))
    same(twin, eager)
    late = pickle.loads(pickle.dumps(fused))
    same(late, eager)
    assert rf.report(late).skipped


def test_another_forward_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, eager = pickle.dumps(rf.fuse(block(), strict=True)), block()
    monkeypatch.setattr(Residual, "forward", replacement(Residual.forward, "wraps"))
    loaded = pickle.loads(saved)
    same(loaded, eager)
    assert "when it was saved" in rf.report(loaded)[""].reason
