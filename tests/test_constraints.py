"""The two ends of the range of versions: what pyproject.toml admits is what make check-minimum runs with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / name).read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-minimum.txt"])
def test_no_install_chooses_a_torch_of_its_own(name: str) -> None:
    assert {"torch", "torchvision", "triton"} <= set(pinned(name))


def test_the_minimum_is_what_is_admitted() -> None:
    admitted = dict(re.findall(r'"(torch|torchvision|triton)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    minimum = {k: v.removesuffix(".0") for k, v in pinned("constraints-minimum.txt").items()}
    assert admitted == minimum


def test_every_install_of_the_makefile_is_bound() -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.findall(r"pip install[^\n]*", text) == ["pip install --quiet -c $(CONSTRAINTS)"]
