"""``fuse`` says once that it will not be faster here, and why."""

from __future__ import annotations

import warnings

import pytest
import torch

import resnet_fused as rf
from resnet_fused import backends


def fuse_quietly(**options: str) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rf.fuse(torch.nn.Sequential(rf.FusedBasicBlock(8, 8)), **options)
    return [warning for warning in caught if issubclass(warning.category, rf.PerformanceWarning)]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_WARNED", set())
    monkeypatch.setattr(backends, "unavailable", lambda name: f"no {name} today")


def test_it_warns_once_and_points_at_the_caller(without: None) -> None:
    (warning,) = fuse_quietly()
    assert "cpu: no cpu today" in str(warning.message) and warning.filename == __file__
    assert fuse_quietly() == []


def test_a_named_backend_is_a_wish(without: None) -> None:
    assert fuse_quietly(backend="reference") == []


def test_kernels_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_WARNED", set())
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    assert fuse_quietly() == []


@pytest.mark.parametrize("here", [None, "cuda", "triton"])
def test_one_kind_of_kernel_is_enough_on_a_gpu(here: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_WARNED", set())
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name == here else "not today")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backends.warn_without_kernels(torch.device("cuda"))
    assert len(caught) == (here is None)


def test_as_an_error_it_leaves_the_model_alone(without: None) -> None:
    model = torch.nn.Sequential(rf.FusedBasicBlock(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rf.PerformanceWarning)
        for _ in range(2):
            with pytest.raises(rf.PerformanceWarning):
                rf.fuse_(model)
