"""Blocks that look like residual blocks and are not quite: fused or not, they do what eager does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from look_alikes import (
    LOOK_ALIKES,
    Mean,
    NewSum,
    OneChannel,
    Plain,
    Present,
    ShortcutFirst,
    WritesInput,
    numpy_geometry,
)
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.testing.networks import randomise_norms

MODES: dict[str, Callable[[nn.Module], object]] = {
    "eval": lambda m: m.eval(),
    "training": lambda m: m.train(),
    "first norm frozen": lambda m: (m.train(), next(n for n in m.modules() if isinstance(n, nn.BatchNorm2d)).eval()),
    "last norm training": lambda m: (m.eval(), [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)][-1].train()),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    block = LOOK_ALIKES[name]()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.affine:
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            nn.init.uniform_(norm.bias, -0.2, 0.2)
    return block


def behaviour(block: nn.Module, grad: bool) -> dict[str, Any]:
    """All that can be seen of a call: the result or the error, the input, buffers, gradients, random numbers, flags."""
    torch.manual_seed(2)
    start = torch.randn(3, 8, 6, 6)
    leaf = start.clone().requires_grad_(grad)
    x = leaf * 1.0
    seen: dict[str, Any] = {}
    with torch.set_grad_enabled(grad):
        try:
            out = block(x)
            seen["out"] = out.detach().clone()
            if grad:
                out.float().square().sum().backward()
                seen["dx"] = leaf.grad
        except Exception:  # ours may name the argument where eager's names an operation
            seen["error"] = True
    seen["x"] = x.detach()
    seen |= {f"buffer {n}": b for n, b in block.named_buffers()}
    if "error" not in seen:
        seen |= {f"grad {n}": p.grad for n, p in block.named_parameters()}
    seen |= {f"mode {n}": m.training for n, m in block.named_modules()}
    seen["random"] = torch.rand(1)
    seen["flag"] = torch.backends.cudnn.benchmark
    seen["calls"] = getattr(block, "calls", None)
    return seen


def same(ours: dict[str, Any], eagers: dict[str, Any]) -> None:
    assert list(ours) == list(eagers), (ours.get("error"), eagers.get("error"))
    for name, value in eagers.items():
        if isinstance(value, Tensor):
            found = ours[name]
            assert isinstance(found, Tensor) and (found.dtype, found.shape) == (value.dtype, value.shape), name
            # Sums in another order, as far as float32 goes; what is seen here is off by far more.
            error, scale = (found - value).abs().double(), value.abs().double()
            assert not error.numel() or error.max() <= 1e-5 + 1e-4 * scale.max(), f"{name}: off by {error.max()}"
        else:
            assert ours[name] == value, name


@pytest.fixture(autouse=True)
def _flags() -> Any:
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_does_what_eager_does(name: str, mode: str) -> None:
    block = built(name)
    MODES[mode](block)
    for grad in (False, True):
        eager, fused = copy.deepcopy(block), rf.fuse(block)
        for _ in range(2):
            torch.backends.cudnn.benchmark = False
            ours = behaviour(fused, grad)
            torch.backends.cudnn.benchmark = False
            same(ours, behaviour(eager, grad))


CHANGES: dict[str, Callable[[Any], object]] = {
    "stride as an int": lambda b: setattr(b.conv1, "stride", 1),
    "stride as a list": lambda b: setattr(b.conv1, "stride", [1, 1]),
    "numpy": numpy_geometry,
    "a stride that no longer fits": lambda b: setattr(b.conv1, "stride", 2),
    "an attribute over a norm": lambda b: b.__dict__.update(bn1=nn.Identity()),
    "an attribute over a weight": lambda b: b.conv1.__dict__.update(weight=torch.ones(8, 8, 3, 3)),
    "no shortcut": lambda b: setattr(b, "shortcut", None),
    "in-place shortcut": lambda b: setattr(b, "shortcut", nn.ReLU(inplace=True)),
    "writing shortcut": lambda b: setattr(b, "shortcut", WritesInput()),
    "broadcasting shortcut": lambda b: setattr(b, "shortcut", Mean()),
    "one channel": lambda b: setattr(b, "shortcut", OneChannel()),
    "function": lambda b: b.__dict__.update(shortcut=torch.neg) or b._modules.pop("shortcut"),
    "shared norm": lambda b: setattr(b, "bn1", b.bn2),
    "another relu": lambda b: setattr(b, "relu", nn.GELU()),
    "other names": lambda b: b.__dict__.update(_pairs=1, _shortcut=2, _op=3, _fused=4, _original_forward=5, refresh=6),
    "forward of a convolution": lambda b: setattr(b.conv1, "forward", lambda x: x + 1),
    "_conv_forward of a convolution": lambda b: setattr(b.conv1, "_conv_forward", lambda x, w, bias: x + 1),
    "forward of a norm": lambda b: setattr(b.bn1, "forward", lambda x: x + 1),
    "forward of a relu": lambda b: setattr(b.relu, "forward", lambda x: x + 1),
    "forward of the shortcut": lambda b: setattr(b.shortcut, "forward", lambda x: x + 1),
    "forward of the shortcut's convolution": lambda b: setattr(b.shortcut[0], "forward", lambda x: x + 1),
    "_check_input_dim of a norm": lambda b: setattr(b.bn2, "_check_input_dim", lambda x: x.mul_(2)),
    "forward of the block": lambda b: setattr(b, "forward", lambda x: x + 1),
}


@pytest.mark.parametrize("mode", ["eval", "training"])
@pytest.mark.parametrize("base", [Plain, ShortcutFirst], ids=["behind", "first"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_fuse_is_seen(change: str, base: type, mode: str) -> None:
    torch.manual_seed(0)
    block = randomise_norms(base())
    MODES[mode](block)
    fused, eager = rf.fuse(block, strict=True), copy.deepcopy(block)
    for grad in (False, True):
        same(behaviour(fused, grad), behaviour(eager, grad))
    CHANGES[change](fused), CHANGES[change](eager)
    for grad in (False, True):
        same(behaviour(fused, grad), behaviour(eager, grad))


@pytest.mark.parametrize("mode", ["eval", "training"])
def test_a_float32_norm_in_a_bfloat16_block_rounds_where_eager_does(mode: str) -> None:
    torch.manual_seed(0)
    block = randomise_norms(Plain())
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    MODES[mode](block)
    fused, x = rf.fuse(block), torch.randn(2, 8, 6, 6).bfloat16()
    with torch.no_grad():
        assert torch.equal(fused(x), copy.deepcopy(block)(x))


@pytest.mark.parametrize("mode", ["eval", "training"])
@pytest.mark.parametrize("base", [Present, NewSum], ids=["in place", "new"])
def test_a_wide_input_under_autocast_gives_eagers_dtype(base: type, mode: str) -> None:
    torch.manual_seed(0)
    block = randomise_norms(base())
    block.shortcut = nn.Sequential() if base is NewSum else None
    MODES[mode](block)
    fused, x = rf.fuse(block, strict=True), torch.randn(2, 8, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, eagers = fused(x), copy.deepcopy(block)(x)
    assert ours.dtype == eagers.dtype
    torch.testing.assert_close(ours, eagers, rtol=0.05, atol=0.05)
