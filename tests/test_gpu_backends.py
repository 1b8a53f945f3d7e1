"""With a CUDA device every backend for it must be there and must serve: no test may take its refusal for a pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import devices
import pytest
import torch

from resnet_fused import backends, extension
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.testing.cases import CONV_CASES, ConvCase

ROOT = Path(__file__).parents[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", devices.BACKENDS)
def test_every_backend_of_a_cuda_device_is_available(name: str) -> None:
    assert backends.unavailable(name) is None


@pytest.mark.gpu
def test_they_serve_a_residual_block_s_convolution() -> None:
    call = ConvCase(2, 64, 14, 14, 64, kernel=3, padding=1, residual=True).make(torch.bfloat16, "cuda")
    assert devices.able("conv_bn_act", call) == ["reference", "cudnn", "triton", "cuda"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch as it is with a device, cuDNN and a compiled library whose CUDA kernels a test may take away."""
    library = SimpleNamespace(reason=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(extension, "missing", lambda cuda=False: library.reason)
    monkeypatch.setattr(devices, "HERE", True)
    backends._unavailable.cache_clear()
    yield library
    backends._unavailable.cache_clear()


def test_a_library_without_cuda_kernels_is_a_failure_where_a_device_is(device: Any) -> None:
    devices.assert_all_here()
    device.reason = "the compiled library was built without CUDA kernels: no nvcc"
    backends._unavailable.cache_clear()
    with pytest.raises(AssertionError, match=r"a CUDA device is here.*'cuda': 'the compiled library was built without"):
        devices.assert_all_here()


def test_a_missing_triton_is_a_failure_where_a_device_is(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="'triton': 'the triton package is not installed"):
        devices.assert_all_here()


@pytest.mark.parametrize("backend", devices.BACKENDS)
def test_a_refusal_on_a_device_is_no_pass(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors say that they are on one; the backend says no to everything."""
    monkeypatch.setattr(devices, "HERE", True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(backends, "refusal", lambda op, name, call: "not today")
    plain = ConvCase(2, 16, 9, 11, 16, kernel=3, padding=1, residual=True)
    with pytest.raises(AssertionError, match=f"{backend} refuses on a CUDA device: not today"):
        devices.refused("conv_bn_act", backend, plain.make(torch.float16))
    assert devices.refused("conv_bn_act", backend, plain.make(torch.float64)), "none of them computes it"
    others = [case for case in CONV_CASES if case.act == "none" or case.groups > 1 or case.c % 8]
    for case in others:
        if backend == "cudnn":
            assert devices.refused("conv_bn_act", backend, case.make(torch.float16))
        else:
            with pytest.raises(AssertionError, match="refuses on a CUDA device"):
                devices.refused("conv_bn_act", backend, case.make(torch.float16))
    sum_of_two = AddReLUCall(torch.randn(3, 4), torch.randn(3, 4))
    if backend == "cudnn":
        assert devices.refused("add_relu", backend, sum_of_two), "it has no such op"
    else:
        with pytest.raises(AssertionError, match="refuses on a CUDA device"):
            devices.refused("add_relu", backend, sum_of_two)
    monkeypatch.undo()
    assert devices.HERE or devices.refused("conv_bn_act", backend, plain.make(torch.float64))


COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: {present}
class Names:
    def pytest_collection_finish(self, session):
        print("names", *sorted({{item.location[0] + ":" + item.name for item in session.items}}), sep="\\n")
sys.exit(pytest.main(["-p", "no:cacheprovider", "-q", "--collect-only", "-m", "gpu", {files}], plugins=[Names()]))
"""
FILES = ("test_add_relu.py", "test_conv_bn_act.py", "test_batch_norm_act.py", "test_triton_interpret.py",
         "test_ways.py", "test_launch.py", "test_bottleneck_cuda.py", "test_gpu_backends.py")  # fmt: skip


def collected(present: bool) -> set[str]:
    files = ", ".join(repr(f"tests/{name}") for name in FILES)
    program = COLLECT.format(present=present, files=files)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(done.stdout.partition("names\n")[2].splitlines())


def test_the_mark_is_on_what_computes_on_a_device() -> None:
    """Collected as on a machine with a device and as without: kernels that the interpreter runs are in the first."""
    here, away = collected(True), collected(False)
    for name in (
        "test_add_relu.py:test_specials_pass[cuda-nan]",
        "test_ways.py:test_cuda_graph_after_warmup",
        "test_launch.py:test_a_side_stream_is_waited_for[auto]",
        "test_gpu_backends.py:test_every_backend_of_a_cuda_device_is_available[triton]",
    ):
        assert f"tests/{name}" in here and f"tests/{name}" in away
    assert not [name for name in here | away if "[cpu-" in name or "[reference" in name]
    interpreted = {name for name in here if "test_triton_interpret" in name}
    assert interpreted and not interpreted & away
    assert any("test_numbers_on_a_gpu" in name for name in away)
    assert any("by_every_backend[cuda-" in name for name in away)
