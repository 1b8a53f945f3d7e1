"""Random networks of residual blocks and other things: fuse keeps what they compute, or leaves alone with a reason.

HYPOTHESIS_PROFILE=nightly takes 500 networks in place of 60.
"""

import copy

import hypothesis
import hypothesis.strategies as st
import optional
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.testing.networks import compare, randomise_norms

torchvision = optional.torchvision()
tv = torchvision.models.resnet
FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d

NETWORKS = max(60, hypothesis.settings.default.max_examples)

NORMS = {
    "bn": nn.BatchNorm2d,
    "plain-bn": lambda c: nn.BatchNorm2d(c, affine=False, eps=1e-3),
    "cumulative-bn": lambda c: nn.BatchNorm2d(c, momentum=None),
    "batch-bn": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "frozen": FrozenBatchNorm2d,
    "group": lambda c: nn.GroupNorm(1, c),
    "none": lambda c: nn.Identity(),
}
ACTS = {
    "relu": lambda: nn.ReLU(), "relu_": lambda: nn.ReLU(inplace=True), "silu": nn.SiLU, "relu6": nn.ReLU6,
    "none": nn.Identity,
}  # fmt: skip


class Own(nn.Module):
    """A block of a user's own, whose forward has one of several forms."""

    def __init__(self, width, form, conv, norm, act):
        super().__init__()
        self.a, self.b = conv(width, width), conv(width, width)
        self.n, self.m = norm(width), norm(width)
        self.act, self.form = act(), form

    def forward(self, x):
        y = self.act(self.n(self.a(x)))
        if self.form == "two-uses":
            z = self.b(y)
            return F.relu(self.m(z) + z)
        if self.form == "dense":
            return torch.cat([x, self.act(self.m(self.b(y)))], 1)[:, : x.shape[1]]
        if self.form == "in-place":
            out = self.m(self.b(y))
            out += x
            return torch.relu(out)
        if self.form == "pre":
            return self.b(F.relu(self.m(y))) + x
        if self.form == "gate":
            y = self.m(self.b(y))
            return F.relu(y * y.mean((2, 3), keepdim=True).sigmoid() + x, inplace=True)
        return F.relu(self.m(self.b(y)).add(x))


class Classic(nn.Module):
    """What the tutorials write."""

    def __init__(self, width, conv, norm):
        super().__init__()
        first, last = (conv(width, width), norm(width)), (conv(width, width), norm(width))
        self.left = nn.Sequential(*first, nn.ReLU(inplace=True), *last)
        self.shortcut = nn.Sequential()

    def forward(self, x):
        out = self.left(x)
        out = out + self.shortcut(x)
        return F.relu(out)


@st.composite
def layers(draw, width):
    """One layer from ``width`` channels, and how many come out."""
    norm = NORMS[draw(st.sampled_from([*["bn"] * 8, *NORMS]))]
    act = ACTS[draw(st.sampled_from([*["relu", "relu_"] * 3, *ACTS]))]
    kind = draw(st.sampled_from(["basic", "bottleneck", "own", "own", "classic", "conv"]))
    stride, dilation = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    if kind in ("basic", "bottleneck"):
        planes = draw(st.sampled_from([4, 8]))
        out = planes * (4 if kind == "bottleneck" else 1)
        downsample = None
        if stride != 1 or out != width or draw(st.booleans()):
            pool = [nn.AvgPool2d(stride, ceil_mode=True)] if draw(st.integers(0, 4)) == 0 else []
            own = 1 if pool else stride
            downsample = nn.Sequential(*pool, nn.Conv2d(width, out, 1, own, bias=draw(st.booleans())), norm(out))
        if kind == "basic":
            block = tv.BasicBlock(width, planes, stride, downsample, norm_layer=norm)
        else:
            block = tv.Bottleneck(width, planes, stride, downsample, groups, 64, dilation, norm_layer=norm)
        if draw(st.integers(0, 5)) == 0:
            block.relu = act()
        return block, out
    size, bias = draw(st.sampled_from([1, 3])), draw(st.booleans())
    mode = draw(st.sampled_from(["zeros"] * 5 + ["reflect"]))

    def conv(cin, cout, stride=1):
        pad = "same" if draw(st.integers(0, 5)) == 0 and stride == 1 else dilation * (size // 2)
        return nn.Conv2d(cin, cout, size, stride, pad, dilation, groups, bias, mode)

    if kind == "classic":
        return Classic(width, conv, norm), width
    if kind == "own":
        form = draw(st.sampled_from(["sum", "two-uses", "dense", "in-place", "pre", "gate"]))
        return Own(width, form, conv, norm, act), width
    out = draw(st.sampled_from([4, 8, 12]))
    return nn.Sequential(conv(width, out, stride), norm(out), act()), out


@st.composite
def networks(draw):
    """A network with random norms in eval mode, and an input for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.sampled_from([4, 8, 12]))
    first, parts = width, []
    for _ in range(draw(st.integers(1, 3))):
        layer, width = draw(layers(width))
        parts.append(layer)
    model = randomise_norms(nn.Sequential(*parts)).eval()
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(9, 17)), draw(st.integers(9, 17))
    return model, torch.randn(n, first, h, w)


def hook(model, index):
    """Watch one of the innermost modules; what it saw."""
    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    seen = []
    leaves[index % len(leaves)].register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    return seen


def same(state, other):
    return list(state) == list(other) and all(torch.equal(v, other[k]) for k, v in state.items())


def step(model, x):
    """Output, gradients and buffers after one step; eager's error counts where it raises."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(0, 1, out.numel(), dtype=x.dtype).view_as(out)).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [out.detach(), x.grad, *grads, *(b.clone() for b in model.buffers())]


@hypothesis.settings(max_examples=NETWORKS)
@hypothesis.given(
    made=networks(), generic=st.booleans(), hooked=st.sampled_from([None, None, None, 0, 1, 3, 5]),
    late=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    channels_last=st.booleans(), preserve=st.booleans(),
)  # fmt: skip
def test_random_networks(made, generic, hooked, late, dtype, channels_last, preserve):
    eager, x = made
    eager, x = eager.to(dtype), x.to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    state = {k: v.clone() for k, v in eager.state_dict().items()}
    kept = torch.preserve_format if preserve else torch.channels_last
    twin = copy.deepcopy(eager)
    theirs = hook(twin, hooked) if hooked is not None and not late else None
    fused = rf.fuse_(copy.deepcopy(eager), generic=generic, memory_format=kept)
    if hooked is not None and late:
        theirs, ours = hook(twin, hooked), hook(fused, hooked)
    elif theirs is not None:
        fused = copy.deepcopy(eager)
        ours = hook(fused, hooked)
        rf.fuse_(fused, generic=generic, memory_format=kept)
    report = rf.report(fused, generic=generic)
    assert all(e.reason or e.status == "fused" for e in report), str(report)
    assert same(fused.state_dict(), state)

    result = compare(fused, eager, x)
    assert result.ok, f"{result}\n{report}\n{eager}"
    with torch.no_grad():
        assert fused(x).stride() == twin(x).stride() or not preserve
        if theirs is not None:
            assert len(ours) == 2 * len(theirs)  # fused ran twice
        plain = rf.unfuse(fused)
        assert torch.equal(plain(x), eager(x)) and not rf.is_fused(plain)
        assert [p.stride() for p in plain.parameters()] == [p.stride() for p in eager.parameters()]

    fused, eager, x = fused.double(), copy.deepcopy(eager).double(), x.double()
    for training in (False, True):
        fused.train(training), eager.train(training)
        try:
            wanted = step(eager, x)
        except (RuntimeError, ValueError):  # one value per channel in training, or written to what autograd kept
            continue
        for ours_, theirs_ in zip(step(fused, x), wanted, strict=True):
            torch.testing.assert_close(ours_, theirs_)
