"""Set-up shared by all tests: every device that is present, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so it stands before every test

os.environ["RESNET_FUSED_TUNING"] = "0"  # no table of this machine decides what is tested

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: the cores are shared out among them
    os.environ["OMP_NUM_THREADS"] = "1"  # for those that it starts
    torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=500, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device in turn."""
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What computes on a CUDA device is skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _packs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Weights are packed at their first call, so that one call tests the kernels; where a test is of the waiting
    itself, ``pytest.mark.waits`` says so."""
    from resnet_fused.ops import packed

    if request.node.get_closest_marker("waits"):
        yield
        return
    with packed.at_once():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors this small more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
