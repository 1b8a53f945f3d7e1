"""Counts against hand computation, and the figures that the kernel plan rests on."""

from __future__ import annotations

import optional
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import functional, roofline
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.roofline import norm

H200, BF16 = roofline.H200, torch.bfloat16


class Block(nn.Module):
    """4 → 2 → 6 channels with a projection, stride 2: few enough numbers to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.conv2 = nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.proj = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.proj(x)
        return F.relu(y)


X, MID, OUT = 3 * 4 * 8 * 8, 3 * 2 * 8 * 8, 3 * 6 * 4 * 4  # elements at batch 3
FLOPS = {"conv1": 2 * 4 * MID, "conv2": 2 * 2 * 9 * OUT, "proj.0": 2 * 4 * OUT}
WEIGHTS = {"conv1": 4 * 2, "conv2": 2 * 6 * 9, "proj.0": 4 * 6}
BN1, BN2 = 4 * 2, 4 * 6


@pytest.fixture(scope="module")
def counts():
    return roofline.count(Block(), (3, 4, 8, 8))


def rows(counts):
    return [(p.name, p.kind, p.reads, p.writes, p.weights, p.flops) for p in counts.pieces]


def test_every_op_its_own_pass(counts):
    assert rows(counts["op"]) == [
        ("conv1", "conv", X, MID, WEIGHTS["conv1"], FLOPS["conv1"]),
        ("bn1", "bn", MID, MID, BN1, 0),
        ("", "relu", MID, MID, 0, 0),
        ("conv2", "conv", MID, OUT, WEIGHTS["conv2"], FLOPS["conv2"]),
        ("bn2", "bn", OUT, OUT, BN2, 0),
        ("proj.0", "conv", X, OUT, WEIGHTS["proj.0"], FLOPS["proj.0"]),
        ("proj.1", "bn", OUT, OUT, BN2, 0),
        ("", "add", 2 * OUT, OUT, 0, 0),
        ("", "relu", OUT, OUT, 0, 0),
    ]


def test_each_convolution_one_pass(counts):
    assert rows(counts["conv"]) == [
        ("conv1", "conv+bn+relu", X, MID, WEIGHTS["conv1"] + BN1, FLOPS["conv1"]),
        ("proj.0", "conv+bn", X, OUT, WEIGHTS["proj.0"] + BN2, FLOPS["proj.0"]),
        ("conv2", "conv+bn+add+relu", MID + OUT, OUT, WEIGHTS["conv2"] + BN2, FLOPS["conv2"]),
    ]


def test_the_whole_block_one_pass(counts):
    weights = sum(WEIGHTS.values()) + BN1 + 2 * BN2
    assert rows(counts["block"]) == [("", "block", X, OUT, weights, sum(FLOPS.values()))]
    assert counts["block"].nbytes(BF16) == 2 * (X + OUT + weights)
    assert counts["block"].nbytes(torch.float32, weights=False) == 4 * (X + OUT)


def test_bound_takes_the_greater_of_memory_and_arithmetic_per_pass(counts):
    device = roofline.Device("toy", {BF16: 200.0}, 100.0)
    bound = counts["conv"].bound(device, BF16)
    memory = [2 * p.elements() / 100 for p in counts["conv"].pieces]
    arithmetic = [p.flops / 200 for p in counts["conv"].pieces]
    assert bound.seconds == pytest.approx(sum(map(max, memory, arithmetic)))
    assert (bound.memory_s, bound.arithmetic_s) == pytest.approx((sum(memory), sum(arithmetic)))
    assert bound.seconds > max(bound.memory_s, bound.arithmetic_s)  # passes of both kinds are here
    assert bound.images_per_s == pytest.approx(3 / bound.seconds)


def test_unknown_rate_is_said():
    with pytest.raises(ValueError, match=r"float32.*NVIDIA H200.*bfloat16"):
        H200.rate(torch.float32)
    with pytest.raises(ValueError, match="shapes"):
        roofline.count(Block())


@pytest.fixture(scope="module")
def resnet50():
    counts = roofline.count(optional.torchvision().models.resnet50(), (1, 3, 224, 224))
    return {level: c.without("avgpool", "fc") for level, c in counts.items()}


@pytest.mark.parametrize(("level", "melem"), [("op", 80.8), ("conv", 28.3), ("block", 11.5)])
def test_elements_moved_by_resnet50(resnet50, level, melem):
    moved = resnet50[level].elements(weights=False) / 1e6
    assert moved == pytest.approx(melem, rel=0.01)
    for kind in {piece.kind for piece in resnet50[level].pieces}:
        dropped = sum(p.elements(weights=False) for p in resnet50[level].pieces if p.kind == kind) / 1e6
        assert moved - dropped != pytest.approx(melem, rel=0.01), f"{kind} could be dropped unseen"


def test_images_per_second_of_resnet50(resnet50):
    bounds = {level: c.bound(H200, BF16, weights=False) for level, c in resnet50.items()}
    assert 1 / bounds["op"].memory_s == pytest.approx(26.6e3, rel=0.01)
    assert bounds["conv"].images_per_s == pytest.approx(59.4e3, rel=0.01)
    assert bounds["block"].images_per_s == pytest.approx(93.1e3, rel=0.01)
    for bound in bounds.values():
        assert 1 / bound.arithmetic_s == pytest.approx(96.6e3, rel=0.01)


def test_gain_ceilings_of_whole_blocks():
    gains = roofline.gains(optional.torchvision().models.resnet50(), (1, 3, 224, 224), H200, BF16)
    assert len(gains) == 16
    expected = {"layer1.0": 3.05, "layer2.0": 1.94, "layer4.0": 1.00}
    expected |= {f"layer1.{i}": 2.14 for i in (1, 2)} | {f"layer2.{i}": 1.71 for i in (1, 2, 3)}
    expected |= {f"layer3.{i}": 1.14 for i in range(1, 6)} | {f"layer4.{i}": 1.00 for i in (1, 2)}
    for name, ceiling in expected.items():
        assert gains[name] == pytest.approx(ceiling, abs=0.006), name


def test_batch_scales_activations_and_leaves_weights():
    model = optional.torchvision().models.resnet18()
    one, four = (roofline.count(model, (n, 3, 64, 64))["conv"] for n in (1, 4))
    assert four.batch == 4
    assert four.elements(weights=False) == 4 * one.elements(weights=False)
    assert four.flops == 4 * one.flops
    assert four.elements() - four.elements(weights=False) == one.elements() - one.elements(weights=False)


def test_the_model_is_left_as_it_was():
    model = optional.torchvision().models.resnet18().train()
    weight = model.conv1.weight
    roofline.count(model, (1, 3, 32, 32))
    assert model.training and model.conv1.weight is weight and weight.device.type == "cpu"
    assert not model.conv1._forward_hooks and not model.conv1._forward_pre_hooks


class Frozen(nn.Module):
    """Detectors' batch norm, spelled out in elementwise operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale)


def test_frozen_batch_norm_rides_in_the_convolution():
    block = Block()
    block.bn1, block.bn2, block.proj[1] = Frozen(2), Frozen(6), Frozen(6)
    counts = roofline.count(block, (3, 4, 8, 8))
    assert [(p.name, p.reads, p.writes) for p in counts["conv"].pieces] == [
        ("conv1", X, MID),
        ("proj.0", X, OUT),
        ("conv2", MID + OUT, OUT),
    ]
    assert [p.kind for p in counts["block"].pieces] == ["block"]


class Gated(nn.Module):
    """A convolution whose output is read twice cannot vanish into one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * y.mean((2, 3), keepdim=True).sigmoid()


def test_a_gate_stays_a_pass_of_its_own():
    kinds = [p.kind for p in roofline.count(Gated(), (1, 4, 8, 8))["conv"].pieces]
    assert kinds == ["conv", "avg_pool", "sigmoid", "mul"]


class Lateral(nn.Module):
    """A pyramid's sum, with no ReLU behind it, is no residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


def test_a_sum_without_relu_is_no_block():
    assert [p.kind for p in roofline.count(Lateral(), (1, 4, 8, 8))["block"].pieces] == ["conv+add"]


class Called(nn.Module):
    """The same block through our op."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.inner = block

    def forward(self, x: Tensor) -> Tensor:
        def conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvBN:
            vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            return ConvBN(conv.weight, None, *vectors, bn.eps, conv.stride, conv.padding, conv.dilation, conv.groups)

        b = self.inner
        return functional.basic_block(x, conv_bn(b.conv1, b.bn1), conv_bn(b.conv2, b.bn2), conv_bn(*b.proj))


def test_our_ops_count_as_what_they_stand_for(counts):
    ours = roofline.count(Called(Block()), (3, 4, 8, 8))
    for level in roofline.LEVELS:
        assert sorted(r[1:] for r in rows(ours[level])) == sorted(r[1:] for r in rows(counts[level]))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "seresnet50", "resnet50d"])
def test_timm_models(name):
    timm = pytest.importorskip("timm")
    counts = roofline.count(timm.create_model(name), (1, 3, 64, 64))
    blocks = [p.name for p in counts["block"].pieces if p.kind == "block"]
    assert len(blocks) == (8 if name == "resnet18" else 16)
    moved = [counts[level].elements(weights=False) for level in roofline.LEVELS]
    assert moved[0] > moved[1] > moved[2]
    assert len({c.flops for c in counts.values()}) == 1


def test_batch_norms_of_resnet50():
    """The account of batch_norm_act's passes: elements by hand for the stem, projections and the last of each block."""
    found = norm.norms()
    assert sum(found.values()) == sum(
        64 * 112**2 * (stage == 0) + blocks * (2 * width + 4 * width) * side**2 + 4 * width * side**2
        + (width * (2 * side) ** 2 - width * side**2) * (stage > 0)
        for stage, (blocks, width, side) in enumerate(((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)))
    )  # fmt: skip
    assert found[norm.KINDS[0]] == sum(
        4 * width * side**2 for width, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    )
    for kind in norm.KINDS:
        ours, theirs = norm.fused(kind), norm.eager(kind)
        assert all(a.bytes_per_element <= b.bytes_per_element for a, b in zip(ours, theirs, strict=True))
    assert norm.fused(norm.KINDS[0]) == norm.eager(norm.KINDS[0]) == ((2, 1), (4, 1))
    assert norm.fused(norm.KINDS[2]) == ((3, 1), (6, 2))
