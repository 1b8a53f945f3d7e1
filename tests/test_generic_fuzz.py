"""Random forwards, written as source text: fuse(generic=True) keeps what they compute, write and leave behind.

HYPOTHESIS_PROFILE=nightly takes 3,000 networks in place of 120.
"""

import copy
import itertools
import random
import sys
import types

import hypothesis
import pytest
import torch

import resnet_fused as rf
from resnet_fused.testing.networks import randomise_norms

NETWORKS = 120 if hypothesis.settings.default.max_examples < 100 else 3000
C = 4
HEADER = """
import torch
import torch.nn.functional as F
from torch import nn

SEEN = []


def helper(t):
    return F.relu(t) * 0.5


def logs(t):
    return t


logs.log = []


class Pair(nn.Module):
    def forward(self, x):
        return (t for t in (x, x * 0.5))


class Nothing(nn.Module):
    def forward(self, x):
        return None


class InPlace(nn.Module):
    def forward(self, x):
        x *= 0.5
        return x


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(4, 4, 1)

    def __call__(self, x):
        return super().__call__(x) + 1

    def forward(self, x):
        return self.c(x)


class Net(nn.Module):
    LOG = []

    def __init__(self):
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c1, self.n1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.c2, self.n2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.act, self.act_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.seq = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(inplace=True)))
        self.pre = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.pool, self.drop, self.empty = nn.AvgPool2d(3, 1, 1), nn.Dropout(0.3), nn.Sequential()
        self.write, self.called = InPlace(), Called()
        self.pair, self.nothing, self.tied = Pair(), Nothing(), self.n0.bias
        self.flag, self.count, self.kept = True, 0, []

    def part(self, t):
        return self.n1(self.c1(t))

"""
# A statement, with a for a value to read, b for another, o for the name to bind.
PLAIN = [
    "{o} = self.n0(self.c0({a}))", "{o} = self.n1(self.c1({a}))", "{o} = self.n2(self.c2({a}))",
    "{o} = self.act(self.n0(self.c0({a})))", "{o} = F.relu(self.n1(self.c1({a})) + {b})",
    "{o} = self.act_(self.n2(self.c2({a})) + {b})", "{o} = self.act({a})", "{o} = self.act_({a})", "{o} = F.relu({a})",
    "{o} = torch.relu({a})", "{o} = {a}.relu_()", "{o} = F.relu({a}, inplace=True)", "{o} = {a} + {b}",
    "{o} = torch.relu({a} + {b})", "{a} += {b}", "{a} -= 0.5", "{a} *= 1.5", "{a} /= 2",
    "{a} += {b}; {o} = F.relu({a})",
    "{o} = {a}", "{o} = {a}.clone()", "{a}[:, 0] = 0", "{a}[:, 1] += 1", "v = {a}[:, :2]; v += 1",
    "v = {a}.reshape(-1); v += 1", "v = {a}.view(-1) if {a} is not None else 0; {o} = {a} * v.mean()",
    "{a}.add_({b})", "{o} = {a}.add({b})", "{o} = torch.add({a}, {b}, alpha=2)", "{a}.data.mul_(0.5)",
    "{o} = torch.cat([{a}, {b}], 1)[:, 2:6]", "{o} = self.seq({a})", "{o} = self.pre({a})", "{o} = self.pool({a})",
    "{o} = self.drop({a})", "{o} = F.dropout({a}, 0.3, self.training)", "{o} = self.empty({a})",
    "{o} = self.write({a})", "{o} = self.called({a})", "{o} = self.part({a})", "{o} = helper({a})",
    "{o} = {a} * 0.5 if self.flag else {b}", "{o} = {a} if {a} is {b} else {a} + {b}",
    "{o} = F.relu(self.n0(self.c0({a})) + {b}.mean((2, 3), keepdim=True))", "{o} = {a} * self.n0.running_mean.sum()",
    "k = {a}.shape[2]; m = k; k += 1; {o} = {a} * m * 0.2", "v = {a}.mT; v += 1", "v = {a}.data; v += 1",
    "{o}, v = self.pair({a}); v += 1", "{o} = {a} if self.nothing({a}) is None else {b}", "{o} = {{{a}: {b}}}[{a}]",
    "v = self.c0({a}); self.tied.add_(0.1); {o} = F.relu(self.n0(v))", "{o} = {a}.relu().relu_()",
    "{o} = sum(t for t in ({a}, {b}))", "{o} = [{a}, {b}][::-1][0]", "{o} = F.relu(self.n2(self.c2({a})) + {a}.mean())",
    "torch.add({a}, {b}, out={a})", "torch.mul({a}, 0.5, out={a})", "{o}, _ = ({a} * 2).chunk(1, 0)[0], 0",
]  # fmt: skip
EFFECTS = [
    "self.count += 1", "self.kept.append(1)", "SEEN.append(1)", "Net.LOG.append(1)",
    "self.__class__.LOG.append(1)", "owner = Net; owner.LOG.append(1)", "logs.log.append(1)",
    "torch.manual_seed(5)", "self.n0.eval()",
    "{o} = torch.rand_like({a}) + {a}", "torch.set_grad_enabled(False)", "self.n1.running_mean.add_(0.1)",
    "self.act.register_forward_hook(lambda *_: SEEN.append(2))",
]  # fmt: skip
# Random numbers and copies go by the order of memory, which channels_last changes also where a child is fused.
ORDERED = ("drop", "rand_like", "reshape", ".view(")
_NUMBER = itertools.count()


def forward_text(rng):
    lines, names = ["x = x * 1" if rng.random() < 0.7 else "pass"], ["x"]
    for n in range(rng.randint(2, 8)):
        pool = EFFECTS if rng.random() < 0.04 else PLAIN
        chosen = rng.choice(pool[:14]) if pool is PLAIN and rng.random() < 0.45 else rng.choice(pool)
        out = f"y{n}" if rng.random() < 0.6 else rng.choice(names)
        a, b = (rng.choice(names[-2:]) if rng.random() < 0.7 else rng.choice(names) for _ in range(2))
        lines.append(chosen.format(o=out, a=a, b=b))
        if f"{out} =" in lines[-1] and out not in names:
            names.append(out)
    result = names[-1] if rng.random() < 0.4 else " + ".join(rng.sample(names, min(len(names), 2)))
    return "    def forward(self, x):\n" + "".join(f"        {line}\n" for line in [*lines, f"return {result}"])


def network(text):
    """The module of that source text, imported under a name of its own, and its namespace."""
    module = types.ModuleType(f"made_network_{next(_NUMBER)}")
    sys.modules[module.__name__] = module
    exec(compile(HEADER + text, module.__name__, "exec"), vars(module))
    return module


def outcome(model, module, x, seed):
    """What a call gives, and all that it leaves behind; the error's type where it raises."""
    for log in (module.SEEN, module.Net.LOG, module.logs.log):
        log.clear()
    torch.manual_seed(seed)
    x = x.clone()
    try:
        out = model(x).detach().clone()
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error), []
    finally:
        grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
    left = [
        model.count,
        list(model.kept),
        list(module.SEEN),
        list(module.Net.LOG),
        list(module.logs.log),
        grad,
        [m.training for m in model.modules()],
    ]
    return left, [out, x, torch.rand(3), *(b.clone().double() for b in model.buffers())]


def gradients(model, x, seed):
    """The result and the gradients of a step; None where eager has none to give."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = model(x * 1)
    (out * torch.linspace(0.5, 1, out.numel()).view_as(out)).sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [torch.zeros(()) if t is None else t for t in found]


def check_gradients(eager, fused, x, seed, frozen, text):
    """On copies; what eager refuses (writes to what autograd keeps) is nobody's loss."""
    eager, fused = copy.deepcopy(eager), copy.deepcopy(fused)
    for model in (eager, fused):
        model.train(seed % 2 == 0)
        for p in model.parameters():
            p.requires_grad_(not frozen)
    try:
        wanted = gradients(eager, x, seed)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return
    for a, b in zip(gradients(fused, x, seed), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=2e-3, msg=lambda m: f"{seed} gradients\n{m}\n{text}")


def check(seed):
    rng = random.Random(seed)
    text = forward_text(rng)
    module = network(text)
    try:
        torch.manual_seed(seed)
        eager = randomise_norms(module.Net()).eval()
        ordered = any(word in text for word in ORDERED)
        kept = torch.preserve_format if ordered else rng.choice([torch.channels_last, torch.preserve_format])
        fused = rf.fuse_(copy.deepcopy(eager), generic=True, memory_format=kept)
        assert fused.count == 0 and not (fused.kept or module.SEEN or module.Net.LOG or module.logs.log), (
            text
        )  # tracing leaves nothing behind
        x = torch.randn(rng.choice([1, 2]), C, 5, 6)
        if rng.random() < 0.4:
            with torch.enable_grad():
                check_gradients(eager, fused, x, seed, rng.random() < 0.3, text)
            torch.set_grad_enabled(True)
        for change in ("", "", "train", "flag", "norm", "helper"):
            if change == "train":
                eager.train(), fused.train()
            elif change == "flag":
                eager.eval(), fused.eval()
                eager.flag = fused.flag = False
            elif change == "norm":
                eager.n0.train(), fused.n0.train()
            elif change == "helper":
                module.helper = lambda t: t - 3
            with torch.no_grad():
                (left, wanted), (ours, got) = outcome(eager, module, x, seed), outcome(fused, module, x, seed)
            assert ours == left, (seed, change, ours, left, text)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=2e-3, atol=2e-4, msg=lambda m, c=change: f"{seed} {c}\n{m}\n{text}"
                )
        return any(e.status == "fused" for e in rf.report(fused))
    finally:
        del sys.modules[module.__name__]
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("part", range(4))
def test_random_forwards(part):
    # With the nightly profile the networks are others each time; a failure names its seed.
    start = 0 if NETWORKS == 120 else random.SystemRandom().randrange(2**30)
    each = NETWORKS // 4
    for n in range(each):
        check(start + part * each + n)
