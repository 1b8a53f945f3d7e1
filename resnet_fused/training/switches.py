"""PyTorch's process-wide switches, set while a body runs and put back after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Deterministic kernels alone, when ``wanted``; else cuDNN may try which is fastest."""
    fill: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fill.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        fill.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before[2:]


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and products without TF32."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul
