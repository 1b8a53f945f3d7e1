"""What people do to a model before and after fuse, beyond test_fusion.py: hooks, patches, odd parts, replicas."""

from collections import OrderedDict

import optional
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import resnet_fused as rf
from resnet_fused.testing.networks import compare, randomise_norms

torchvision = optional.torchvision()
tv = torchvision.models.resnet


def small(block=tv.Bottleneck, **options):
    """A torchvision ResNet of one or two blocks a stage."""
    torch.manual_seed(0)
    return randomise_norms(tv.ResNet(block, [2, 1, 1, 1], num_classes=5, **options)).eval()


def image(n=2, size=40):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def bottleneck(stride=2):
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    return randomise_norms(tv.Bottleneck(8, 4, stride, downsample)).eval()


def reason(model):
    """Why the only block of ``model`` was left alone; it must still compute what it did."""
    (entry,) = rf.explain(model)
    assert entry.status == "skipped" and not entry.backend
    fused = rf.fuse(model)
    assert type(fused) is type(model)
    assert [e.reason for e in rf.report(fused)] == [entry.reason]
    return entry.reason


def test_what_is_trained_is_what_is_computed():
    eager = small()
    fused = rf.fuse(eager)
    fused(image())  # whatever backends pack, they have packed by now
    fused.train()
    optimizer = torch.optim.SGD(fused.parameters(), 0.05)
    fused(image(4)).square().mean().backward()
    optimizer.step()
    fused.eval()
    eager.load_state_dict(fused.state_dict())
    result = compare(fused, eager, image())
    assert result.ok, result


def test_weights_written_in_eval_mode_are_seen():
    fused = rf.fuse(small())
    with torch.no_grad():
        before = fused(image())
        fused.layer1[0].bn2.running_var.mul_(2)
        fused.layer2[0].conv1.weight.mul_(1.5)
        assert not torch.equal(fused(image()), before)
        assert compare(fused, rf.unfuse(fused), image()).ok


def test_data_writes_are_seen_after_refresh():
    fused = rf.fuse(small())
    with torch.no_grad():
        fused(image())
        fused.layer1[0].conv1.weight.data.mul_(2)
        fused.bn1.weight.data.mul_(2)
        rf.refresh(fused)
        assert compare(fused, rf.unfuse(fused), image()).ok


@pytest.mark.parametrize("drop", [lambda b: b.train(), lambda b: b.float(), rf.refresh,
                                  lambda b: b.load_state_dict(b.state_dict())],
                         ids=["train", "apply", "refresh", "load_state_dict"])  # fmt: skip
def test_what_backends_packed_is_dropped(drop, monkeypatch):
    from resnet_fused.ops import packed

    block = rf.fuse(bottleneck())
    dropped = []
    monkeypatch.setattr(packed, "drop", lambda tensors: dropped.extend(map(id, tensors)))
    drop(block)
    assert {id(t) for t in block.state_dict(keep_vars=True).values()} <= set(dropped)


def test_identity_type_and_attributes_stay():
    model = small()
    model.layer1[0].note = "mine"
    block, weight, ids = model.layer1[0], model.layer1[0].conv1.weight, list(map(id, model.parameters()))
    assert rf.fuse_(model) is model
    assert model.layer1[0] is block and block.conv1.weight is weight and block.note == "mine"
    assert list(map(id, model.parameters())) == ids
    assert isinstance(block, rf.FusedBottleneck) and isinstance(block, tv.Bottleneck) and block.expansion == 4
    assert isinstance(model, tv.ResNet)
    assert rf.unfuse(model, inplace=True) is model and type(block) is tv.Bottleneck


def test_fusing_twice_changes_the_backend_alone():
    fused = rf.fuse(small())
    again = rf.fuse(fused, backend="reference")
    assert type(again) is type(fused)
    assert {e.backend for e in rf.report(again)} == {"reference"}
    assert {e.backend for e in rf.report(fused)} != set() and again.layer1[0]._rf_state.backend == "reference"
    assert fused.layer1[0]._rf_state.backend == "auto"
    with torch.no_grad():
        assert torch.equal(rf.unfuse(again)(image()), small()(image()))


def test_unknown_backend_and_formats():
    with pytest.raises(ValueError, match="backend"):
        rf.fuse(small(), backend="cuda9")
    with pytest.raises(ValueError, match="memory_format"):
        rf.fuse(small(), memory_format=torch.contiguous_format)
    with pytest.raises(TypeError, match="model"):
        rf.fuse("resnet18")


@pytest.mark.parametrize("part", ["conv2", "bn1", "relu", "downsample"])
def test_inner_hooks_before_fusion(part):
    block = bottleneck()
    getattr(block, part).register_forward_hook(lambda *a: None)
    if part == "downsample":  # the shortcut alone is left alone
        assert "downsample stays eager" in rf.report(rf.fuse(block))[""].reason
    else:
        assert part in reason(block) and "hooks" in reason(block)


@pytest.mark.parametrize("part", ["conv2", "bn1", "relu", "downsample", "downsample.0", "downsample.1"])
@pytest.mark.parametrize("kind", ["hook", "pre_hook", "forward", "global"])
def test_inner_hooks_after_fusion_fire(part, kind):
    block = bottleneck()
    fused = rf.fuse(block)
    seen = []
    target = fused.get_submodule(part)
    if kind == "forward":
        original = target.forward
        target.forward = lambda x: (seen.append(1), original(x))[1]
    elif kind == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda m, *a: seen.append(1) if m is target else None)
    else:
        register = target.register_forward_hook if kind == "hook" else target.register_forward_pre_hook
        register(lambda *a: seen.append(1))
    try:
        assert compare(fused, block, torch.randn(2, 8, 7, 7)).ok
    finally:
        if kind == "global":
            handle.remove()
    assert len(seen) == (3 if part == "relu" else 1)


def test_a_part_replaced_after_fusion_is_used():
    block = rf.fuse(bottleneck())
    block.relu = nn.SiLU()
    expected = rf.unfuse(block)
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(block(x), expected(x))
    assert "SiLU" in rf.report(block)[""].reason
    block.relu = nn.ReLU()
    block.bn2 = nn.Identity()
    torch.testing.assert_close(block(x), rf.unfuse(block)(x))


@pytest.mark.parametrize("register", [
    lambda b: parametrizations.weight_norm(b.conv1),
    lambda b: parametrizations.spectral_norm(b.conv2),
    lambda b: nn.utils.prune.l1_unstructured(b.conv1, "weight", amount=0.3),
], ids=["weight_norm", "spectral_norm", "prune"])  # fmt: skip
def test_weights_computed_by_something_else(register):
    import torch.nn.utils.prune

    block = bottleneck()
    fused = rf.fuse(block)
    register(block), register(fused)
    text = reason_without_fusing(block)
    assert "parametrized" in text or "hooks" in text
    x = torch.randn(2, 8, 7, 7)
    ours = fused(x)
    torch.testing.assert_close(ours, rf.unfuse(fused, inplace=True)(x))


def set_part(block, name, module):
    block.set_submodule(name, module)
    return block.eval()


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(("part", "module", "text"), [
    ("bn2", nn.GroupNorm(2, 4), "GroupNorm"),
    ("bn1", MyNorm(4), "MyNorm"),
    ("bn3", nn.BatchNorm2d(16, track_running_stats=False), "running statistics"),
    ("relu", nn.LeakyReLU(), "LeakyReLU"),
    ("relu", nn.ReLU6(), "ReLU6"),
    ("conv2", nn.Conv2d(4, 4, 3, 2, 1, padding_mode="reflect"), "padding_mode='reflect'"),
    ("conv2", nn.Identity(), "Identity"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_parts_left_alone(part, module, text):
    block = set_part(bottleneck(), part, module)
    assert f"{part} " in reason(block) and text in reason(block)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_weights_are_left_alone():
    assert "complex64" in reason(bottleneck().to(torch.complex64))


def test_affine_off_bias_on_and_same_padding_are_taken():
    block = bottleneck(stride=1)
    block.bn1 = nn.BatchNorm2d(4, affine=False)
    block.conv2 = nn.Conv2d(4, 4, 3, 1, "same", dilation=2, bias=True)
    block.conv1 = nn.Conv2d(8, 4, 1, padding="valid", bias=True)
    block.downsample[0] = nn.Conv2d(8, 16, 1)
    block.eval()
    fused = rf.fuse(block, strict=True)
    assert rf.report(fused)[""].reason == ""
    assert compare(fused, block, torch.randn(2, 8, 9, 9)).ok


@pytest.mark.parametrize("downsample", [
    nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)),
    nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.GroupNorm(2, 16)),
    nn.Sequential(nn.Conv2d(8, 16, 1, 2)),
    nn.Conv2d(8, 16, 1, 2),
], ids=["avgpool", "groupnorm", "conv-only", "bare-conv"])  # fmt: skip
def test_other_projections_are_computed_by_themselves(downsample):
    block = randomise_norms(tv.Bottleneck(8, 4, 2, downsample)).eval()
    fused = rf.fuse(block, strict=True)
    assert "downsample stays eager" in rf.report(fused)[""].reason
    assert compare(fused, block, torch.randn(2, 8, 8, 8)).ok


def test_strides_are_read_from_the_convolutions():
    block = bottleneck()
    block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (2, 2), (2, 2)
    block.downsample[0].stride = (1, 1)
    assert compare(rf.fuse(block), block, torch.randn(2, 8, 9, 9)).ok


def test_frozen_batch_norm():
    from torchvision.ops.misc import FrozenBatchNorm2d

    eager = small(norm_layer=FrozenBatchNorm2d).train()
    for m in eager.modules():
        if isinstance(m, FrozenBatchNorm2d):
            m.eps = 0.0  # what torchvision's overwrite_eps does
    fused = rf.fuse(eager, strict=True)
    assert rf.explain(eager)["stem"].status == "fused"
    result = compare(fused, eager, image())
    assert result.ok, result
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused.layer1(torch.randn(1, 64, 8, 8)).dtype == eager.layer1(torch.randn(1, 64, 8, 8)).dtype


def test_detection_backbone():
    from torchvision.models._utils import IntermediateLayerGetter

    eager = IntermediateLayerGetter(small(), {"layer1": "0", "layer4": "1"}).eval()
    fused = rf.fuse(eager, strict=True)
    assert rf.report(fused)["stem"].status == "fused" and not rf.report(fused).skipped
    with torch.no_grad():
        ours, theirs = fused(image()), eager(image())
        assert isinstance(ours, OrderedDict) and list(ours) == list(theirs)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4)
    inside = IntermediateLayerGetter(small(), {"bn1": "0", "layer1": "1"}).eval()
    assert "inside the stem" in rf.report(rf.fuse(inside))["stem"].reason


class ChangedBlock(tv.BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


class RenamedBlock(tv.BasicBlock):
    """The same forward."""


class ChangedResNet(tv.ResNet):
    def _forward_impl(self, x):
        return super()._forward_impl(x) * 2


def test_subclasses():
    assert "another forward" in reason(ChangedBlock(8, 8).eval())
    block = RenamedBlock(8, 8).eval()
    fused = rf.fuse(block, strict=True)
    assert isinstance(fused, RenamedBlock) and compare(fused, block, torch.randn(1, 8, 5, 5)).ok
    model = ChangedResNet(tv.BasicBlock, [1, 1, 1, 1]).eval()
    fused = rf.fuse(model)
    assert "another forward" in rf.report(fused)["stem"].reason and type(fused) is ChangedResNet
    assert len(rf.report(fused).fused) == 4
    result = compare(fused, model, image())
    assert result.ok, result


def test_patched_forwards(monkeypatch):
    block = tv.BasicBlock(8, 8).eval()
    block.forward = lambda x: x
    assert "replaced on the instance" in reason_without_fusing(block)
    original = tv.BasicBlock.forward
    monkeypatch.setattr(tv.BasicBlock, "forward", lambda self, x: original(self, x) * 2)
    assert "another forward" in reason_without_fusing(tv.BasicBlock(8, 8))


def reason_without_fusing(block):
    (entry,) = rf.explain(block)
    assert entry.status == "skipped"
    return entry.reason


def test_explain_touches_nothing():
    model = small()
    before = {n: (id(p), p.stride(), p._version) for n, p in model.named_parameters()}
    types = [type(m) for m in model.modules()]
    report = rf.explain(model)
    assert {n: (id(p), p.stride(), p._version) for n, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == types
    assert report.to_dict() == rf.report(rf.fuse(model)).to_dict()
    assert {e.reason for e in rf.report(model)} == {"can be fused, but fuse was not asked to"}


def test_report_reads_well():
    model = small()
    model.layer2[0].relu = nn.GELU()
    report = rf.report(rf.fuse(model))
    assert len(report) == 6 and [e.name for e in report.skipped] == ["layer2.0"]
    assert report.to_dict()["fused"] == 5 and report.to_dict()["entries"][0]["kind"] == "stem"
    text = str(report)
    assert "layer2.0" in text and "GELU" in text and "5 fused, 1 left alone" in text
    assert "register_adapter" in str(rf.report(nn.Linear(2, 2)))
    with pytest.raises(KeyError):
        report["layer9"]


def test_strict():
    with pytest.raises(rf.FusionError, match=r"no residual block.*register_adapter"):
        rf.fuse(nn.Sequential(nn.Conv2d(3, 3, 3)), strict=True)
    model = small()
    model.layer2[0].relu = nn.GELU()
    with pytest.raises(rf.FusionError, match=r"layer2\.0 .*GELU"):
        rf.fuse_(model, strict=True)
    assert not rf.is_fused(model)
    rf.fuse_(model, strict=True, filter_fn=lambda name, module: name != "layer2.0")
    assert len(rf.report(model).fused) == 5


def test_filter():
    model = small()
    fused = rf.fuse(model, filter_fn=lambda name, module: name.startswith("layer3"))
    assert [e.name for e in rf.report(fused).fused] == ["layer3.0"]
    assert type(fused) is tv.ResNet
    assert compare(fused, model, image()).ok


def test_data_parallel():
    model = small()
    fused = rf.fuse(model)
    with torch.no_grad():
        assert torch.equal(nn.DataParallel(fused)(image()), fused(image()))
        replica = replicate(fused)
        assert torch.equal(replica(image()), fused(image()))
    assert type(replica) is type(fused) and not list(replica.parameters())


def replicate(model):
    """What DataParallel makes on each device: modules whose parameters are plain attributes."""
    modules = list(model.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        replica = replicas[id(m)]
        for name, child in m._modules.items():
            replica._modules[name] = None if child is None else replicas[id(child)]
        for name, parameter in m._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone())
    return replicas[id(model)]


def test_empty_batch_and_nan():
    model = small()
    fused = rf.fuse(model)
    with torch.no_grad():
        assert fused(torch.empty(0, 3, 40, 40)).shape == (0, 5)
        x = image()
        x[0, 0, 5, 5] = float("nan")
        assert torch.equal(fused.layer1(fused.conv1(x)).isnan(), model.layer1(model.conv1(x)).isnan())


def test_unfuse_says_when_it_cannot():
    fused = rf.fuse(bottleneck())
    fused.__class__ = type("Wrapped", (type(fused),), {})
    with pytest.raises(RuntimeError, match="class"):
        rf.unfuse(fused, inplace=True)


def test_verify():
    assert rf.verify(bottleneck(), torch.randn(2, 8, 7, 7)).ok
    with pytest.raises(rf.FusionError):
        rf.verify(nn.Linear(2, 2), torch.randn(1, 2))
