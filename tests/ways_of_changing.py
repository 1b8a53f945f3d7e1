"""Everything that changes what a model's modules do, other than their tensors: flags, hooks, children, classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import blocks_of, convs_of, norms_of, tv
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from twins import Side, Way

CHANGES: dict[str, Way] = {}


def change(function: Way) -> Way:
    CHANGES[function.__name__] = function
    return function


# Flags and numbers.


@change
def trains(side: Side) -> None:
    side.model.train()


@change
def evaluates(side: Side) -> None:
    side.model.eval()


@change
def norms_frozen(side: Side) -> None:
    side.model.train()
    for norm in norms_of(side.model):
        norm.eval()


@change
def one_norm_trains(side: Side) -> None:
    side.pick(norms_of(side.model)).train()


@change
def norms_train(side: Side) -> None:
    for norm in norms_of(side.model):
        norm.train()


@change
def one_block_trains(side: Side) -> None:
    side.pick(blocks_of(side.model)).train()


@change
def eps(side: Side) -> None:
    side.pick(norms_of(side.model)).eps = side.pick([1e-5, 1e-3, 0.5])


@change
def momentum(side: Side) -> None:
    side.pick(norms_of(side.model)).momentum = side.pick([0.1, 0.5, None])


@change
def batch_statistics_always(side: Side) -> None:
    """Without running statistics a norm uses the batch's in eval mode too."""
    norm = side.pick(norms_of(side.model))
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


@change
def statistics_given(side: Side) -> None:
    for norm in norms_of(side.model):
        if norm.running_mean is None:
            weight = norm.weight
            norm.running_mean = torch.zeros_like(weight).detach()
            norm.running_var = torch.ones_like(weight).detach()
            norm.num_batches_tracked = torch.tensor(0)
            norm.track_running_stats = True


@change
def stride(side: Side) -> None:
    """Of a block with a projection, both ways; as a pair, a number or a list."""
    block = side.pick([b for b in blocks_of(side.model) if b.downsample is not None] or blocks_of(side.model))
    conv = block.conv2 if isinstance(block, tv.Bottleneck) else block.conv1
    new = side.pick([(1, 1), 1, [1, 1], (2, 2), 2])
    conv.stride = new
    if block.downsample is not None:
        block.downsample[0].stride = new


@change
def padding_as_a_number(side: Side) -> None:
    conv = side.pick([c for c in convs_of(side.model) if c.kernel_size == (3, 3)])
    conv.padding = side.pick([1, [1, 1], "same" if conv.stride in (1, (1, 1), [1, 1]) else 1])


@change
def padding_mode(side: Side) -> None:
    conv = side.pick([c for c in convs_of(side.model) if c.kernel_size == (3, 3)])
    conv.padding_mode = side.pick(["circular", "zeros"])
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


@change
def nothing_trained(side: Side) -> None:
    side.model.requires_grad_(False)


@change
def norms_trained(side: Side) -> None:
    side.model.requires_grad_(False)
    for norm in norms_of(side.model):
        norm.requires_grad_()


@change
def convolutions_trained(side: Side) -> None:
    side.model.requires_grad_(False)
    for conv in convs_of(side.model):
        conv.requires_grad_()


@change
def all_trained(side: Side) -> None:
    side.model.requires_grad_()


# Hooks. They change what passes, by a factor that tells how large a batch they see.


def louder(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out * (1 + args[0].shape[0] / 8)


def quieter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * (0.5 + args[0].shape[0] / 16), *args[1:])


def other_gradient(module: nn.Module, grads: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else g * 1.5 for g in grads)


def louder_convolutions(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    return out * 1.5 if isinstance(module, nn.Conv2d) else None


def quieter_norms(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (args[0] * 0.5,) if isinstance(module, nn.BatchNorm2d) else None


def _any(side: Side) -> nn.Module:
    return side.pick([m for _, m in side.model.named_modules() if m is not side.model])


@change
def forward_hook(side: Side) -> None:
    side.handles.append(_any(side).register_forward_hook(louder))


@change
def forward_pre_hook(side: Side) -> None:
    side.handles.append(_any(side).register_forward_pre_hook(quieter))


@change
def backward_hook(side: Side) -> None:
    side.handles.append(side.pick(convs_of(side.model)).register_full_backward_hook(other_gradient))


@change
def tensor_hook(side: Side) -> None:
    weight = side.pick(convs_of(side.model)).weight
    if weight.requires_grad:
        side.handles.append(weight.register_hook(_one_and_a_half))


def _one_and_a_half(grad: Tensor) -> Tensor:
    return grad * 1.5


@change
def hooks_removed(side: Side) -> None:
    for handle in side.handles:
        handle.remove()
    side.handles.clear()


# Forwards of instances, and children.


class Louder:
    """Calls a bound method and makes its result larger; can be copied and pickled."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.call(*args, **kwargs) * 1.5


class LoudNorm(nn.BatchNorm2d):
    """A norm whose forward does more than its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class LoudConv(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return super()._conv_forward(*args) * 1.5


def _method(name: str, of: Callable[[Side], list[Any]]) -> Callable[[Side], None]:
    def replace(side: Side) -> None:
        module = side.pick(of(side))
        if name in module.__dict__:
            delattr(module, name)
        else:
            setattr(module, name, Louder(getattr(module, name)))

    return replace


CHANGES["forward_of_a_convolution"] = _method("forward", lambda s: convs_of(s.model))
CHANGES["conv_forward_of_a_convolution"] = _method("_conv_forward", lambda s: convs_of(s.model))
CHANGES["forward_of_a_norm"] = _method("forward", lambda s: norms_of(s.model))
CHANGES["forward_of_a_block"] = _method("forward", lambda s: blocks_of(s.model))


@change
def class_of_a_norm(side: Side) -> None:
    side.pick([n for n in norms_of(side.model) if type(n) is nn.BatchNorm2d]).__class__ = LoudNorm


@change
def class_of_a_convolution(side: Side) -> None:
    side.pick([c for c in convs_of(side.model) if type(c) is nn.Conv2d]).__class__ = LoudConv


def _like(side: Side, new: nn.Module, old: nn.Module) -> nn.Module:
    with torch.no_grad():
        for t in new.parameters():
            t.copy_(torch.rand(t.shape, generator=side.random) * 0.2)
    reference = next(side.model.fc.parameters())
    return new.to(reference.dtype).train(old.training)


@change
def new_convolution(side: Side) -> None:
    block, name = side.pick(blocks_of(side.model)), side.pick(["conv1", "conv2"])
    old = getattr(block, name)
    new = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=bool(side.below(2))
    )
    setattr(block, name, _like(side, new, old))


@change
def new_norm(side: Side) -> None:
    block, name = side.pick(blocks_of(side.model)), side.pick(["bn1", "bn2"])
    old = getattr(block, name)
    make = side.pick(
        [nn.BatchNorm2d, LoudNorm, lambda c: nn.GroupNorm(4, c), lambda c: nn.BatchNorm2d(c, affine=False)]
    )
    setattr(block, name, _like(side, make(old.num_features), old))


@change
def other_activation(side: Side) -> None:
    side.pick(blocks_of(side.model)).relu = side.pick([nn.SiLU(), nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh()])


@change
def bias_given(side: Side) -> None:
    conv = side.pick(convs_of(side.model))
    bias = torch.rand(conv.out_channels, generator=side.random).to(conv.weight.dtype)
    conv.bias = None if conv.bias is not None else nn.Parameter(bias)


@change
def affine_taken(side: Side) -> None:
    norm = side.pick([n for n in norms_of(side.model) if n.weight is not None])
    norm.weight = None


@change
def new_block(side: Side) -> None:
    at = side.pick([n for n in ("layer1", "layer2") if len(getattr(side.model, n))])
    layer = getattr(side.model, at)
    width = layer[-1].bn2.num_features if isinstance(layer[-1], tv.BasicBlock) else layer[-1].bn3.num_features
    layer.append(_like(side, tv.BasicBlock(width, width), layer[-1]))


@change
def new_head(side: Side) -> None:
    old = side.model.fc
    side.model.fc = _like(side, nn.Linear(old.in_features, old.out_features), old)


@change
def layer_wrapped(side: Side) -> None:
    side.model.layer1 = nn.Sequential(side.model.layer1, nn.Sequential(nn.Identity(), nn.Hardtanh(-1.0, 2.0)))


# For all modules at once: done once for both twins, and undone.


def _by(factor: float, call: Callable[..., Tensor], wrapped: bool) -> Callable[..., Tensor]:
    def loud(*args: Any, **kwargs: Any) -> Tensor:
        return call(*args, **kwargs) * factor

    return functools.wraps(call)(loud) if wrapped else loud


def _patch(owner: Any, name: str, wrapped: bool = False) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, _by(1.5, getattr(owner, name), wrapped))


def _global_hook(register: Callable[..., Any], hook: Callable[..., Any], hooks: Any) -> Callable[..., None]:
    def add(patch: pytest.MonkeyPatch) -> None:
        handle = register(hook)
        patch.setitem(hooks, handle.id, hooks.pop(handle.id))  # taken away when the patch is undone

    return add


PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "BatchNorm2d.forward": _patch(nn.BatchNorm2d, "forward"),
    "BatchNorm2d.forward wrapped": _patch(nn.BatchNorm2d, "forward", True),
    "_BatchNorm.forward": _patch(nn.modules.batchnorm._BatchNorm, "forward"),
    "Conv2d.forward": _patch(nn.Conv2d, "forward"),
    "Conv2d.forward wrapped": _patch(nn.Conv2d, "forward", True),
    "Conv2d._conv_forward": _patch(nn.Conv2d, "_conv_forward"),
    "ReLU.forward": _patch(nn.ReLU, "forward"),
    "BasicBlock.forward": _patch(tv.BasicBlock, "forward"),
    "BasicBlock.forward wrapped": _patch(tv.BasicBlock, "forward", True),
    "Bottleneck.forward": _patch(tv.Bottleneck, "forward"),
    "F.batch_norm": _patch(F, "batch_norm"),
    "F.relu": _patch(F, "relu"),
    "global forward hook": _global_hook(
        nn_module.register_module_forward_hook, louder_convolutions, nn_module._global_forward_hooks
    ),
    "global pre-hook": _global_hook(
        nn_module.register_module_forward_pre_hook, quieter_norms, nn_module._global_forward_pre_hooks
    ),
}
