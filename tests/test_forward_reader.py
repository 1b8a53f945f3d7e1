"""Blocks of classes that are in no table: read from their forward, or registered."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion import adapters
from resnet_fused.testing.networks import compare, randomise_norms


class Parts(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.first = nn.Conv2d(inplanes, planes, 3, stride, 1)
        self.first_norm = nn.BatchNorm2d(planes)
        self.second = nn.Conv2d(planes, planes, 3, 1, 1)
        self.second_norm = nn.BatchNorm2d(planes)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride), nn.BatchNorm2d(planes))
        self.maybe = self.shortcut if len(self.shortcut) else None


class Functional(Parts):
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class Nested(Parts):
    def forward(self, x):
        """One expression."""
        out = self.second_norm(self.second(self.act(self.first_norm(self.first(x)))))
        return nn.ReLU(inplace=True)(self.shortcut(x) + out)


class Classic(Parts):
    def forward(self, x):
        residual = x
        out = self.first(x)
        out = self.first_norm(out)
        out = self.act(out)
        out = self.second(out)
        out = self.second_norm(out)
        if self.maybe is not None:
            residual = self.maybe(x)
        out += residual
        return self.act(out)


class ElseBranch(Parts):
    def forward(self, x):
        if self.maybe:  # noqa: SIM108
            identity = self.maybe(x)
        else:
            identity = x
        y = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return F.relu(y + identity, inplace=True)


class Sequentials(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(inplanes, planes, 1), nn.BatchNorm2d(planes), nn.ReLU(),
            nn.Sequential(nn.Conv2d(planes, planes, 3, stride, 1), nn.BatchNorm2d(planes), nn.ReLU()),
            nn.Conv2d(planes, planes, 1), nn.BatchNorm2d(planes),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride), nn.BatchNorm2d(planes))

    def forward(self, x):
        return F.relu(self.left(x) + self.shortcut(x))


TAKEN = [Functional, Nested, Classic, ElseBranch, Sequentials]


@pytest.mark.parametrize("cls", TAKEN)
@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 12, 2)], ids=["identity", "projection"])
def test_forward_is_read(cls, shape):
    block = randomise_norms(cls(*shape)).eval()
    fused = rf.fuse(block, strict=True)
    assert isinstance(fused, cls) and isinstance(fused, (rf.FusedBasicBlock, rf.FusedBottleneck))
    assert list(fused.state_dict()) == list(block.state_dict())
    x = torch.randn(2, 8, 7, 9)
    result = compare(fused, block, x)
    assert result.ok, result
    assert torch.equal(rf.unfuse(fused)(x), block(x))
    fused.train(), block.train()
    torch.testing.assert_close(fused(x), block(x))


class PreActivation(Parts):
    def forward(self, x):
        out = self.first(F.relu(self.first_norm(x)))
        out = self.second(F.relu(self.second_norm(out)))
        return out + self.shortcut(x)


class OtherActivation(Parts):
    def forward(self, x):
        out = F.gelu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(out)) + self.shortcut(x))


class Scaled(Parts):
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        return F.relu(0.5 * self.second_norm(self.second(out)) + self.shortcut(x))


class UnusedCall(Parts):
    def forward(self, x):
        seen = self.act(x)  # noqa: F841 (written in place)
        out = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(out)) + x)


class InputWrittenTo(Parts):
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        identity = x
        identity += self.second_norm(self.second(out))
        return F.relu(identity)


class Conditional(Parts):
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        if self.training:
            out = self.act(out)
        return F.relu(out + x)


class OtherShortcut(Parts):
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(out)) + self.shortcut(out))


class NoLastActivation(Parts):
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        return self.second_norm(self.second(out)) + x


class Decorated(Parts):
    @torch.no_grad()
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(out)) + x)


@pytest.mark.parametrize("cls", [
    PreActivation, OtherActivation, Scaled, UnusedCall, InputWrittenTo, Conditional, OtherShortcut, NoLastActivation,
    Decorated,
])  # fmt: skip
def test_other_forwards_are_not_taken(cls):
    block = cls(8, 8).eval()
    assert not rf.explain(block).fused
    assert type(rf.fuse(block)) is cls


def test_another_relu_of_that_name_is_not_taken():
    def fake(x):
        return x.sigmoid()

    namespace = {"F": type("F", (), {"relu": staticmethod(fake)}), "torch": torch}
    forward = type(Functional.forward)(Functional.forward.__code__, namespace)
    block = type("Faked", (Parts,), {"forward": forward})(8, 8).eval()
    assert not rf.explain(block).fused
    assert rf.explain(Functional(8, 8)).fused


def test_source_that_is_not_the_code_is_not_read():
    block = Functional(8, 8).eval()
    names = tuple("gelu" if n == "relu" else n for n in Functional.forward.__code__.co_names)
    edited = Functional.forward.__code__.replace(co_names=names)
    cls = type("Edited", (Parts,), {"forward": type(Functional.forward)(edited, globals())})
    assert rf.explain(block).fused
    assert not rf.explain(cls(8, 8).eval()).fused


def test_what_is_in_a_sequential_is_checked_when_it_runs():
    block = randomise_norms(Sequentials(8, 8)).eval()
    fused = rf.fuse(block)
    x = torch.randn(1, 8, 5, 5)
    for model in (block, fused):
        model.left.append(nn.Sigmoid())
    torch.testing.assert_close(fused(x), block(x))
    assert "left" in rf.report(fused)[""].reason


class Mine(Parts):
    def forward(self, x):
        out = self.inner(x)
        return F.relu(out + self.shortcut(x))

    def inner(self, x):
        return self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))


class MyChild(Mine):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.fixture
def registered():
    before = dict(adapters._REGISTERED)
    rf.register_adapter(
        Mine, convs=("first", "second"), norms=("first_norm", "second_norm"), shortcut="shortcut"
    )  # fmt: skip
    yield
    adapters._REGISTERED.clear()
    adapters._REGISTERED.update(before)


def test_register_adapter(registered):
    block = randomise_norms(Mine(8, 12, 2)).eval()
    assert rf.verify(block, torch.randn(2, 8, 6, 6)).ok
    assert isinstance(rf.fuse(copy.deepcopy(block)), rf.FusedBasicBlock)
    (entry,) = rf.explain(MyChild(8, 8))
    assert entry.status == "skipped" and "another forward" in entry.reason


def test_unregistered_class_is_not_taken():
    assert not len(rf.explain(Mine(8, 8)))
