"""torchvision beside a CPU-only torch, for tests and benchmarks."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Import torchvision, whose wheel from the package index asks at import for two ops that it may fail to load.

    Where they are missing their schemas are declared, so that the models work; the ops themselves stay absent.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(name + _NMS)
        _KEPT.append(library)
        return importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []  # the schemas go when their library is freed
