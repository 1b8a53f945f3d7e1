"""A fused network trains as eager does: to the bit where the same kernels compute, whatever is recomputed."""

from __future__ import annotations

import optional
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused.testing.networks import randomise_norms
from resnet_fused.testing.training import Run, learn, small_digits, twins

torchvision = optional.torchvision()
tv = torchvision.models.resnet
RECOMPUTE = [None, "activations", "last_conv"]


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Three epochs on handwritten digits from one seed."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = small_digits()
    return {name: learn(model, *data) for name, model in twins(rf.resnet20()).items()}


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


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one step."""
    loss = model(x).square().mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **dict(model.named_buffers())}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """In float64, where nothing but the maths can differ."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_fine_tuning_as_detectors_do(recompute: str | None) -> None:
    """Frozen statistics everywhere in a training model, stem and first stage without gradients."""
    frozen = torchvision.ops.FrozenBatchNorm2d
    model = randomise_norms(tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], norm_layer=frozen, num_classes=4)).double().train()
    for part in (model.conv1, model.layer1):
        part.requires_grad_(False)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    fused = rf.fuse(model, recompute=recompute)
    ours, theirs = gradients(fused, x), gradients(model, x)
    close(ours, theirs)
    assert "layer2.0.conv1.weight" in ours and "layer1.0.conv1.weight" not in ours


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_frozen_and_trained_stages(recompute: str | None) -> None:
    """Eval-mode stages inside a training model: their statistics stay, their weights learn, gradients pass through."""
    model = randomise_norms(tv.ResNet(tv.BasicBlock, [1, 2, 1, 1], num_classes=4)).double().train()
    model.bn1.eval(), model.layer1.eval(), model.layer3.eval()
    model.layer2[1].bn1.eval()
    x = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fused = rf.fuse(model, recompute=recompute)
    ours = gradients(fused, x)
    close(ours, gradients(model, x))
    still = {name for name, value in before.items() if torch.equal(value, ours[name])}
    assert {"bn1.running_mean", "layer3.0.bn2.running_var", "layer2.1.bn1.running_mean"} <= still
    assert not {"layer2.0.bn1.running_mean", "layer4.0.bn2.running_var"} & still


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool, recompute: str | None) -> None:
    """torch.utils.checkpoint runs the block twice, and moves its running statistics twice, fused or not."""
    model = nn.Sequential(*[randomise_norms(tv.BasicBlock(8, 8)) for _ in range(2)]).double().train()

    class Checkpointed(nn.Module):
        def __init__(self, blocks: nn.Sequential) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    fused = rf.fuse(Checkpointed(model), recompute=recompute)
    ours, x_grad = gradients(fused, x), x.grad
    x.grad = None
    close(ours, gradients(Checkpointed(model), x))
    torch.testing.assert_close(x_grad, x.grad)
    assert ours["blocks.0.bn1.num_batches_tracked"] == 2
