"""Blocks that compute again what others keep: the same numbers in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import devices
import optional
import pytest
import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.ops import residual_block
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.networks import randomise_norms
from resnet_fused.testing.training import saved_bytes

torchvision = optional.torchvision()
tv = torchvision.models.resnet
RECOMPUTE = ["activations", "last_conv"]


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: tv.BasicBlock(8, 8),
    "basic-stride2": lambda: tv.BasicBlock(8, 12, 2, projection(8, 12, 2)),
    "bottleneck": lambda: tv.Bottleneck(16, 4),
    "bottleneck-stride2": lambda: tv.Bottleneck(8, 4, 2, projection(8, 16, 2)),
    "bottleneck-groups": lambda: tv.Bottleneck(64, 16, groups=4, base_width=32),
    "bottleneck-pooled": lambda: tv.Bottleneck(8, 4, 2, nn.Sequential(nn.AvgPool2d(2), *projection(8, 16, 1))),
}


def step(model: nn.Module, x: Tensor, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """One training step without an optimizer: output, gradients, running statistics."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if upstream is None else upstream
    y.backward(grad.to(y))
    found = {"y": y.detach(), "x": x.grad}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}  # type: ignore[return-value]


def within_budget(ours: dict[str, Tensor], eager: nn.Module, x: Tensor) -> None:
    """Everything in ``ours`` against eager's and a float64 run's."""
    exact = step(copy.deepcopy(eager).double(), x.double())
    other = copy.deepcopy(eager).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other_found = step(other, x.contiguous(memory_format=torch.channels_last))
    theirs = step(eager, x)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        if value.is_floating_point():
            assert_within_budget(value, theirs[name], exact[name].double(), other_found[name])
        else:
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("recompute", [None, *RECOMPUTE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_is_eagers(name: str, dtype: torch.dtype, recompute: str | None) -> None:
    eager = randomise_norms(BLOCKS[name]()).to(dtype).train()
    fused = rf.fuse(eager, recompute=recompute)
    channels = next(eager.parameters()).shape[1]
    x = torch.randn(3, channels, 10, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    within_budget(step(fused, x), eager, x)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", BLOCKS)
def test_to_the_bit_what_is_kept_otherwise(name: str, recompute: str) -> None:
    """The very same kernels on the very same values: masks of ReLU cannot differ."""
    eager = randomise_norms(BLOCKS[name]()).train()
    x = torch.randn(3, next(eager.parameters()).shape[1], 10, 8)
    plain, less = step(rf.fuse(eager), x), step(rf.fuse(eager, recompute=recompute), x)
    for key, value in plain.items():
        assert torch.equal(value, less[key]), key


@pytest.mark.parametrize("backend", [devices.by("triton")])
@pytest.mark.parametrize("name", ["basic-stride2", "bottleneck"])
def test_by_triton(name: str, backend: str) -> None:
    pytest.importorskip("triton")
    eager = randomise_norms(BLOCKS[name]()).train().to(devices.DEVICE)
    x = torch.randn(3, next(eager.parameters()).shape[1], 10, 8).contiguous(memory_format=torch.channels_last)
    x = x.to(devices.DEVICE)
    plain, *others = (step(rf.fuse(eager, backend=backend, recompute=r), x) for r in (None, *RECOMPUTE))
    for less in others:
        for key, value in plain.items():
            assert torch.equal(value, less[key]), key
    within_budget(plain, eager, x)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["basic", "bottleneck-stride2", "bottleneck-pooled"])
def test_gradcheck(name: str, recompute: str) -> None:
    block = rf.fuse(randomise_norms(BLOCKS[name]()).double().train(), recompute=recompute)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*block.named_parameters(), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


LIMITS = {None: (1.0, 1.0), "activations": (0.77, 0.85), "last_conv": (0.55, 0.55)}


@pytest.mark.parametrize("recompute", LIMITS)
@pytest.mark.parametrize("depth", [2, 3])
def test_saved_bytes_of_identity_blocks(depth: int, recompute: str | None) -> None:
    """In a chain, where the output of one block is the input of the next."""
    blocks = [tv.BasicBlock(32, 32) if depth == 2 else tv.Bottleneck(64, 16) for _ in range(4)]
    eager = nn.Sequential(*blocks).train()
    x = torch.randn(4, 32 if depth == 2 else 64, 16, 16)
    fused = rf.fuse(eager, recompute=recompute)
    assert saved_bytes(fused, x) <= LIMITS[recompute][depth - 2] * saved_bytes(eager, x)


@pytest.mark.parametrize(("name", "limits"), [("resnet18", (1.0, 0.87, 0.73)), ("resnet50", (1.0, 0.85, 0.60))])
def test_saved_bytes_of_whole_models(name: str, limits: tuple[float, ...]) -> None:
    eager = getattr(torchvision.models, name)().train()
    x = torch.randn(2, 3, 64, 64)
    before = saved_bytes(eager, x)
    for recompute, limit in zip(LIMITS, limits, strict=True):
        share = saved_bytes(rf.fuse(eager, recompute=recompute), x) / before
        assert share <= limit, (recompute, share)


@pytest.mark.parametrize("recompute", [None, *RECOMPUTE])
@pytest.mark.parametrize("frozen", [("bn1",), ("bn2", "downsample.1"), ("bn3",), ("bn1", "bn2", "bn3")], ids="+".join)
def test_frozen_and_trained_norms_and_parameters(frozen: tuple[str, ...], recompute: str | None) -> None:
    """In float64, where nothing but the maths can differ."""
    eager = randomise_norms(BLOCKS["bottleneck-stride2"]()).double().train()
    for name in frozen:
        eager.get_submodule(name).eval()
    eager.conv1.requires_grad_(False), eager.bn3.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    x = torch.randn(3, 8, 10, 8, dtype=torch.float64)
    ours, theirs = step(rf.fuse(eager, recompute=recompute), x), step(eager, x)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_running_statistics_move_once(recompute: str, momentum: float | None) -> None:
    eager = tv.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=momentum, affine=False)).train()
    fused = rf.fuse(eager, recompute=recompute)
    for _ in range(3):
        x = torch.randn(4, 8, 6, 6)
        step(fused, x), step(eager, x)
    for (name, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("recompute", [None, *RECOMPUTE])
def test_statistics_that_are_not_tracked_any_more_stay(recompute: str | None) -> None:
    """As nn.BatchNorm2d does where track_running_stats is turned off on a norm that has buffers."""
    eager = randomise_norms(BLOCKS["basic"]()).double().train()
    eager.bn1.track_running_stats = False  # type: ignore[union-attr,assignment]
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    ours, theirs = step(rf.fuse(eager, recompute=recompute), x), step(eager, x)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_sync_batch_norm_alone_is_batch_norm(recompute: str) -> None:
    """In a single process, as in eager."""
    eager = nn.SyncBatchNorm.convert_sync_batchnorm(randomise_norms(BLOCKS["bottleneck-stride2"]()).double().train())
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    ours, theirs = step(rf.fuse(eager, recompute=recompute, strict=True), x), step(eager, x)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_autocast(recompute: str) -> None:
    block = randomise_norms(BLOCKS["bottleneck-stride2"]()).train()
    x = torch.randn(3, 8, 10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(rf.fuse(block, recompute=recompute), x), step(rf.fuse(block), x)
    assert ours["y"].dtype == torch.bfloat16
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


@pytest.mark.minimum
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_compiles_as_one_graph(recompute: str) -> None:
    block = rf.fuse(randomise_norms(BLOCKS["basic"]()).train(), recompute=recompute)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8, 6, 6)
    ours, theirs = step(compiled, x), step(block, x)
    for key, value in theirs.items():
        torch.testing.assert_close(next(v for k, v in ours.items() if k.replace("_orig_mod.", "") == key), value)


def test_opcheck() -> None:
    block = rf.fuse(BLOCKS["bottleneck-stride2"]().train(), recompute="last_conv")
    calls: list[Any] = []
    real = residual_block.OP

    def record(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    residual_block.OP = record
    try:
        block(torch.randn(2, 8, 6, 6))
    finally:
        residual_block.OP = real
    torch.library.opcheck(real, calls[0])


def test_choices_are_checked_and_kept() -> None:
    with pytest.raises(ValueError, match="recompute: got 'all'"):
        rf.FusedBottleneck(16, 4, recompute="all")
    with pytest.raises(ValueError, match="recompute: got 'all'"):
        rf.fuse(tv.BasicBlock(8, 8), recompute="all")
    block = rf.FusedBasicBlock(8, 8, recompute="last_conv")
    assert copy.deepcopy(block)._rf_state.recompute == "last_conv"
    assert rf.fuse(block)._rf_state.recompute is None
    assert rf.FusedBasicBlock.from_block(block, recompute="activations")._rf_state.recompute == "activations"


def test_a_second_derivative_is_refused() -> None:
    block = rf.FusedBasicBlock(4, 4, recompute="activations")
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        rf.FusedBasicBlock(4, 4, recompute="activations")(torch.randn(1, 4, 1, 1))
