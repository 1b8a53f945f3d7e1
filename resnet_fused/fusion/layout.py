"""Strides of convolution weights: channels_last while fused, as kernels read them, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resnet_fused.modules.base import FusedModule


def relayout(module: FusedModule, convs: Iterable[nn.Module]) -> None:
    """Give the weights of these submodules channels_last strides; note in ``module`` those they had."""
    wanted = {id(conv) for conv in convs}
    layouts = dict(module._rf_state.layouts)
    for name, child in module.named_modules():
        weight = child._parameters.get("weight")
        if id(child) not in wanted or weight is None:
            continue
        before = weight.stride()
        _set_data(weight, weight.data.contiguous(memory_format=torch.channels_last))
        if weight.stride() != before:
            layouts.setdefault(f"{name}.weight", (tuple(weight.shape), before))
    module.__dict__["_rf_state"] = dataclasses.replace(module._rf_state, layouts=layouts)
    module._rf_refresh()


def restore(module: nn.Module, name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Give a weight the strides that it had, unless it has become another since."""
    try:
        weight = module.get_parameter(name)
    except AttributeError:
        return
    if tuple(weight.shape) == shape and weight.stride() != strides:
        data = weight.data
        _set_data(
            weight, torch.empty_strided(shape, strides, dtype=data.dtype, device=data.device).copy_(data)
        )  # fmt: skip


def _set_data(weight: Tensor, data: Tensor) -> None:
    if data is not weight.data:
        weight.data = data
