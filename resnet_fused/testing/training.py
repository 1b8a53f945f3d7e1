"""Training eager and fused side by side: what is kept for the gradient, and how a small network learns digits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused.ops.residual_block import RECOMPUTE
from resnet_fused.testing.eager import eager_copy

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
        raise ValueError("model: nothing in it wants a gradient")
    pack(output)
    return sum(found.values())


class Digits(NamedTuple):
    """scikit-learn's handwritten digits, ``[N, 3, 16, 16]`` in float32, a fifth of each digit held out."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, seed: int = 0) -> Digits:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
        train, test, train_y, test_y = map(torch.from_numpy, parts)

        def image(flat: Tensor) -> Tensor:
            x = F.interpolate(flat.float().view(-1, 1, 8, 8), scale_factor=2, mode="bilinear", align_corners=False)
            return ((x - 4.9) / 5.2).repeat(1, 3, 1, 1)  # mean and deviation of the data set

        return cls(image(train), train_y, image(test), test_y)


class Run(NamedTuple):
    """How one model learnt: the loss of every step, accuracy on the held-out digits, the running statistics."""

    losses: list[float]
    accuracy: float
    statistics: dict[str, Tensor]


def learn(model: nn.Module, digits: Digits, epochs: int = 3, *, batch: int = 64, rate: float = 0.05) -> Run:
    """Train ``model`` in place by SGD with momentum, the digits in an order that is the same in every call."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    device = next(model.parameters()).device
    losses = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.train_y), generator=generator).split(batch):
            loss = F.cross_entropy(model(digits.train_x[chosen].to(device)), digits.train_y[chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    with torch.inference_mode():
        predicted = model(digits.test_x.to(device)).argmax(1).cpu()
    accuracy = float((predicted == digits.test_y).double().mean())
    return Run(losses, accuracy, {name: buffer.detach().cpu() for name, buffer in model.named_buffers()})


def twins(model: nn.Module, memory_format: Any = torch.channels_last) -> dict[str, nn.Module]:
    """Copies of ``model``: eager, fused, and fused with each ``recompute``; all with the same weights and strides."""
    fused = {
        f"fused, {choice}" if choice else "fused": resnet_fused.fuse(
            model, recompute=choice, memory_format=memory_format
        )
        for choice in CHOICES
    }  # fmt: skip
    return {"eager": eager_copy(model, like=fused["fused"]), **fused}
