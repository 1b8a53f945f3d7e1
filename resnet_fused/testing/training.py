"""Training eager and fused side by side: what is kept for the gradient, and how a small network learns digits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused.ops.residual_block import RECOMPUTE
from resnet_fused.testing.eager import eager_copy
from resnet_fused.training.data import TensorImages, digits

CHOICES: tuple[str | None, ...] = (None, *RECOMPUTE)


def saved_bytes(model: Callable[..., Tensor], *inputs: Tensor, own: Iterable[Tensor] | None = None) -> int:
    """Bytes that one forward pass keeps for the backward pass, each storage once; parameters and buffers do not count.

    The output counts in any case, as what comes next keeps it. ``own`` are the parameters and buffers where ``model``
    is no module.
    """
    if own is None:
        assert isinstance(model, nn.Module)
        own = (*model.parameters(), *model.buffers())
    kept = {t.untyped_storage().data_ptr() for t in own}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    if not output.requires_grad:
        raise ValueError("model: no parameter requires a gradient")
    pack(output)
    return sum(found.values())


def small_digits() -> tuple[TensorImages, TensorImages]:
    """Handwritten digits ``[N, 3, 16, 16]``, as they are, to learn and to be tested on."""
    data = digits(16, 0, augment=False)
    assert isinstance(data.train, TensorImages) and isinstance(data.val, TensorImages)
    return data.train, data.val


class Run(NamedTuple):
    """How one model learnt: the loss of every step, accuracy on the test images, the running statistics."""

    losses: list[float]
    accuracy: float
    statistics: dict[str, Tensor]


def learn(
    model: nn.Module, train: TensorImages, test: TensorImages, epochs: int = 3, *, batch: int = 64, rate: float = 0.05
) -> Run:
    """Train ``model`` in place by SGD with momentum, the images in an order that is the same in every call."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    device = next(model.parameters()).device
    losses = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(train), generator=generator).split(batch):
            loss = F.cross_entropy(model(train.x[chosen].to(device)), train.y[chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    with torch.inference_mode():
        predicted = model(test.x.to(device)).argmax(1).cpu()
    accuracy = float((predicted == test.y).double().mean())
    return Run(losses, accuracy, {name: buffer.detach().cpu() for name, buffer in model.named_buffers()})


def twins(model: nn.Module, memory_format: Any = torch.channels_last) -> dict[str, nn.Module]:
    """Copies of ``model``: eager, fused, and fused with each ``recompute``; the same weights, in this format."""
    model = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
    fused = {
        f"fused, {choice}" if choice else "fused": resnet_fused.fuse(model, recompute=choice) for choice in CHOICES
    }
    return {"eager": eager_copy(model), **fused}
