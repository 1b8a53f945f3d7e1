"""A fused network trains as eager does: to the bit where the same kernels compute, whatever is recomputed."""

from __future__ import annotations

import pytest
import torch

import resnet_fused as rf
from resnet_fused.testing.training import Digits, Run, learn, twins


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Three epochs on handwritten digits from one seed."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = Digits.load()
    return {name: learn(model, data) for name, model in twins(rf.resnet20()).items()}


def test_the_digits_are_learnt(runs: dict[str, Run]) -> None:
    assert runs["eager"].accuracy > 0.9
    assert runs["eager"].losses[-1] < 0.2 * runs["eager"].losses[0]


@pytest.mark.parametrize("name", ["fused", "fused, activations", "fused, last_conv"])
def test_fused_learns_as_eager_does(runs: dict[str, Run], name: str) -> None:
    """On a CPU the kernels are eager's own, so nothing differs: a budget would leave room for a wrong step."""
    fused, eager = runs[name], runs["eager"]
    assert fused.losses == eager.losses
    assert abs(fused.accuracy - eager.accuracy) <= 0.005
    for key, value in eager.statistics.items():
        assert torch.equal(fused.statistics[key], value), key
