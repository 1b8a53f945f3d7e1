"""The eager twin of a model: what fused ones are compared with and timed against."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.fusion.api import unfuse
from resnet_fused.modules import FusedConvBNReLU
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.block import FusedBlock
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.spec import find

M = TypeVar("M", bound=nn.Module)


def eager_copy(model: M, *, channels_last: bool = False) -> M:
    """A copy of ``model`` that computes everything by module calls.

    What ``fuse`` changed is undone. Modules that are ours by birth keep their class, and are given the forward that an
    eager ResNet has, adding the shortcut and applying ReLU in place. ``fuse`` the original, not this copy.

    Args:
        model: fused or not; it is not changed.
        channels_last: convert its weights, so that its feature maps have the strides of those of fused parts.
    """
    model = unfuse(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        instance: Any = module
        if isinstance(module, FusedStem):
            instance._rf_run_stem = MethodType(_stem, module)
        elif isinstance(module, FusedBlock):
            instance.forward = MethodType(_block, module)
        elif isinstance(module, FusedConvBNReLU):
            instance.forward = MethodType(_conv_bn_relu, module)
    return model


def original(model: M) -> M:
    """A copy of what ``eager_copy`` gave in which modules that are ours compute as their classes do again."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FusedModule):
            for name in ("forward", "_rf_run_stem"):
                module.__dict__.pop(name, None)
    return model


def _stem(self: FusedStem, x: Tensor) -> Tensor:
    for (conv, norm), act in zip(self._rf_state.spec.pairs, self._rf_state.spec.acts, strict=True):
        x = _call(self, act, _call(self, norm, _call(self, conv, x)))
    return x


def _block(self: FusedBlock, x: Tensor) -> Tensor:
    spec = self._rf_state.spec
    hidden = x
    for i, (conv, norm) in enumerate(spec.pairs):
        if i:
            hidden = _call(self, spec.acts[0], hidden)
        hidden = _call(self, norm, _call(self, conv, hidden))
    shortcut = None if spec.shortcut is None else find(self, spec.shortcut)
    hidden += x if shortcut is None else shortcut(x)
    return _call(self, spec.acts[0], hidden)


def _conv_bn_relu(self: FusedConvBNReLU, x: Tensor) -> Tensor:
    y: Tensor = self.bn(self.conv(x))
    return F.relu(y, inplace=True) if self.act == "relu" else y


def _call(owner: nn.Module, keys: tuple[str, ...], x: Tensor) -> Tensor:
    module = find(owner, keys)
    assert module is not None
    return module(x)  # type: ignore[no-any-return]
