"""fuse(generic=True): what a trace by torch.fx would get wrong without a word, and what changes after it was taken."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.testing.networks import randomise_norms


class Gives(nn.Module):
    """Gives something other than a tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "generator":
            return (t for t in (x, x + 1))
        return {"dict": {0: x, 1: x + 1}, "three": (x, x, x), "none": None, "number": 2.0}[self.kind]


class Head(nn.Module):
    LOG = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.relu, self.idle = nn.ReLU(inplace=True), nn.Identity()
        self.tied = self.bn.bias
        for kind in ("generator", "dict", "three", "none", "number"):
            self.add_module(kind, Gives(kind))
        randomise_norms(self).eval()

    def part(self, x):
        return self.relu(self.bn(self.conv(x)))


def image():
    return torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(3))


def outcome(model, x):
    with torch.no_grad():
        try:
            out = model(x)
        except (TypeError, ValueError, RuntimeError) as error:
            return type(error)
    return out


def agree(fused, eager):
    for _ in range(2):
        got, wanted = outcome(fused, image()), outcome(eager, image())
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        else:
            assert got is wanted


class SizeIsACopy(Head):
    """A number is not written to in place: the other name keeps the old one."""

    def forward(self, x):
        height = x.shape[2]
        before = height
        height += 1
        return self.part(x) * before


class ProductIsACopy(Head):
    """Tensors have no product in place: ``@=`` makes a new one."""

    def forward(self, x):
        y = self.part(x)
        z = y
        y @= y
        return z


class Transposed(Head):
    """An attribute of a value may be a view of its memory."""

    def forward(self, x):
        y = self.part(x)
        v = y.mT
        v += 1
        return y


class Data(Head):
    def forward(self, x):
        y = self.part(x)
        v = y.data
        v *= 3
        return y


class IsNone(Head):
    def forward(self, x):
        y = self.none(self.part(x))
        return self.part(x) if y is None else x


class IsNotNone(Head):
    def forward(self, x):
        y = self.none(self.part(x))
        if y is not None:
            return x
        return self.part(x)


class NoGradient(Head):
    def forward(self, x):
        return x if x.grad is None else self.part(x)


class AsKey(Head):
    def forward(self, x):
        y = self.part(x)
        z = self.idle(y)
        return y if z in {y: 1} else x


class UnpacksDict(Head):
    def forward(self, x):
        a, _ = self.dict(self.part(x))
        return x * a


class UnpacksGenerator(Head):
    def forward(self, x):
        a, b = self.generator(self.part(x))
        return a + b


class UnpacksTooFew(Head):
    def forward(self, x):
        a, b = self.three(self.part(x))
        return a + b


class UnpacksShape(Head):
    def forward(self, x):
        n, c = x.shape
        return self.part(x) * n * c


class AddsNumber(Head):
    def forward(self, x):
        return self.relu(self.bn(self.conv(self.conv2(x))) + self.number(x))


class TiedBetween(Head):
    """A parameter of the norm, by another name, is written to before the norm reads it."""

    def forward(self, x):
        y = self.conv(x)
        self.tied.add_(1)
        return F.relu(self.bn(y))


FORMS = [
    SizeIsACopy, ProductIsACopy, Transposed, Data, IsNone, IsNotNone, NoGradient, AsKey, UnpacksDict, UnpacksGenerator,
    UnpacksTooFew, UnpacksShape, AddsNumber, TiedBetween,
]  # fmt: skip


@pytest.mark.parametrize("cls", FORMS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_values_are_what_eager_makes_of_them(cls, training):
    eager = cls()
    fused = rf.fuse(eager, generic=True)
    agree(fused.train(training), eager.train(training))
    for a, b in zip(fused.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_an_argument_is():
    class Asks(Head):
        def forward(self, x):
            y = x[0] if isinstance(x, list) else x
            return self.part(y)

    eager = Asks()
    fused = rf.fuse(eager, generic=True)
    for given in (image(), [image(), image()], (image(), image()), nn.Parameter(image())):
        got, wanted = outcome(fused, given), outcome(eager, given)
        assert got is wanted if isinstance(wanted, type) else torch.allclose(got, wanted, 1e-3, 1e-4)


def test_a_size_beside_a_numbered_submodule():
    class Sized(Head):
        def __init__(self):
            super().__init__()
            self.side = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + self.side(x)) * x.shape[0]

    eager = Sized().eval()
    fused = rf.fuse(eager, generic=True)
    assert rf.report(fused).fused
    agree(fused, eager)


def test_a_list_that_is_returned_twice_stays_one():
    class Twice(Head):
        def forward(self, x):
            found = [self.part(x)]
            return found, found

    with torch.no_grad():
        a, b = rf.fuse(Twice(), generic=True)(image())
    assert a is b


def keeps(x):
    return x * 2


keeps.log = []


class LogsInClass(Head):
    def forward(self, x):
        self.__class__.LOG.append(1)
        return self.part(x)


class LogsInNamedClass(Head):
    def forward(self, x):
        Head.LOG.append(1)
        return self.part(x)


class LogsInAlias(Head):
    def forward(self, x):
        owner = Head
        owner.LOG.append(1)
        return self.part(x)


class LogsInFunction(Head):
    def forward(self, x):
        keeps.log.append(1)
        return self.part(x)


@pytest.mark.parametrize("cls", [LogsInClass, LogsInNamedClass, LogsInAlias, LogsInFunction])
def test_what_classes_and_functions_keep(cls):
    log = keeps.log if cls is LogsInFunction else Head.LOG
    log.clear()
    eager = cls()
    fused = rf.fuse(eager, generic=True)
    assert not log  # fusing leaves nothing behind
    agree(fused, eager)
    assert len(log) == 4
    log.clear()


def scaled(x, factor=2):
    return x * factor


class Calls(Head):
    def forward(self, x):
        return scaled(self.part(x))

    def part(self, x):
        return self.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("change", ["code", "defaults", "method's code", "forward's code"])
def test_functions_whose_insides_are_replaced(monkeypatch, change):
    """As reloaders do in notebooks: the function object stays."""
    eager = Calls()
    fused = rf.fuse(eager, generic=True)
    assert rf.report(fused).fused
    if change == "defaults":
        monkeypatch.setattr(scaled, "__defaults__", (5,))
    elif change == "code":
        monkeypatch.setattr(scaled, "__code__", (lambda x, factor=2: x - 3).__code__)
    else:
        function = Calls.part if change.startswith("method") else Calls.forward
        monkeypatch.setattr(function, "__code__", (lambda self, x: x - 3).__code__)
    agree(fused, eager)
    assert not rf.report(fused).fused


class CallsOnce(Head):
    def forward(self, x):
        return scaled(self.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize(
    ("cls", "change"),
    [(Calls, None), (CallsOnce, None), (CallsOnce, "scaled"), (Calls, "part"), (CallsOnce, "forward")],
)
def test_a_pickle_read_where_the_source_is_another(monkeypatch, cls, change):
    eager = pickle.dumps(cls())
    fused = pickle.dumps(rf.fuse(cls(), generic=True))
    if change == "scaled":
        monkeypatch.setitem(globals(), "scaled", lambda x: x - 3)
    elif change is not None:
        monkeypatch.setattr(cls, change, lambda self, x: x - 3)
    fused = pickle.loads(fused)
    agree(fused, pickle.loads(eager))
    if change is None:
        assert [e.status for e in rf.report(fused)] == ["fused"]
        monkeypatch.setitem(globals(), "scaled", lambda x: x - 3)  # and afterwards it is seen too
        agree(copy.deepcopy(fused), pickle.loads(eager))
