"""What calls launch by Triton compiles for compute capabilities 8.0, 9.0 and 10.0 without a GPU, and to good code."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.testing import triton_driver
from resnet_fused.testing.triton_compile import Compiled, Variant, variants
from resnet_fused.testing.triton_driver import Binary

pytest.importorskip("triton")
pytestmark = pytest.mark.minimum


def compile_by(*arguments: str) -> str:
    """What a process of its own prints: one in which Triton compiles, and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_config_spills_and_all_use_the_tensor_cores(capability: int) -> None:
    out = compile_by("-m", "resnet_fused.testing.triton_compile", "--quick", "--sm", str(capability))
    assert out.count(f"sm{capability}-bf16") > 2 * len(cfg.POINTER_HALF)
    assert out.count("conv_reduce") >= sum(config.split_k > 1 for config in cfg.POINTER_HALF)
    assert out.endswith("\n0 calls with faults\n")


def test_norm_kernels_do_not_spill_and_move_16_bytes_at_a_time() -> None:
    out = compile_by("-m", "resnet_fused.testing.triton_norm_compile", "--quick")
    assert out.count("-bf16-") == 3 * 6 * 4
    assert out.endswith("\n0 kernels with faults\n")


def test_every_shipped_config_is_compiled_somewhere() -> None:
    compiled = {(v.config, v.dtype) for v in variants(thorough=False)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert {(config, dtype) for config in cfg.shipped(dtype)} <= compiled


def test_the_first_convolutions_of_a_stage_are_compiled() -> None:
    """1x1 and 3x3 with a stride of 2, by descriptors where there are some, in half precision and in single."""
    for thorough, dtypes in ((False, [torch.bfloat16]), (True, [torch.bfloat16, torch.float16, torch.float32])):
        compiled = {(v.config, v.dtype, v.capability, v.shape) for v in variants(thorough=thorough)}
        for dtype in dtypes:
            for capability in (90, 100):
                arch = cfg.Architecture(capability, 1, cfg.shared_limit(capability))
                for config in cfg.shipped(dtype):
                    if config.kernel == "descriptor" and cfg.fits(config, dtype, arch):
                        assert {(config, dtype, capability, shape) for shape in ("1x1s2", "3x3s2")} <= compiled


LAUNCH = """
import torch
from resnet_fused.ops.conv_bn_act import triton
from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.testing.triton_compile import Variant, compile_variant
from resnet_fused.testing.triton_driver import launches

variant = Variant(cfg.DESCRIPTOR_HALF[1], torch.bfloat16, "tf32", "1x1s2", 90)
good = compile_variant(variant)
print([kernel.name for kernel in good.kernels], good.faults())
other = variant._replace(config=cfg.POINTER_HALF[0])
with launches(80, shared_limit=40_000):
    try:
        triton.run(other.call(), other.config)
    except Exception as error:
        print(type(error).__name__, error)
wrong = compile_variant(variant._replace(config=variant.config._replace(block_m=96)))
print(wrong.kernels, wrong.faults())
"""


def test_a_launch_says_what_a_users_would() -> None:
    """It launches the kernels that the call takes; it refuses what the device has not, and what is not shipped."""
    good, too_large, wrong = compile_by("-c", LAUNCH).splitlines()
    assert good == "['conv_descriptor'] []"
    assert "OutOfResources" in too_large and "shared memory" in too_large
    assert wrong.startswith("() ['ValueError: config: got descriptor-96x128x64")


def test_faults_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(cfg.DESCRIPTOR_HALF[1], torch.bfloat16, "tf32", "3x3", 90)
    kernel = Binary("conv_descriptor", 90, 128, 100_000, 0, 0, "wgmma.mma_async cp.async.bulk.tensor")

    def faults(**changes: object) -> list[str]:
        return Compiled(variant, (replace(kernel, **changes),)).faults()  # type: ignore[arg-type]

    assert faults() == []
    assert faults(spills=2) == ["2 spills"]
    assert faults(shared=232449) == ["232449 bytes of shared memory, the architecture has 232448"]
    assert faults(ptx="") == ["no wgmma.mma_async", "no cp.async.bulk.tensor"]
    assert Compiled(variant._replace(capability=100), (kernel,)).faults() == ["no tcgen05.mma"]
    assert Compiled(variant, (), "CompilationError: R0").faults() == ["CompilationError: R0"]


def test_stack_is_budgeted_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    kernel = Binary("conv_pointer", 90, 128, 0, 8, 0)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert kernel.faults() == [] and replace(kernel, stack=16).faults() == ["16 bytes of stack"]
    assert replace(kernel, spills=1).faults() == ["1 spills"]
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert triton_driver.stack_budget() == 0 and kernel.faults() == ["8 bytes of stack"]
