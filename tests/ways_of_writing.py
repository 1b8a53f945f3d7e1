"""Everything that writes, replaces or moves a model's tensors between two predictions.

``WAYS`` maps a name to a function of one twin (``twins.Side``). All draw alike on both twins. Ways that PyTorch counts
no version for write whole tensors, and change every element that is not zero.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator

import torch
from small_networks import convs_of, norms_of
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn
from twins import Side, Way

WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    WAYS[function.__name__] = function
    return function


def moved(tensor: Tensor) -> Tensor:
    """Other values in the same strides, every one of them; they stay of the size that they have."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    with torch.no_grad():
        factor = 0.8 if float(tensor.detach().float().abs().max()) > 0.5 else 1.25
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return new.copy_(tensor.detach() * factor)


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and running statistics."""
    yield from model.parameters()
    yield from (b for b in model.buffers() if b.is_floating_point())


def owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            yield module, name, parameter


# Written in place, in ways that PyTorch counts.


@way
@torch.no_grad()
def in_place(side: Side) -> None:
    for t in tensors(side.model):
        t.copy_(moved(t))


@way
@torch.no_grad()
def foreach_mul(side: Side) -> None:
    torch._foreach_mul_(list(side.model.parameters()), 0.8)


@way
@torch.no_grad()
def foreach_lerp(side: Side) -> None:
    ps = list(side.model.parameters())
    torch._foreach_lerp_(ps, [moved(p) for p in ps], 0.5)


@way
@torch.no_grad()
def foreach_copy(side: Side) -> None:
    ts = list(tensors(side.model))
    torch._foreach_copy_(ts, [moved(t) for t in ts])


@way
def in_inference_mode(side: Side) -> None:
    with torch.inference_mode():
        for t in tensors(side.model):
            t.copy_(moved(t))


@way
def detached(side: Side) -> None:
    for p in side.model.parameters():
        p.detach().mul_(0.8 if float(p.abs().max()) > 0.5 else 1.25)


@way
@torch.no_grad()
def one_weight(side: Side) -> None:
    weight = side.pick(convs_of(side.model)).weight
    weight[side.below(weight.shape[0]), side.below(weight.shape[1])] += 1


@way
@torch.no_grad()
def one_number_of_a_norm(side: Side) -> None:
    norm = side.pick(norms_of(side.model))
    vectors = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    side.pick(vectors)[side.below(norm.num_features)] += 1


@way
@torch.no_grad()
def one_vector(side: Side) -> None:
    norm = side.pick(norms_of(side.model))
    t = side.pick([t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None])
    t.copy_(moved(t))


# Written in ways that leave no trace.


@way
def data_copy(side: Side) -> None:
    for t in tensors(side.model):
        t.data.copy_(moved(t))


@way
def data_mul(side: Side) -> None:
    for t in tensors(side.model):
        t.data.mul_(0.8 if float(t.detach().abs().max()) > 0.5 else 1.25)


@way
def data_of_a_norm(side: Side) -> None:
    norm = side.pick(norms_of(side.model))
    t = side.pick([t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None])
    t.data.copy_(moved(t))


@way
def data_of_a_convolution(side: Side) -> None:
    weight = side.pick(convs_of(side.model)).weight
    weight.data.copy_(moved(weight))


@way
def data_assigned(side: Side) -> None:
    """The allocator may give the old address back."""
    for t in tensors(side.model):
        new = moved(t)
        t.data = torch.empty(0, dtype=t.dtype)
        t.data = new


@way
def data_assigned_twice(side: Side) -> None:
    for t in tensors(side.model):
        shape, dtype, new = t.shape, t.dtype, moved(t).tolist()
        t.data = torch.empty(0, dtype=dtype)
        t.data = torch.tensor(new, dtype=dtype).view(shape)


@way
def numpy_views(side: Side) -> None:
    for t in tensors(side.model):
        new, old = moved(t), t.detach()
        if t.dtype == torch.bfloat16:  # NumPy has none
            new, old = new.view(torch.int16), old.view(torch.int16)
        old.numpy()[...] = new.numpy()


@way
def storages(side: Side) -> None:
    for t in tensors(side.model):
        if t.untyped_storage().nbytes() == t.numel() * t.element_size():
            t.untyped_storage().copy_(moved(t).untyped_storage())
        else:
            t.data.copy_(moved(t))


@way
@torch.no_grad()
def set_tensor(side: Side) -> None:
    for t in tensors(side.model):
        t.set_(moved(t))


@way
@torch.no_grad()
def set_storage(side: Side) -> None:
    for t in tensors(side.model):
        t.set_(moved(t).untyped_storage(), 0, t.shape, t.stride())


@way
def from_vector(side: Side) -> None:
    """Each parameter's data becomes a view of the vector, which is kept as an alias."""
    flat = moved(parameters_to_vector(side.model.parameters()))
    vector_to_parameters(flat, side.model.parameters())
    side.aliases["vector"] = flat


@way
def flat_buffer(side: Side) -> None:
    """As distributed optimizers do."""
    ts = list(tensors(side.model))
    flat, at = torch.empty(sum(t.numel() for t in ts), dtype=ts[0].dtype), 0
    for t in ts:
        view = flat[at : at + t.numel()].view(t.shape)
        t.data, at = view.copy_(moved(t)), at + t.numel()
    side.aliases["flat"] = flat


@way
def mapped_file(side: Side) -> None:
    """Weights in a file that is mapped twice."""
    with tempfile.TemporaryDirectory() as folder:
        for at, (name, t) in enumerate([*side.model.named_parameters(), *side.model.named_buffers()]):
            if t.is_floating_point():
                path = os.path.join(folder, str(at))
                maps = [torch.from_file(path, True, t.numel(), dtype=t.dtype) for _ in range(2)]
                t.data = maps[0].view(t.shape).copy_(moved(t))
                side.aliases[name] = maps[1]


@way
def shared_memory(side: Side) -> None:
    """As between processes; the second mapping stands for another process."""
    for name, t in [*side.model.named_parameters(), *side.model.named_buffers()]:
        if t.is_floating_point():
            t.data = moved(t)
            storage = t.share_memory_().untyped_storage()
            descriptor, size = storage._share_fd_cpu_()
            second = torch.UntypedStorage._new_shared_fd_cpu(os.dup(descriptor), size)
            side.aliases[name] = torch.empty(0, dtype=t.dtype).set_(second)[: t.numel()]


@way
def through_the_aliases(side: Side) -> None:
    """A write by another mapping, or by the flat tensor that parameters are views of."""
    if not side.aliases:
        (mapped_file if side.below(2) else flat_buffer)(side)
    for alias in side.aliases.values():
        alias.copy_(moved(alias))


# Loading.


def _state(side: Side) -> dict[str, Tensor]:
    return {k: moved(v).contiguous() for k, v in side.model.state_dict().items()}


@way
def load(side: Side) -> None:
    side.model.load_state_dict(_state(side))


@way
def load_assigned(side: Side) -> None:
    side.model.load_state_dict(_state(side), assign=True)


@way
def load_parts(side: Side) -> None:
    wanted = side.pick(["conv", "bn", "running", "bias", "layer1"])
    side.model.load_state_dict({k: v for k, v in _state(side).items() if wanted in k}, strict=False)


@way
def load_child_by_child(side: Side) -> None:
    assign = bool(side.below(2))
    for child in side.model.modules():
        if not list(child.children()):
            child.load_state_dict({k: moved(v) for k, v in child.state_dict().items()}, assign=assign)


@way
def load_one_child(side: Side) -> None:
    child = side.pick([*convs_of(side.model), *norms_of(side.model)])
    child.load_state_dict({k: moved(v) for k, v in child.state_dict().items()}, assign=bool(side.below(2)))


@way
def load_channels_last(side: Side) -> None:
    state = _state(side)
    side.model.to(memory_format=torch.channels_last).load_state_dict(state)


@way
def load_in_inference_mode(side: Side) -> None:
    with torch.inference_mode():
        side.model.load_state_dict(_state(side))


@way
def load_assigned_in_inference_mode(side: Side) -> None:
    with torch.inference_mode():
        side.model.load_state_dict(_state(side), assign=True)


@way
def load_assigned_in_inference_mode_and_moved(side: Side) -> None:
    """Parameters that count no versions though they are no inference tensors: their data is another's since."""
    load_assigned_in_inference_mode(side)
    side.model.to(memory_format=torch.channels_last)
    for t in tensors(side.model):
        t.data = moved(t)


@way
def load_mapped(side: Side) -> None:
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(_state(side), file.name)
        side.model.load_state_dict(torch.load(file.name, mmap=True, weights_only=True), assign=True)


@way
def load_swapping(side: Side) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        side.model.load_state_dict(_state(side))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Averages.


def _averaged(side: Side, rule: Callable[..., object]) -> AveragedModel:
    averaged = AveragedModel(side.model, multi_avg_fn=rule, use_buffers=True)
    averaged.update_parameters(side.model)
    for t in tensors(side.model):
        t.data.copy_(moved(t))
    averaged.update_parameters(side.model)
    return averaged


@way
def ema(side: Side) -> None:
    """From then on the average is the model."""
    side.model = _averaged(side, get_ema_multi_avg_fn(0.5)).module


@way
def swa_with_update_bn(side: Side) -> None:
    averaged = _averaged(side, get_swa_multi_avg_fn())
    dtype = next(side.model.parameters()).dtype
    batches = [torch.randn(4, 3, 8, 8, generator=side.random).to(dtype) for _ in range(2)]
    update_bn(batches, averaged)
    side.model = averaged.module


@way
@torch.no_grad()
def average_by_hand(side: Side) -> None:
    shadow = copy.deepcopy(side.model)
    for ours, theirs in zip(tensors(shadow), tensors(side.model), strict=True):
        ours.lerp_(moved(theirs), 0.5)
    for ours, theirs in zip(tensors(side.model), tensors(shadow), strict=True):
        ours.data, theirs.data = theirs.data, ours.data


@way
@torch.no_grad()
def norms_recalibrated(side: Side) -> None:
    """The norms alone in training mode: batch norm's own kernel counts no version for what it writes."""
    norms = norms_of(side.model)
    before = [n.training for n in norms]
    for n in norms:
        n.train()
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8, generator=side.random) * 1.5 + 0.7
        side.model(x.to(side.model.conv1.weight.dtype))
    for n, training in zip(norms, before, strict=True):
        n.train(training)


@way
@torch.no_grad()
def one_norm_recalibrated(side: Side) -> None:
    norm = side.pick(norms_of(side.model))
    norm.train()
    x = torch.randn(4, 3, 8, 8, generator=side.random) * 1.5 + 0.7
    side.model(x.to(side.model.conv1.weight.dtype))
    norm.eval()


@way
@torch.no_grad()
def norms_called_by_themselves(side: Side) -> None:
    """The model is not called at all: what the norms see comes from elsewhere."""
    for norm in norms_of(side.model):
        x = torch.randn(4, norm.num_features, 4, 4, generator=side.random) * 1.5 + 0.7
        weight, bias = norm.weight, norm.bias
        torch.nn.functional.batch_norm(
            x.to(norm.running_mean.dtype), norm.running_mean, norm.running_var, weight, bias, True, 0.5
        )  # fmt: skip
