"""Every shipped Triton config compiles for compute capabilities 8.0, 9.0 and 10.0 without a GPU, and to good code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from resnet_fused.ops.conv_bn_act import triton_config as cfg
from resnet_fused.testing.triton_compile import Compiled, Variant, variants

pytest.importorskip("triton")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_config_spills_and_all_use_the_tensor_cores(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "resnet_fused.testing.triton_compile", "--quick"]
    result = subprocess.run([*command, "--sm", str(capability)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert result.stdout.count(f"sm{capability}-bf16") > 2 * len(cfg.POINTER_HALF)
    assert result.stdout.endswith("\n0 kernels with faults\n")


def test_norm_kernels_do_not_spill_and_move_16_bytes_at_a_time() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "resnet_fused.testing.triton_norm_compile", "--quick"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert result.stdout.count("-bf16-") == 3 * 5 * 3 * 2
    assert result.stdout.endswith("\n0 kernels with faults\n")


def test_every_shipped_config_is_compiled_somewhere() -> None:
    compiled = {(v.config, v.dtype) for v in variants(thorough=False)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert {(config, dtype) for config in cfg.shipped(dtype)} <= compiled


def test_faults_are_named() -> None:
    variant = Variant(cfg.DESCRIPTOR_HALF[1], torch.bfloat16, "tf32", "3x3", 90)
    good = Compiled(variant, 128, 100_000, 0, 0, 8, 0, 0, 8)
    assert good.faults() == []
    assert good._replace(stack=8).faults() == ["8 bytes of stack, 0 of local memory"]
    assert good._replace(shared=232449).faults() == ["232449 bytes of shared memory, the architecture has 232448"]
    assert good._replace(wgmma=0, tma=0).faults() == ["no wgmma", "no TMA load or store"]
    assert good._replace(variant=variant._replace(capability=100)).faults() == ["no tcgen05.mma"]
