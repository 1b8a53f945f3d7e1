"""The fused modules by themselves, and the ResNets built of them."""

import copy
import pickle

import optional
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.networks import compare, randomise_norms

torchvision = optional.torchvision()
tv = torchvision.models.resnet

IMAGENET = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip


def projection(inplanes, planes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def twins(ours, theirs, *args, **options):
    """A block of ours and torchvision's of the same parameters, in eval mode."""
    eager = randomise_norms(theirs(*args, **options)).eval()
    fused = ours(*args, **options).eval()
    fused.load_state_dict(eager.state_dict(), strict=True)
    return fused, eager


BLOCKS = [
    ("basic", rf.FusedBasicBlock, tv.BasicBlock, (8, 8), {}),
    ("basic-stride2", rf.FusedBasicBlock, tv.BasicBlock, (8, 12, 2, "projection"), {}),
    ("bottleneck", rf.FusedBottleneck, tv.Bottleneck, (16, 4), {}),
    ("bottleneck-stride2", rf.FusedBottleneck, tv.Bottleneck, (8, 4, 2, "projection"), {}),
    ("bottleneck-groups", rf.FusedBottleneck, tv.Bottleneck, (64, 16), {"groups": 4, "base_width": 32}),
    ("bottleneck-dilation", rf.FusedBottleneck, tv.Bottleneck, (16, 4), {"dilation": 2}),
]


@pytest.mark.parametrize(("ours", "theirs", "args", "options"), [b[1:] for b in BLOCKS], ids=[b[0] for b in BLOCKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_block_computes_what_torchvisions_does(ours, theirs, args, options, dtype):
    if args[-1] == "projection":
        args = (*args[:-1], projection(args[0], args[1] * theirs.expansion, args[2]))
    fused, eager = twins(ours, theirs, *args, **options)
    assert list(fused.state_dict()) == list(eager.state_dict())
    x = torch.randn(2, args[0], 9, 7).to(dtype)
    result = compare(fused.to(dtype), eager.to(dtype), x)
    assert result.ok, result


def test_tutorial_signature():
    block = rf.ResidualBlock(8, 16, 2, projection(8, 16, 2))
    assert rf.ResidualBlock.expansion == 1
    assert isinstance(block, rf.FusedBasicBlock)
    assert rf.ResidualBlock(in_channels=4, out_channels=4)(torch.randn(1, 4, 5, 5)).shape == (1, 4, 5, 5)
    assert block(torch.randn(2, 8, 6, 6)).shape == (2, 16, 3, 3)


def test_basic_block_refuses_what_torchvisions_refuses():
    with pytest.raises(ValueError, match="groups"):
        rf.FusedBasicBlock(8, 8, groups=2)
    with pytest.raises(NotImplementedError, match="dilation"):
        rf.FusedBasicBlock(8, 8, dilation=2)


def test_missing_projection_names_the_argument():
    with pytest.raises(ValueError, match="shortcut"):
        rf.FusedBasicBlock(8, 16, 2).eval()(torch.randn(1, 8, 8, 8))


@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("padding", [1, "same", "valid", (0, 1)], ids=str)
def test_conv_bn_relu(act, padding):
    module = randomise_norms(rf.FusedConvBNReLU(6, 10, 3, padding=padding, bias=True, act=act)).eval()
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        eager = module.bn(module.conv(x))
        double = copy.deepcopy(module).double()
        exact = double.bn(double.conv(x.double()))
        if act == "relu":
            eager, exact = F.relu(eager), F.relu(exact)
        assert_within_budget(module(x), eager, exact)
    assert list(module.state_dict()) == [
        "conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
        "bn.num_batches_tracked",
    ]  # fmt: skip


def test_conv_bn_relu_from_modules_shares_them():
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
    module = rf.FusedConvBNReLU.from_modules(conv, bn)
    assert module.conv is conv and module.bn is bn and not module.training
    with pytest.raises(ValueError, match="act"):
        rf.FusedConvBNReLU.from_modules(conv, bn, act="gelu")


def test_from_block_shares_everything():
    eager = randomise_norms(tv.Bottleneck(16, 4)).eval()
    eager.note = "mine"
    calls = []
    handle = eager.register_forward_hook(lambda *a: calls.append(1))
    fused = rf.FusedBottleneck.from_block(eager)
    assert type(eager) is tv.Bottleneck
    assert fused.conv1 is eager.conv1 and fused.note == "mine" and not fused.training
    x = torch.randn(1, 16, 5, 5)
    assert compare(fused, eager, x).ok
    assert calls
    handle.remove()
    calls.clear()
    fused(x)
    assert not calls
    with pytest.raises(TypeError, match="conv3"):
        rf.FusedBottleneck.from_block(tv.BasicBlock(4, 4))


def test_one_op_per_block_in_eval_mode():
    block = rf.FusedBottleneck(16, 4).eval()
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad(), torch.profiler.profile() as seen:
        block(x)
    ours = [(e.key, e.count) for e in seen.key_averages() if e.key.startswith("resnet_fused::")]
    assert ours == [("resnet_fused::bottleneck", 1)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_is_torchvisions(momentum):
    def norm(planes):
        return nn.BatchNorm2d(planes, momentum=momentum)

    fused, eager = twins(
        rf.FusedBottleneck, tv.Bottleneck, 8, 4, 2, projection(8, 16, 2), norm_layer=norm
    )  # fmt: skip
    fused.train(), eager.train()
    for _ in range(3):
        x = torch.randn(4, 8, 7, 7)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        fused(a).square().sum().backward()
        eager(b).square().sum().backward()
        assert torch.equal(a.grad, b.grad)
    for (name, p), (_, q) in zip(fused.named_parameters(), eager.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for (name, p), (_, q) in zip(fused.named_buffers(), eager.named_buffers(), strict=True):
        assert torch.equal(p, q), name


def test_one_norm_in_training_mode():
    fused, eager = twins(rf.FusedBottleneck, tv.Bottleneck, 16, 4)
    fused.bn2.train(), eager.bn2.train()
    x = torch.randn(4, 16, 6, 6)
    double = copy.deepcopy(eager).double()
    with torch.no_grad():
        assert_within_budget(fused(x), eager(x), double(x.double()))
    assert torch.equal(fused.bn2.num_batches_tracked, eager.bn2.num_batches_tracked)
    torch.testing.assert_close(fused.bn2.running_var, eager.bn2.running_var)
    assert torch.equal(fused.bn1.running_var, eager.bn1.running_var)


def test_no_running_statistics_means_the_batchs():
    def norm(planes):
        return nn.BatchNorm2d(planes, track_running_stats=False)

    fused, eager = twins(rf.FusedBasicBlock, tv.BasicBlock, 8, 8, norm_layer=norm)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(fused(x), eager(x))


def test_other_norms_run_as_written():
    def norm(planes):
        return nn.GroupNorm(2, planes)

    fused, eager = twins(rf.FusedBottleneck, tv.Bottleneck, 16, 4, norm_layer=norm)
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(fused(x), eager(x))


@pytest.mark.parametrize("name", IMAGENET)
def test_builder_is_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = getattr(rf, name)(num_classes=7), getattr(torchvision.models, name)(num_classes=7)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert [v.shape for v in a.values()] == [v.shape for v in b.values()]
    shapes = [(m.stride, m.dilation, m.groups) for m in ours.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(m.stride, m.dilation, m.groups) for m in theirs.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("options", [{}, {"zero_init_residual": True}], ids=["plain", "zero-init"])
def test_builder_initialises_as_torchvision(options):
    torch.manual_seed(1)
    ours = rf.resnet18(**options)
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(**options)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_builder_computes_what_torchvision_does():
    options = {"replace_stride_with_dilation": [False, True, True], "num_classes": 10}
    eager = randomise_norms(torchvision.models.resnet50(**options)).eval()
    fused = rf.resnet50(**options).eval()
    fused.load_state_dict(eager.state_dict())
    result = compare(fused, eager, torch.randn(1, 3, 65, 47))
    assert result.ok, result


@pytest.mark.parametrize(("name", "depth"), [("resnet20", 20), ("resnet56", 56), ("resnet110", 110)])
def test_cifar(name, depth):
    model = getattr(rf, name)()
    convs = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(convs) + 1 == depth
    assert [model.layer1[0].conv1.out_channels, model.layer3[0].conv1.out_channels] == [16, 64]
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_resnet_stacks_any_block():
    class Plain(nn.Module):
        def __init__(self, inplanes, planes, stride=1, downsample=None):
            super().__init__()
            self.conv, self.downsample = nn.Conv2d(inplanes, planes, 3, stride, 1), downsample

        def forward(self, x):
            return self.conv(x) + (x if self.downsample is None else self.downsample(x))

    for block in (Plain, rf.ResidualBlock, tv.BasicBlock):
        model = rf.ResNet(block, [1, 1], num_classes=3, planes=(4, 8)).eval()
        assert model(torch.randn(1, 3, 33, 47)).shape == (1, 3)


def test_resnet_names_bad_arguments():
    with pytest.raises(ValueError, match="replace_stride_with_dilation"):
        rf.resnet18(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="planes"):
        rf.ResNet(rf.FusedBasicBlock, [1] * 5)


def test_copies_and_pickles():
    model = randomise_norms(rf.resnet20()).eval()
    x = torch.randn(1, 3, 16, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other.conv1.weight is not model.conv1.weight


def test_autocast_follows_eager():
    fused, eager = twins(rf.FusedBottleneck, tv.Bottleneck, 8, 4, 1, projection(8, 16, 1))
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(x.double())
    assert_within_budget(ours, theirs, exact)
