"""Packages that a machine may lack: the tests that need one are skipped there and say so; nothing fails to collect."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from resnet_fused import extension
from resnet_fused.testing.torchvision_compat import import_torchvision


def missing(*packages: str) -> list[str]:
    """Those of the packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def needs(*packages: str) -> None:
    """Skip this test, or the module that is being collected, where one of the packages is not installed."""
    absent = missing(*packages)
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed", allow_module_level=True)


def needs_the_library(cuda: bool = False) -> None:
    """The same for the compiled library, or its CUDA kernels."""
    reason = extension.missing(cuda=cuda)
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)


def torchvision() -> ModuleType:
    """torchvision for a module whose tests all need it."""
    needs("torchvision")
    return import_torchvision()
