"""Plans through Triton's own launcher, up to a stand-in for the CUDA driver; and the tool that times the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optional
import pytest

pytest.importorskip("triton", reason="triton is not installed")
optional.needs("torchvision")
ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.minimum
def test_plans_launch_what_the_ordinary_path_launches():
    """Byte for byte what the driver is given, in the same order, with nothing of aten between; ResNet-18 and -50."""
    said = run("tests/stand_in_launches.py").splitlines()
    assert len(said) == 8 and said[-1] == "streams: 2", said
    assert all(line.endswith("launches") for line in said[:-1])


def test_the_host_time_of_a_forward_is_measured():
    said = run("tools/host_time.py", "--model", "resnet18", "--size", "64", "--repeats", "1", "--rounds", "1")
    assert "launches" in said and "fused, plan and guard" in said and "eager, no kernels" in said
