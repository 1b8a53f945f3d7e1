"""A launch of one of the compiled library's CUDA kernels as data, and the short way to repeat it: its plan, which the
binding has checked, goes to a C function that does nothing but launch (csrc/common/plans.h)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.packed import nhwc_weight

_PLAN_BYTES = 1024


class Launch(NamedTuple):
    """The plan holds the addresses of the tensors that ``others`` has and of those that the caller gave."""

    op: str
    plan: Tensor
    others: tuple[Tensor, ...]

    def bind(self) -> Callable[..., None]:
        """Launches on the CUDA stream of a handle, on the current device."""
        launch, plan = _function(self.op), self.plan
        address = plan.data_ptr()

        def bound(stream: int, values: Any = None, plan: Tensor = plan) -> None:
            error = launch(address, stream)
            if error is not None:
                raise RuntimeError(error.decode())

        return bound

    def tensors(self) -> list[Tensor]:
        """What it reads beside the tensors that the caller gave."""
        return list(self.others)


def new_plan() -> Tensor:
    """Room for a plan, which an op of the library writes."""
    return torch.zeros(_PLAN_BYTES, dtype=torch.uint8, device="cpu")


def laid_out(conv: ConvBN) -> ConvBN:
    """The convolution with its weight as the kernels read it.

    Raises:
        ValueError: a vector has gaps; calls that copy it are for such ones.
    """
    if any(v is not None and v.stride() != (1,) and v.numel() > 1 for v in conv[1:6]):
        raise ValueError("batch norm: got vectors with gaps, need them without")
    return conv._replace(weight=nhwc_weight(conv).permute(0, 3, 1, 2))


def read(convs: Iterable[ConvBN | None]) -> tuple[Tensor, ...]:
    """The tensors of convolutions."""
    return tuple(t for conv in convs if conv is not None for t in conv[:6] if t is not None)


@functools.cache
def _function(op: str) -> Callable[[int, int], bytes | None]:
    extension.module()
    found = getattr(ctypes.CDLL(extension.library_path()), f"resnet_fused_launch_{op}")
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_char_p
    return found  # type: ignore[no-any-return]
