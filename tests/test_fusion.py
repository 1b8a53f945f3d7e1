"""fuse, unfuse and their reports on torchvision's models and on blocks of users' own."""

import concurrent.futures
import copy
import io
import pickle

import optional
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import resnet_fused as rf
from resnet_fused.testing.networks import compare, randomise_norms

torchvision = optional.torchvision()
tv = torchvision.models.resnet
FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d

BLOCKS = {
    "resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50, "resnext50_32x4d": 16,
    "resnext101_32x8d": 33, "resnext101_64x4d": 33, "wide_resnet50_2": 16, "wide_resnet101_2": 33,
}  # fmt: skip


def image(n=2, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def small(block=tv.Bottleneck, **options):
    """A torchvision ResNet of four blocks, in eval mode."""
    torch.manual_seed(0)
    return randomise_norms(tv.ResNet(block, [1, 1, 1, 1], num_classes=5, **options)).eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", BLOCKS)
def test_torchvision_models(name):
    torch.manual_seed(0)
    # A hundred outputs, for the budget is twice eager's worst error, and the worst of a few is a matter of luck.
    eager = randomise_norms(getattr(torchvision.models, name)(num_classes=50)).eval()
    keys = list(eager.state_dict())
    fused = rf.fuse(eager)
    report = rf.report(fused)
    assert not report.skipped, str(report)
    assert len(report.fused) == BLOCKS[name] + 1
    assert report["stem"].kind == "stem"
    assert list(fused.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), eager.state_dict().values(), strict=True))
    x = image(2, 64)
    result = compare(fused, eager, x)
    assert result.ok, result
    with torch.no_grad():
        expected = eager(x)
        assert torch.equal(rf.unfuse(fused, inplace=True)(x), expected)
    assert not rf.is_fused(fused)


@pytest.mark.parametrize("block", [tv.BasicBlock, tv.Bottleneck])
def test_frozen_norms_give_eagers_gradients(block):
    eager = small(block)
    fused = rf.fuse(eager)
    exact = copy.deepcopy(eager).double()
    x = image()
    for model, data in ((eager, x), (fused, x), (exact, x.double())):
        model(data).square().sum().backward()
    for (name, p), q, r in zip(fused.named_parameters(), eager.parameters(), exact.parameters(), strict=True):
        error, budget = (p.grad.double() - r.grad).abs().max(), (q.grad.double() - r.grad).abs().max()
        assert error <= 4 * budget + 1e-5 * r.grad.abs().max(), name


def test_training_step_is_eagers():
    eager = small().train()
    fused = rf.fuse(eager, memory_format=torch.preserve_format)
    for model in (eager, fused):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for seed in range(2):
            optimizer.zero_grad()
            x = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            optimizer.step()
    assert same_state(fused.state_dict(), eager.state_dict())
    assert compare(fused.eval(), eager.eval(), image()).ok


def test_evaluates_fresh_weights_after_each_way_of_writing_them():
    fused, x = rf.fuse(small()), image()

    def check():
        result = compare(fused, rf.unfuse(fused), x)
        assert result.ok, result

    check()
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(1.1)
    check()
    fused.load_state_dict(small().state_dict(), strict=True)
    check()
    fused.load_state_dict({k: v * 0.9 for k, v in fused.state_dict().items()}, strict=True, assign=True)
    check()
    fused.train()(x)
    fused.eval()
    check()
    for p in fused.parameters():
        p.data.mul_(0.8)
    rf.refresh(fused)
    check()
    fused.to(torch.float64).to(torch.float32)
    check()


def test_to_bfloat16_after_fusing():
    eager = small(tv.BasicBlock)
    fused = rf.fuse(eager).to(torch.bfloat16)
    result = compare(fused, eager.to(torch.bfloat16), image().bfloat16())
    assert result.ok, result


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_fused_and_can_be_unfused(way):
    eager, x = small(), image()
    fused = rf.fuse(eager)
    if way == "deepcopy":
        other = copy.deepcopy(fused)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert len(rf.report(other).fused) == 5
    with torch.no_grad():
        assert torch.equal(other(x), fused(x))
        assert torch.equal(rf.unfuse(other)(x), eager(x))
    assert other.conv1.weight is not fused.conv1.weight
    assert type(rf.unfuse(other)) is tv.ResNet


def test_identity_and_layout():
    eager = small()
    parameters, before = list(eager.parameters()), state(eager)
    storages = [(p.data_ptr(), p.stride(), p._version) for p in parameters]

    def untouched() -> bool:
        return [(p.data_ptr(), p.stride(), p._version) for p in eager.parameters()] == storages

    assert rf.fuse_(eager) is eager
    assert all(a is b for a, b in zip(eager.parameters(), parameters, strict=True))
    assert same_state(eager.state_dict(), before) and untouched()
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        assert eager.layer1(eager.relu(eager.bn1(eager.conv1(x)))).is_contiguous(memory_format=torch.channels_last)
        rf.fuse_(eager, memory_format=torch.preserve_format)
        assert eager.layer1(eager.relu(eager.bn1(eager.conv1(x)))).is_contiguous()
    rf.unfuse(eager, inplace=True)
    assert untouched()


def test_not_in_place_leaves_the_model_alone():
    eager = small()
    before, strides = state(eager), [p.stride() for p in eager.parameters()]
    rf.fuse(eager)
    report = rf.explain(eager)
    assert len(report.fused) == 5 and not report.skipped
    assert not rf.is_fused(eager) and type(eager) is tv.ResNet
    assert same_state(eager.state_dict(), before) and [p.stride() for p in eager.parameters()] == strides
    assert len(rf.report(eager).skipped) == 5


def test_stem_modules_can_still_be_called():
    eager, x = small(), image()
    fused = rf.fuse(eager)
    with torch.no_grad():
        torch.testing.assert_close(fused.conv1(x), eager.conv1(x))


def test_outer_hooks_stay_and_their_handles_work():
    eager, calls = small(), []
    handle = eager.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    rf.fuse_(eager)
    eager(image())
    assert calls == ["block"] and rf.report(eager)["layer1.0"].status == "fused"
    handle.remove()
    eager(image())
    assert calls == ["block"]


def test_inner_hooks_are_seen_before_and_after_fusing():
    eager, calls = small(), []
    eager.layer1[0].conv2.register_forward_hook(lambda *_: calls.append("before"))
    fused = rf.fuse_(eager)
    entry = rf.report(fused)["layer1.0"]
    assert entry.status == "skipped" and "conv2 has hooks" in entry.reason
    fused.layer2[0].bn1.register_forward_pre_hook(lambda *_: calls.append("after"))
    fused.relu.register_forward_hook(lambda *_: calls.append("stem"))
    fused(image())
    assert sorted(calls) == ["after", "before", "stem"]
    assert "bn1 has hooks" in rf.report(fused)["layer2.0"].reason


def test_a_block_used_twice_stays_one_object():
    block = randomise_norms(tv.BasicBlock(8, 8))
    model = nn.Sequential(block, nn.ReLU(), block).eval()
    fused = rf.fuse(model)
    assert fused[0] is fused[2] and len(rf.report(fused).fused) == 1
    assert compare(fused, model, torch.randn(1, 8, 6, 6)).ok


def test_the_model_may_be_a_block():
    block = randomise_norms(tv.Bottleneck(16, 4)).eval()
    fused = rf.fuse(block)
    assert isinstance(fused, rf.FusedBottleneck) and isinstance(fused, tv.Bottleneck)
    assert rf.verify(fused, torch.randn(1, 16, 5, 5)).ok


def test_data_parallel():
    eager, x = small(), image()
    fused = rf.fuse(eager)
    with torch.no_grad():
        assert torch.equal(nn.DataParallel(fused)(x), fused(x))
        block = fused.layer1[0]
        replica = block._replicate_for_data_parallel()
        for name, child in block._modules.items():  # as torch.nn.parallel.replicate: parameters become attributes
            twin = None if child is None else child._replicate_for_data_parallel()
            replica._modules[name] = twin
            if twin is not None and not isinstance(child, nn.Sequential):
                twin._parameters = {}
                for key, p in child._parameters.items():
                    setattr(twin, key, None if p is None else p.detach().clone())
        h = torch.randn(1, 64, 6, 6)
        torch.testing.assert_close(replica(h), block(h))


def test_threads_share_a_model():
    fused = rf.fuse(small())
    inputs = [torch.randn(1, 3, 32 + 4 * (i % 3), 32) for i in range(12)]
    with torch.no_grad():
        expected = [rf.unfuse(fused)(x) for x in inputs]

    def run(x):
        with torch.no_grad():
            return fused(x)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for out, wanted in zip(pool.map(run, inputs), expected, strict=True):
            torch.testing.assert_close(out, wanted)


def changed(path, new):
    """A model of one bottleneck with a part of it replaced."""
    block = randomise_norms(tv.Bottleneck(16, 8, 1, nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32))))
    block.set_submodule(path, new)
    return block.eval()


class MyNorm(nn.BatchNorm2d):
    pass


REFUSED = {
    "group-norm": ("bn2", lambda: nn.GroupNorm(2, 8), "GroupNorm"),
    "norm-subclass": ("bn2", lambda: MyNorm(8), "MyNorm"),
    "no-statistics": ("bn2", lambda: nn.BatchNorm2d(8, track_running_stats=False), "no running statistics"),
    "activation": ("relu", lambda: nn.GELU(), "GELU"),
    "padding-mode": ("conv2", lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    "parametrized": ("conv2", lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), "parametrized"),
    "pruned": ("conv2", lambda: prune.random_unstructured(nn.Conv2d(8, 8, 3, padding=1), "weight", 0.5), "hooks"),
    "spectral": ("conv2", lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)), "hooks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_left_alone_with_a_reason(case):
    path, new, reason = REFUSED[case]
    block = changed(path, new())
    (entry,) = rf.explain(block)
    assert entry.status == "skipped" and reason in entry.reason and path in entry.reason
    assert not rf.is_fused(rf.fuse_(block))
    with pytest.raises(rf.FusionError, match="strict=True"):
        rf.fuse_(block, strict=True)
