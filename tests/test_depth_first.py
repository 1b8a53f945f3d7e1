"""Large batches through a whole network by sub-batches: the same result, and only where nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.modules import depth_first
from resnet_fused.testing.networks import randomise_norms


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes that the max-pool of the network is called with, sub-batches of two images each."""
    monkeypatch.setattr(depth_first, "BYTES", 2 * 3 * 64 * 16 * 16 * 4)
    return []


def network(calls: list[int]) -> rf.ResNet:
    class Pool(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape[0])
            return x

    model = randomise_norms(rf.ResNet(rf.FusedBasicBlock, [1, 1], num_classes=5, planes=(64, 64))).eval()
    model.maxpool = Pool()
    return model


def test_sub_batches_give_the_same(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(calls), torch.randn(5, 3, 32, 32)
    monkeypatch.setattr(depth_first, "_PER_IMAGE", (*depth_first._PER_IMAGE, type(model.maxpool)))
    with torch.no_grad():
        out = model(x)
        assert calls == [2, 2, 1]
        torch.testing.assert_close(out, torch.cat([model(image[None]) for image in x]), rtol=1e-5, atol=1e-5)
        x[3] = float("nan")
        assert model(x).isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("why", ["grad", "training", "hook", "unknown", "global_hook"])
def test_whole_batches_where_somebody_could_tell(why: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(calls), torch.randn(5, 3, 32, 32)
    if why != "unknown":
        monkeypatch.setattr(depth_first, "_PER_IMAGE", (*depth_first._PER_IMAGE, type(model.maxpool)))
    handle = None
    if why == "training":
        model.layer2.train()
    if why == "hook":
        model.layer1.register_forward_hook(lambda *_: None)
    if why == "global_hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with torch.set_grad_enabled(why == "grad"):
            model(x)
    finally:
        if handle is not None:
            handle.remove()
    assert calls == [5]


def test_clear_workspace_leaves_a_working_model() -> None:
    model, x = randomise_norms(rf.resnet20()).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        rf.clear_workspace()
        assert torch.equal(model(x), before)


def test_a_block_whose_convolutions_were_replaced_still_runs(calls: list[int]) -> None:
    model, x = network(calls), torch.randn(5, 3, 32, 32)
    block = model.layer1[0]
    block.conv1 = block.conv2 = nn.Identity()
    with torch.no_grad():
        out = model(x)
    assert out.isfinite().all() and calls == [5]
