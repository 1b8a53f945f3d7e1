"""Run a model once, so that everything made on first use exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.ops import packed


def warmup(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run ``model(*args, **kwargs)`` once, so that kernels are compiled, weights packed and memory allocated.

    Call it before capturing a CUDA graph, before timing, or before threads share the model, with an input of the shape
    and dtype to come. It records no gradient, and batch statistics and random generators do not change.
    Where the model is on a CUDA device it runs on a side stream of it, and the current stream waits for that.

    Equivalent to::

        with torch.no_grad():
            model(*args, **kwargs)      # and again, as weights are packed at the second call with them

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, need an nn.Module")
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with torch.random.fork_rng([d.index for d in devices]), _buffers_kept(model), contextlib.ExitStack() as stack:
        sides = []
        for device in devices:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            sides.append((side, torch.cuda.current_stream(device)))
            stack.enter_context(torch.cuda.stream(side))
        with torch.no_grad(), packed.at_once():
            model(*args, **kwargs)
        for side, current in sides:
            current.wait_stream(side)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give the buffers that training mode writes to their values back."""
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if module.training:
            kept += [(b, b.detach().clone()) for b in module._buffers.values() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
