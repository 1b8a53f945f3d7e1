"""fuse(generic=True): chains in the forwards of modules that no adapter knows."""

import copy
import pickle
import random

import optional
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.modules.traced import FusedForward
from resnet_fused.testing.networks import compare, randomise_norms

models = optional.torchvision().models

COUNTS = {  # of convolutions with a norm behind, and of sums
    "efficientnet_b0": 49, "densenet121": 59, "mobilenet_v3_small": 34, "shufflenet_v2_x0_5": 56, "mnasnet0_5": 52,
}  # fmt: skip


def conv_norm(cin=8, cout=8, **options):
    return nn.Conv2d(cin, cout, 3, padding=1, **options), nn.BatchNorm2d(cout)


def image(n=2, c=8, size=9):
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(3))


def ready(model):
    return randomise_norms(model).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_other_networks(name):
    torch.manual_seed(0)
    eager = ready(getattr(models, name)(num_classes=5))
    fused = rf.fuse(eager, generic=True)
    report = rf.report(fused)
    assert not report.skipped, str(report)
    assert len([e for e in report if e.kind == "conv_bn_act"]) == COUNTS[name]
    assert rf.explain(eager, generic=True).to_dict() == report.to_dict()
    assert list(fused.state_dict()) == list(eager.state_dict())
    x = torch.randn(2, 3, 64, 64)
    calls = count_calls(lambda: fused(x))
    assert calls == COUNTS[name]
    result = compare(fused, eager, x)
    assert result.ok, result
    with torch.no_grad():
        assert torch.equal(rf.unfuse(fused, inplace=True)(x), eager(x))
    assert not rf.is_fused(fused) and [type(m) for m in fused.modules()] == [type(m) for m in eager.modules()]


def count_calls(run):
    """How often the op ran; a dispatch mode would see eager's."""
    with torch.no_grad(), torch.profiler.profile() as seen:
        run()
    return sum(event.count for event in seen.key_averages() if event.key == "resnet_fused::conv_bn_act")


def test_a_sum_goes_with_the_convolution_before_it():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(8, 8, 1), nn.Sequential(*conv_norm()), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(x + self.b(self.a(x)))

    block = ready(Sum())
    fused = rf.fuse(block, generic=True)
    assert [e.kind for e in rf.report(fused).fused] == ["conv_bn_act"]
    assert compare(fused, block, image()).ok and not rf.report(fused).skipped


class Head(nn.Module):
    """Anything between convolutions: its forward is each test's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = conv_norm()
        self.conv2, self.bn2 = conv_norm()
        self.relu = nn.ReLU(inplace=True)
        self.flag, self.p, self.calls = True, 0.5, 0
        ready(self)


class Plain(Head):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return F.relu(self.bn2(self.conv2(y)) + y)


class UsesMiddle(Head):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y)) + y


class InPlaceSum(Head):
    def forward(self, x):
        out = self.bn(self.conv(x))
        identity = self.bn2(self.conv2(x))
        out += identity
        return self.relu(out)


class SumIntoInput(Head):
    def forward(self, x):
        x += self.bn(self.conv(x))
        return torch.relu(x)


class Branch(Head):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if self.flag else y


class Training(Head):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return F.dropout(y, self.p, self.training)


class InputMutated(Head):
    """The input of a convolution is written to before its norm is reached."""

    def forward(self, x):
        x = x.clone()
        y = self.conv(x)
        x.add_(1)
        return self.relu(self.bn(y)) + x


class TwoTerms(Head):
    """The convolution's input is written to before the sum is reached."""

    def forward(self, x):
        h = self.relu(self.bn2(self.conv2(x)))
        y = self.bn(self.conv(h))
        z = h.mul_(2)
        return F.relu(y + z)


TRAINABLE = [Plain, InPlaceSum, Branch, Training]  # the others write to what autograd has kept


@pytest.mark.parametrize(("cls", "training"), [
    *((c, False) for c in (*TRAINABLE, InputMutated, TwoTerms)), *((c, True) for c in TRAINABLE),
], ids=lambda v: getattr(v, "__name__", str(v)))  # fmt: skip
def test_computes_what_the_forward_says(cls, training):
    eager = cls()
    fused = rf.fuse(eager, generic=True, memory_format=torch.preserve_format)
    assert rf.report(fused).fused and isinstance(fused, cls)
    if not training:
        assert compare(lambda_clone(fused), lambda_clone(eager), image()).ok
        return
    eager.train(), fused.train()
    grads = []
    for model in (eager, fused):
        torch.manual_seed(1)
        x = image().requires_grad_()
        model(x * 1).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(fused.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b)


def lambda_clone(model):
    """The model on a copy of its input: some write to it."""

    class OnCopy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.clone())

    return OnCopy()


def test_attributes_that_the_forward_reads_may_change():
    eager = Branch()
    fused = rf.fuse(eager, generic=True)
    eager.flag = fused.flag = False
    assert compare(fused, eager, image()).ok
    assert "flag" in rf.report(fused)["conv"].reason
    assert bool((fused(image()) < 0).any())
    fused.flag = True
    assert rf.report(fused)["conv"].status == "fused"


class Random(Head):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if random.random() < self.p else y


class Counts(Head):
    def forward(self, x):
        self.calls += 1
        return self.relu(self.bn(self.conv(x)))


class NoGrad(Head):
    def forward(self, x):
        with torch.no_grad():
            return self.relu(self.bn(self.conv(x)))


class Decorated(Head):
    @torch.no_grad()
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class DecoratedPart(Head):
    @torch.no_grad()
    def part(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return self.relu(self.part(x))


class Shape(Head):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if x.shape[2] > 3 else y


class Noise(Head):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + torch.rand(1)


class GradMode(Head):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if torch.is_grad_enabled() else y


class Collects(Head):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        self.kept.append(1)
        return self.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize(("cls", "text"), [
    (Random, "random"), (Counts, "writes an attribute"), (NoGrad, "with statement"), (Decorated, "decorated"),
    (DecoratedPart, "torch.utils._contextlib"),
    (Shape, "control flow"), (Noise, "rand"), (GradMode, "is_grad_enabled"), (Collects, "reads kept, a list"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_forwards_that_no_trace_stands_for(cls, text):
    eager = cls()
    fused = rf.fuse(eager, generic=True)
    (entry,) = rf.report(fused, generic=True)
    assert fused.calls == 0 and not getattr(fused, "kept", None)  # what a forward leaves behind, tracing does not
    assert type(fused) is cls and entry.status == "skipped" and text in entry.reason, entry


def test_a_forward_that_writes_to_its_argument_is_left_alone():
    eager = SumIntoInput().eval()
    fused = rf.fuse(eager, generic=True)
    (entry,) = rf.report(fused, generic=True)
    assert entry.status == "skipped" and "writes to an argument" in entry.reason
    ours, theirs = image(), image()
    with torch.no_grad():
        assert torch.equal(fused(ours), eager(theirs)) and torch.equal(ours, theirs)


def test_a_value_used_twice_is_left_alone():
    eager = UsesMiddle()
    fused = rf.fuse(eager, generic=True)
    (entry,) = rf.report(fused, generic=True)
    assert entry.status == "skipped" and "also used by" in entry.reason
    assert compare(fused, eager, image()).ok


@pytest.mark.parametrize("part", ["conv", "bn", "relu"])
def test_hooks_before_and_after(part):
    eager, seen = Plain(), []
    hooked = copy.deepcopy(eager)
    getattr(hooked, part).register_forward_hook(lambda *_: seen.append(1))
    before = rf.fuse(hooked, generic=True)
    assert compare(before, eager, image()).ok and len(seen) == 1
    fused = rf.fuse(eager, generic=True)
    getattr(fused, part).register_forward_hook(lambda *_: seen.append(1))
    assert compare(fused, eager, image()).ok and len(seen) == 2
    if part != "relu":
        assert "hooks" in rf.report(fused)["conv"].reason


def test_a_part_replaced_after_fusion_is_used():
    fused = rf.fuse(Plain(), generic=True)
    fused.relu = nn.SiLU()
    assert compare(fused, rf.unfuse(fused), image()).ok


def test_layers_added_to_a_sequential_are_run():
    eager = ready(nn.Sequential(*conv_norm(), nn.ReLU()))
    fused = rf.fuse(eager, generic=True)
    assert len(rf.report(fused).fused) == 1 and isinstance(fused, nn.Sequential)
    for model in (eager, fused):
        model.append(nn.Sigmoid())
    assert compare(fused, eager, image()).ok


def test_tensors_and_lists():
    layer = ready(models.densenet.DenseNet(8, (1,), 16)).features.denseblock1.denselayer1
    fused = rf.fuse(layer, generic=True)
    x = torch.randn(2, 16, 5, 5)
    for given in (x, [x[:, :8], x[:, 8:]]):
        assert count_calls(lambda given=given: fused(given)) == 1
        torch.testing.assert_close(fused(given), layer(given))


def test_keyword_arguments_and_defaults():
    class Scaled(Head):
        def forward(self, x, scale=None):
            y = self.relu(self.bn(self.conv(x)))
            return y if scale is None else y * scale

    eager = Scaled()
    fused = rf.fuse(eager, generic=True)
    x = image()
    assert count_calls(lambda: fused(x=x)) == 1
    with torch.no_grad():
        torch.testing.assert_close(fused(x, 3.0), eager(x, scale=3.0))


def test_copies_and_pickles():
    eager, x = Plain(), image()
    fused = rf.fuse(eager, generic=True)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(other, FusedForward) and isinstance(other, Plain)
        assert rf.report(other).to_dict() == rf.report(fused).to_dict()
        with torch.no_grad():
            assert torch.equal(other(x), fused(x)) and torch.equal(rf.unfuse(other)(x), eager(x))


def test_filter_and_backend():
    fused = rf.fuse(Plain(), generic=True, backend="reference", filter_fn=lambda name, module: name != "conv2")
    assert [(e.name, e.status, e.backend) for e in rf.report(fused)] == [
        ("conv", "fused", "reference"), ("conv2", "skipped", ""), ("add", "fused", "reference"),
    ]  # fmt: skip
    again = rf.fuse(fused, generic=True)
    assert [e.status for e in rf.report(again)] == ["fused"] * 3


@pytest.mark.parametrize("compiled", ["compile", "export"])
def test_compiles(compiled):
    model = nn.Sequential(Plain(), Branch())
    fused = rf.fuse(model, generic=True)
    if compiled == "compile":
        torch._dynamo.reset()
        run = torch.compile(fused, fullgraph=True, backend="aot_eager")
    else:
        program = torch.export.export(fused, (image(),), strict=False)
        assert [str(n.target) for n in program.graph.nodes].count("resnet_fused.conv_bn_act.default") == 3
        run = program.module()
    with torch.no_grad():
        torch.testing.assert_close(run(image()), fused(image()))


class Alias(Head):
    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        z = y
        y += 1
        return self.bn2(self.conv2(y)) + z


class Arithmetic(Head):
    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        z = y
        y -= 1
        y *= 3
        y /= 2
        y **= 2
        y[:, 0] = 0
        return y + z


class IntoInput(Head):
    def forward(self, x):
        x *= 2
        return F.relu(self.bn(self.conv(x)))


class OutArgument(Head):
    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        torch.add(y, 1, out=y)
        return F.relu(self.bn2(self.conv2(y)) + y)


class WideSum(Head):
    """A sum in place keeps its own dtype."""

    def forward(self, x):
        y = self.bn(self.conv(F.relu(self.bn2(self.conv2(x)))))
        y += x.double()
        return F.relu(y)


class Viewed(Head):
    """The strides of eager: a view of them works, and is written through."""

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        v = y.view(-1)
        v += 1
        return y


@pytest.mark.parametrize("cls", [Alias, Arithmetic, IntoInput, OutArgument, WideSum, Viewed])
def test_writes_keep_their_order_and_aliases(cls):
    eager = cls()
    fused = rf.fuse(eager, generic=True)
    assert cls is IntoInput or rf.report(fused).fused
    x, other = image(), image()
    with torch.no_grad():
        wanted, got = eager(x), fused(other)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(x, other)


class Seeds(Head):
    def forward(self, x):
        torch.manual_seed(0)
        return self.relu(self.bn(self.conv(x)))


class Threads(Head):
    def forward(self, x):
        torch.set_num_threads(torch.get_num_threads())
        return self.relu(self.bn(self.conv(x)))


class SetsMode(Head):
    def forward(self, x):
        self.bn2.eval()
        return self.relu(self.bn(self.conv(x)))


class Default(Head):
    def forward(self, x, seen=[]):  # noqa: B006
        seen.append(1)
        return self.relu(self.bn(self.conv(x)))


class Same(Head):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        z = self.bn2(y)
        return y if z is y else z


class CallsTwice(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) + 1


class OwnCall(Head):
    def __init__(self):
        super().__init__()
        self.extra = CallsTwice(8, 8, 1)

    def forward(self, x):
        return self.extra(self.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize(("cls", "text"), [
    (Seeds, "manual_seed"), (Threads, "num_threads"), (SetsMode, "eval"), (Default, "default"), (Same, "same object"),
    (OwnCall, "__call__"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_forwards_that_do_more_than_compute_are_left_alone(cls, text):
    eager = cls()
    eager.bn2.train()
    fused = rf.fuse(eager, generic=True)
    (entry,) = rf.report(fused, generic=True)
    assert entry.status == "skipped" and text in entry.reason, entry
    assert fused.bn2.training and not (cls.forward.__defaults__ or ([],))[0]
    with torch.no_grad():
        assert torch.equal(fused(image()), eager(image()))


def halved(x):
    return F.relu(x) * 0.5


class Helper(Head):
    def forward(self, x):
        return self.part(halved(self.bn(self.conv(x))))

    def part(self, x):
        return self.bn2(self.conv2(x))


@pytest.mark.parametrize("place", ["global", "method", "instance", "forward"])
def test_functions_bound_anew_after_fusion(monkeypatch, place):
    eager = Helper()
    fused = rf.fuse(eager, generic=True)
    assert len(rf.report(fused).fused) == 2
    if place == "global":
        monkeypatch.setitem(globals(), "halved", lambda x: x - 3)
    elif place == "method":
        monkeypatch.setattr(Helper, "part", lambda self, x: x - 3)
    elif place == "forward":
        monkeypatch.setattr(Helper, "forward", lambda self, x: x - 3)
    else:
        for model in (eager, fused):
            model.part = lambda x: x - 3
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), eager(image()), rtol=0, atol=0)
    assert place == "forward" or not rf.report(fused).fused


def test_a_name_that_hides_a_submodule(monkeypatch):
    eager = Plain()
    fused = rf.fuse(eager, generic=True)
    other = nn.Conv2d(8, 8, 1)
    monkeypatch.setattr(Plain, "conv", property(lambda self: other), raising=False)
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), eager(image()))


def test_a_trace_of_a_fused_module_is_of_its_own_forward():
    fused = rf.fuse(nn.Sequential(Plain()), generic=True)
    with torch.no_grad():
        graph = torch.fx.symbolic_trace(fused)
        assert {str(n.target) for n in graph.graph.nodes if n.op == "call_module"} >= {"0.conv", "0.bn", "0.conv2"}
        torch.testing.assert_close(graph(image()), fused(image()))
        traced = torch.jit.trace(fused, image(), check_trace=False)
        assert "conv_norm_act" not in str(traced.graph) and "resnet_fused::" not in str(traced.graph)
        torch.testing.assert_close(traced(image()), fused(image()))


def test_norms_toggled_between_calls():
    eager = Plain()
    fused = rf.fuse(eager, generic=True)
    for training in (True, False, True, False):
        for model in (eager, fused):
            model.bn.train(training)
        with torch.no_grad():
            torch.testing.assert_close(fused(image()), eager(image()))
