"""What the backends keep packed from a module's tensors, in one place, so that modules can have it dropped."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resnet_fused.ops.tensor_cache import TensorCache

CACHES: list[TensorCache[Any]] = []


def drop(tensors: tuple[Tensor | None, ...]) -> None:
    """Forget, in every cache, what was packed from any of ``tensors``."""
    for cache in CACHES:
        cache.drop(tensors)
