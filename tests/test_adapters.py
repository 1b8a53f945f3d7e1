"""Which classes of blocks are taken, and which are not."""

import optional
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.testing.networks import compare, randomise_norms

torchvision = optional.torchvision()
tv = torchvision.models.resnet
FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d


def projection(inplanes, planes, stride=1):
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride), nn.BatchNorm2d(planes))


class Parts(nn.Module):
    """The parts of a basic block, without a forward that is a block's."""

    def __init__(self, inplanes=8, planes=8, stride=1, downsample=None):
        super().__init__()
        self.first = nn.Conv2d(inplanes, planes, 3, stride, 1)
        self.n1 = nn.BatchNorm2d(planes)
        self.second = nn.Conv2d(planes, planes, 3, 1, 1)
        self.n2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential() if downsample is None else downsample
        self.downsample = downsample
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)


class Cifar(Parts):
    def forward(self, x):
        out = F.relu(self.n1(self.first(x)))
        out = self.n2(self.second(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class Tutorial(Parts):
    def forward(self, x):
        residual = x
        out = self.first(x)
        out = self.n1(out)
        out = self.relu(out)
        out = self.second(out)
        out = self.n2(out)
        if self.downsample:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class Sequentials(nn.Module):
    def __init__(self, inplanes=8, planes=8, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(inplanes, planes, 3, stride, 1), nn.BatchNorm2d(planes), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(planes, planes, 3, 1, 1), nn.BatchNorm2d(planes))
        self.downsample = downsample
        self.relu = nn.ReLU()

    def forward(self, x):
        residual = x
        out = self.conv2(self.conv1(x))
        if self.downsample is not None:
            residual = self.downsample(x)
        return self.relu(out + residual)


class WithoutLastReLU(Parts):
    def forward(self, x):
        out = self.n2(self.second(F.relu(self.n1(self.first(x)))))
        return out + x


class PreActivation(Parts):
    def forward(self, x):
        out = self.first(F.relu(self.n1(x)))
        return self.second(F.relu(self.n2(out))) + x


class WithDropout(Parts):
    def forward(self, x):
        out = self.drop(F.relu(self.n1(self.first(x))))
        return F.relu(self.n2(self.second(out)) + x)


class Scaled(Parts):
    def forward(self, x):
        out = self.n2(self.second(F.relu(self.n1(self.first(x)))))
        return F.relu(0.5 * out + x)


class ResidualAfterReLU(Parts):
    def forward(self, x):
        x = F.relu(x)
        out = self.n2(self.second(F.relu(self.n1(self.first(x)))))
        return F.relu(out + x)


class Leaky(Parts):
    def forward(self, x):
        out = self.n2(self.second(F.leaky_relu(self.n1(self.first(x)))))
        return F.relu(out + x)


class SideEffect(Parts):
    def forward(self, x):
        self.seen = x
        return F.relu(self.n2(self.second(F.relu(self.n1(self.first(x))))) + x)


class CallsTwice(Parts):
    def forward(self, x):
        unused = self.n1(self.first(x))
        unused = self.n1(self.first(x))
        return F.relu(self.n2(self.second(F.relu(unused))) + x)


class TwoArguments(Parts):
    def forward(self, x, scale=1):
        return F.relu(self.n2(self.second(F.relu(self.n1(self.first(x))))) + x)


@pytest.mark.parametrize("cls", [Cifar, Tutorial, Sequentials])
@pytest.mark.parametrize("shape", ["plain", "projected"])
def test_users_own_blocks_are_taken_by_what_they_compute(cls, shape):
    args = (8, 8) if shape == "plain" else (8, 12, 2, projection(8, 12, 2))
    block = randomise_norms(cls(*args)).eval()
    fused = rf.fuse(block, strict=True)
    (entry,) = rf.report(fused)
    assert (entry.kind, entry.status, entry.reason) == ("basic_block", "fused", "")
    assert list(fused.state_dict()) == list(block.state_dict())
    x = torch.randn(2, 8, 9, 7)
    assert compare(fused, block, x).ok
    fused.train(), block.train()
    torch.testing.assert_close(fused(x), block(x))


OTHERS = [
    WithoutLastReLU, PreActivation, WithDropout, Scaled, ResidualAfterReLU, Leaky, SideEffect, CallsTwice, TwoArguments,
]  # fmt: skip


@pytest.mark.parametrize("cls", OTHERS)
def test_anything_else_is_no_block(cls):
    block = cls().eval()
    assert len(rf.explain(block)) == 0
    assert not rf.is_fused(rf.fuse(block))


def test_strict_without_any_block_names_the_argument_and_the_remedy():
    with pytest.raises(rf.FusionError, match=r"model: .*register_adapter"):
        rf.fuse(nn.Linear(2, 2), strict=True)


def test_registered_block():
    class Mine(Parts):
        def forward(self, x):
            for conv, norm in ((self.first, self.n1), (self.second, self.n2)):
                y = norm(conv(x if conv is self.first else F.relu(y)))  # noqa: F821
            return F.relu(y + self.shortcut(x))

    class Other(Mine):
        def forward(self, x):
            return super().forward(x) * 2

    x = torch.randn(2, 8, 6, 6)
    block = randomise_norms(Mine(8, 12, 1, projection(8, 12))).eval()
    assert len(rf.explain(block)) == 0
    rf.register_adapter(Mine, convs=("first", "second"), norms=("n1", "n2"), shortcut="shortcut")
    assert compare(rf.fuse(block, strict=True), block, x).ok
    assert rf.verify(block, x).ok
    (entry,) = rf.explain(Other().eval())
    assert entry.status == "skipped" and "another forward" in entry.reason


def test_register_adapter_names_bad_arguments():
    with pytest.raises(TypeError, match="cls"):
        rf.register_adapter(nn.Module, convs=("a", "b"), norms=("c", "d"))
    with pytest.raises(ValueError, match="convs, norms"):
        rf.register_adapter(Cifar, convs=("a", "b"), norms=("c",))


def test_verify_sees_a_wrong_adapter():
    class Wrong(Parts):
        def forward(self, x):
            return F.relu(self.n2(self.second(F.relu(self.n1(self.first(x))))) + 2 * x)

    rf.register_adapter(Wrong, convs=("first", "second"), norms=("n1", "n2"))
    assert not rf.verify(Wrong().eval(), torch.randn(1, 8, 6, 6)).ok


def test_subclass_with_another_forward():
    class Twice(tv.Bottleneck):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(tv.Bottleneck):
        pass

    (entry,) = rf.explain(Twice(16, 4))
    assert entry.status == "skipped" and "another forward" in entry.reason
    assert isinstance(rf.fuse(Renamed(16, 4)), rf.FusedBottleneck)


def test_quantizable_and_video_blocks():
    quantizable = torchvision.models.quantization.resnet.QuantizableBasicBlock(8, 8)
    (entry,) = rf.explain(quantizable)
    assert entry.status == "skipped" and "quantizable" in entry.reason
    with torch.device("meta"):
        video = torchvision.models.video.r3d_18()
    assert not rf.explain(video).fused and all("video" in e.reason for e in rf.explain(video))


def test_model_with_another_forward_keeps_its_stem():
    class Mine(tv.ResNet):
        def _forward_impl(self, x):
            return super()._forward_impl(x) + 1

    report = rf.explain(Mine(tv.BasicBlock, [1, 1, 1, 1]))
    assert [e.kind for e in report.skipped] == ["stem"] and len(report.fused) == 4
    assert "another forward" in report["stem"].reason


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_torchvisions_frozen_norms(eps):
    block = randomise_norms(tv.Bottleneck(16, 4, norm_layer=FrozenBatchNorm2d))
    fused = rf.fuse(block, strict=True)
    for model in (block, fused):
        for norm in model.modules():
            if isinstance(norm, FrozenBatchNorm2d):
                norm.eps = eps
    x = torch.randn(2, 16, 5, 5)
    assert compare(fused, block, x).ok
    assert compare(fused.train(), block.train(), x).ok


DOWNSAMPLES = {
    "pooled": lambda: nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)),
    "convolution-alone": lambda: nn.Conv2d(8, 12, 1),
    "group-norm": lambda: nn.Sequential(nn.Conv2d(8, 12, 1), nn.GroupNorm(2, 12)),
}


@pytest.mark.parametrize("name", DOWNSAMPLES)
def test_other_downsamples_stay_eager_in_a_fused_block(name):
    block = randomise_norms(tv.BasicBlock(8, 12, downsample=DOWNSAMPLES[name]())).eval()
    fused = rf.fuse(block, strict=True)
    (entry,) = rf.report(fused)
    assert entry.status == "fused" and "downsample stays eager" in entry.reason
    assert compare(fused, block, torch.randn(2, 8, 6, 6)).ok


def test_stride_is_read_from_the_convolution():
    block = randomise_norms(tv.BasicBlock(8, 8, 2, projection(8, 8, 2))).eval()
    block.conv1.stride = block.downsample[0].stride = (1, 1)
    fused = rf.fuse(block)
    assert compare(fused, block, torch.randn(1, 8, 6, 6)).ok


def test_filter_and_strict():
    model = tv.ResNet(tv.BasicBlock, [1, 1, 1, 1])
    fused = rf.fuse(model, filter_fn=lambda name, module: name == "layer2.0")
    assert [e.name for e in rf.report(fused).fused] == ["layer2.0"]
    model.layer3[0].relu = nn.SiLU()
    with pytest.raises(rf.FusionError, match=r"layer3\.0"):
        rf.fuse_(model, strict=True)
    assert not rf.is_fused(model)
    rf.fuse_(model, strict=True, filter_fn=lambda name, module: name != "layer3.0")
    assert len(rf.report(model).fused) == 4


def test_report_as_text_and_data():
    report = rf.report(rf.fuse(tv.ResNet(tv.BasicBlock, [1, 1, 1, 1])))
    assert "layer1.0" in str(report) and "5 fused, 0 left alone" in str(report)
    data = report.to_dict()
    assert data["fused"] == 5 and set(data["entries"][0]) == {"name", "kind", "status", "reason", "backend"}
    assert all(e.backend for e in report.fused)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="model"):
        rf.fuse("resnet18")
    with pytest.raises(ValueError, match="backend"):
        rf.fuse(tv.BasicBlock(8, 8), backend="fast")
    with pytest.raises(ValueError, match="memory_format"):
        rf.fuse(tv.BasicBlock(8, 8), memory_format=torch.contiguous_format)
