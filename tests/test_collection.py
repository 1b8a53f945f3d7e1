"""The suite is collected, and its tests say what they lack, on a machine without the optional packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PEERS = ("ray", "openvino", "monai", "open_clip", "segmentation_models_pytorch")
OPTIONAL = (
    *PEERS,
    *("onnx", "onnxruntime", "onnxscript", "onnx_ir", "matplotlib", "sklearn", "timm", "transformers", "torchvision"),
    *("pandas", "PIL", "safetensors", "pytest_benchmark", "triton", "pybind11", "resnet_fused._C"),
)
RUN = """
import importlib.machinery, sys, pytest
gone = set(sys.argv[1].split(","))
find = importlib.machinery.PathFinder.find_spec
def absent(name, path=None, target=None):
    return None if name in gone or name.partition(".")[0] in gone else find(name, path, target)
importlib.machinery.PathFinder.find_spec = absent
sys.exit(pytest.main(["-p", "no:cacheprovider", "-q", *sys.argv[2:]]))
"""


def without(packages: tuple[str, ...], *arguments: str) -> str:
    """What pytest prints where these packages are not installed; it must succeed."""
    command = [sys.executable, "-c", RUN, ",".join(packages), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("packages", [PEERS, OPTIONAL], ids=["peers", "everything"])
def test_nothing_fails_to_collect(packages: tuple[str, ...]) -> None:
    told = without(packages, "--collect-only", "tests")
    assert "error" not in told.lower().rpartition("tests/test_ways.py")[2]
    if packages == PEERS:
        assert "SKIPPED" not in told, "no module as a whole needs these"
        assert "tests/test_recipes.py: " in told


def test_a_test_says_which_package_it_lacks() -> None:
    """Of the recipes those with Ray alone are skipped, of the families those whose package is gone."""
    tests = ("tests/test_recipes.py::test_an_actor_fuses_one_model_and_warms_it_up_once",
             "tests/test_recipes.py::test_an_empty_folder_is_named", "tests/test_families.py::test_open_clip",
             "tests/test_recipes.py::test_what_cannot_be_loaded_says_why")  # fmt: skip
    told = without(PEERS, "-n", "0", *tests)
    assert told.startswith("sss.")
    for package in ("ray", "open_clip"):
        assert f"{package} not installed" in told or f"{package} is not installed" in told
