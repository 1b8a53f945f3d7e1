"""Everything that converts, copies or replaces a model's tensors and modules; adds to ``ways_of_writing.WAYS``."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from small_networks import blocks_of, convs_of, norms_of
from torch import nn
from twins import Side
from ways_of_writing import WAYS, data_copy, moved, one_vector, owners, tensors, way

import resnet_fused as rf

__all__ = ["WAYS"]

# Converted and moved.


@way
def bfloat16(side: Side) -> None:
    side.model.bfloat16()


@way
def float32(side: Side) -> None:
    side.model.float()


@way
def float64(side: Side) -> None:
    side.model.double()


@way
def half_and_back(side: Side) -> None:
    dtype = next(side.model.parameters()).dtype
    side.model.half().to(dtype)


@way
def convolutions_to_bfloat16_and_back(side: Side) -> None:
    for conv in convs_of(side.model):
        dtype = conv.weight.dtype
        conv.bfloat16().to(dtype)


@way
def memory_format(side: Side) -> None:
    side.model.to(memory_format=side.pick([torch.channels_last, torch.contiguous_format]))


@way
def converted_swapping(side: Side) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        dtype = next(side.model.parameters()).dtype
        side.model.to(torch.bfloat16).to(dtype)
        for conv in convs_of(side.model):
            conv.double().to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Other tensors in place of these.


@way
def swapped(side: Side) -> None:
    for _, _, p in owners(side.model):
        torch.utils.swap_tensors(p, nn.Parameter(moved(p), p.requires_grad))


@way
def new_parameters(side: Side) -> None:
    for module, name, p in owners(side.model):
        setattr(module, name, nn.Parameter(moved(p), p.requires_grad))


@way
def registered_anew(side: Side) -> None:
    for module, name, p in owners(side.model):
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(moved(p), p.requires_grad))


@way
def new_statistics(side: Side) -> None:
    for norm in norms_of(side.model):
        norm.running_mean, norm.running_var = moved(norm.running_mean), moved(norm.running_var)


@way
def statistics_reset(side: Side) -> None:
    norm = side.pick(norms_of(side.model))
    norm.reset_running_stats()
    norm.running_var.mul_(1.5)


@way
def affine_reset(side: Side) -> None:
    side.pick(norms_of(side.model)).reset_parameters()


# Copies, and what the package itself offers.


@way
def deepcopied(side: Side) -> None:
    """The copy is another model: what is written to the first must not reach it."""
    first, side.model = side.model, copy.deepcopy(side.model)
    data_copy(Side(first))
    side.aliases.clear()
    side.kept.append(first)


@way
def pickled(side: Side) -> None:
    side.model = pickle.loads(pickle.dumps(side.model))
    side.aliases.clear()


@way
def saved_whole(side: Side) -> None:
    file = io.BytesIO()
    torch.save(side.model, file)
    file.seek(0)
    side.model = torch.load(file, weights_only=False)
    side.aliases.clear()


@way
def unfused_and_fused_again(side: Side) -> None:
    if rf.is_fused(side.model):
        rf.unfuse(side.model, inplace=True)
        assert not rf.is_fused(side.model)
        rf.fuse_(side.model)


@way
def looked_after(side: Side) -> None:
    rf.refresh(side.model)
    assert rf.report(side.model) is not None
    rf.warmup(side.model, torch.zeros(1, 3, 8, 8, dtype=side.model.conv1.weight.dtype))
    for t in tensors(side.model):
        t.data.copy_(moved(t))


@way
def memory_cleared(side: Side) -> None:
    rf.clear_workspace()
    for t in tensors(side.model):
        t.data.copy_(moved(t))


@way
@torch.no_grad()
def blocks_exchanged(side: Side) -> None:
    """The tensors of two norms change places."""
    block = side.pick(blocks_of(side.model))
    one, other = block.bn1, block.bn2
    if one.num_features == other.num_features:
        one.weight, other.weight = other.weight, one.weight
        one.running_mean, other.running_mean = other.running_mean, one.running_mean
        one.running_var, other.running_var = other.running_var, one.running_var
    else:
        one_vector(side)
