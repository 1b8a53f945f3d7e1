"""Properties of conv_bn_act and add_relu on random problems, for every backend that runs here.

HYPOTHESIS_PROFILE=nightly takes twenty times as many. ``library/compiled_properties.py`` runs those of conv_bn_act on
the compiled library's own ops.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import devices
import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import resnet_fused.functional as rf
from resnet_fused import backends
from resnet_fused.ops import onednn
from resnet_fused.testing.budget import assert_within_budget, measure

DEVICE = devices.DEVICE
BACKENDS = [
    b
    for b in (backends.AUTO, *backends.NAMES)
    if b == backends.AUTO or backends.unavailable(b) is None or (devices.HERE and b in devices.BACKENDS)
]
FORMATS = (torch.contiguous_format, torch.channels_last)
LAYOUTS = ("contiguous", "channels_last", "gaps", "offset", "turned")
SPECIALS = (math.nan, math.inf, -math.inf)
ENOUGH = 1024  # outputs from which eager's own error is told; with fewer it is a matter of luck
PROBLEMS = hypothesis.settings.default.max_examples

pytestmark = [
    *devices.PREFERRED,
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # the interpreter computes with NumPy
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


@dataclass(frozen=True, repr=False)
class Problem:
    """A call of conv_bn_act. Its own images are the first ``n`` of x; the others are there to tell eager's error."""

    n: int
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    residual: Tensor | None
    geometry: dict[str, Any]
    act: str
    layouts: tuple[str, str]

    def __repr__(self) -> str:
        given = [k for k in ("bias", "bn_weight", "bn_bias", "residual") if getattr(self, k) is not None]
        x, vectors = self.x, str(self.mean.dtype).removeprefix("torch.")
        return (
            f"{x.dtype} n={self.n} x={tuple(x.shape)} w={tuple(self.weight.shape)} {self.geometry} {self.act} "
            f"{' '.join(given)} eps={self.eps} layouts={self.layouts} vectors={vectors} "
            f"special={not x.isfinite().all()}"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def fused(self, backend: str) -> Tensor | None:
        """The problem's own images by ``backend``, or None when that backend was named and refuses, saying so."""
        p = self.own()
        try:
            return rf.conv_bn_act(
                p.x, p.weight, p.bn_weight, p.bn_bias, p.mean, p.var, p.eps, p.residual, bias=p.bias, act=p.act,
                backend=backend, **p.geometry,
            )  # fmt: skip
        except backends.BackendError as error:
            assert backend not in (backends.AUTO, "reference") and backend in str(error)
            g = {"act": p.act, "groups": p.geometry["groups"], "dilation": p.geometry["dilation"]}
            if p.n:
                devices.assert_may_refuse(backend, p.x.dtype, str(error), channels=p.weight.shape[:2], **g)
            return None

    def eager(self, by_onednn: bool = False) -> Tensor:
        """All images in eager PyTorch; if asked with a oneDNN convolution, which eager itself picks above some size."""
        x, bias = self.x, None if self.bias is None else self.bias.to(self.x.dtype)
        if by_onednn:
            g = self.geometry
            y = torch.ops.aten.mkldnn_convolution(
                x, self.weight, bias, g["padding"], g["stride"], g["dilation"], g["groups"]
            )
        else:
            y = F.conv2d(x, self.weight, bias, **self.geometry)
        y = F.batch_norm(y, self.mean, self.var, self.bn_weight, self.bn_bias, False, 0.0, self.eps)
        y = y if self.residual is None else y + self.residual
        return F.relu(y) if self.act == "relu" else y

    def map(self, change: Any) -> Problem:
        """The problem with every tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: change(t) for k, t in tensors.items() if isinstance(t, Tensor)})

    def own(self) -> Problem:
        """The problem without the images that are not its own, in its layouts."""
        residual = None if self.residual is None else laid_out(self.residual[: self.n], self.layouts[1])
        return dataclasses.replace(self, x=laid_out(self.x[: self.n], self.layouts[0]), residual=residual)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout: "gaps" between elements, "offset" by one element, the last axes "turned"."""
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "gaps" and t.dim():
        return torch.stack([t, torch.full_like(t, 777.0)], -1).flatten(-2)[..., ::2]
    if layout == "offset":
        return torch.cat([t.new_full((1,), 777.0), t.reshape(-1)])[1:].view(t.shape)
    if layout == "turned" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return t.contiguous()


def in_format(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t


def window_in_padding(kernel: Any, padding: Any, dilation: Any) -> bool:
    """Whether some output sees nothing but padding."""
    sides = () if isinstance(padding, str) else zip(kernel, padding, dilation, strict=True)
    return any(p > d * (r - 1) for r, p, d in sides)


@st.composite
def problems(draw: Any, dtypes: tuple[torch.dtype, ...], specials: bool = True) -> Problem:
    """Any convolution that eager takes, with at least one output: degenerate sizes, one-sided "same" padding, …"""

    def number(low: int, high: int) -> int:
        return int(draw(st.integers(low, high)))

    def pair(low: int, high: int) -> tuple[int, int]:
        return number(low, high), number(low, high)

    generator = torch.Generator().manual_seed(number(0, 2**16))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def vector(low: float, high: float) -> Tensor:
        return (torch.rand(k, generator=generator) * (high - low) + low).to(DEVICE, of_vectors)

    dtype = draw(st.sampled_from(dtypes))
    of_vectors = draw(st.sampled_from([dtype, torch.float32])) if dtype.itemsize < 4 else dtype
    kernel, dilation, stride = pair(1, 4), pair(1, 2), pair(1, 3)
    padding: Any = pair(0, 3)
    if draw(st.integers(0, 4)) == 0:
        padding, stride = draw(st.sampled_from([("same", (1, 1)), ("valid", stride)]))
    pads = {"same": (9, 9), "valid": (0, 0)}.get(padding, padding) if isinstance(padding, str) else padding
    least = [max(1, d * (r - 1) + 1 - 2 * p) for d, r, p in zip(dilation, kernel, pads, strict=True)]
    height, width = (low + number(0, 8) for low in least)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_group, k = number(1, 12), groups * number(1, 12)
    if DEVICE == "cpu" and dtype != torch.float64:
        # There eager is at fault: oneDNN leaves its memory where a window lies wholly in the padding, and, in half
        # precision, in a column of depthwise outputs whose strides differ.
        hypothesis.assume(not window_in_padding(kernel, padding, dilation))
        hypothesis.assume(dtype.itemsize > 2 or per_group > 1 or groups == 1 or stride[0] == stride[1])
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight = normal(k, per_group, *kernel) / math.sqrt(per_group * kernel[0] * kernel[1])
    shape = (groups * per_group, height, width)
    outputs = F.conv2d(torch.empty(1, *shape, device="meta"), weight.to("meta"), **geometry).shape[1:]
    n = number(0, 3)
    images = n + -(-ENOUGH // outputs.numel())
    scale = 10.0 ** (number(-2, 1) if dtype == torch.float16 else number(-3, 3))
    x = normal(images, *shape) * scale
    residual = normal(images, *outputs) * scale if draw(st.booleans()) else None
    affine = draw(st.booleans())
    problem = Problem(
        n,
        x.to(DEVICE, dtype),
        in_format(weight.to(DEVICE, dtype), draw(st.sampled_from(FORMATS))),
        vector(-0.5, 0.5) if draw(st.booleans()) else None,
        vector(-1.5, 1.5) if affine else None,
        vector(-0.5, 0.5) if affine else None,
        vector(-0.5, 0.5),
        vector(0.1, 2.0),
        draw(st.sampled_from([1e-5, 1e-3])),
        None if residual is None else residual.to(DEVICE, dtype),
        geometry,
        draw(st.sampled_from(["relu", "none"])),
        (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
    )
    if specials and n and draw(st.integers(0, 3)) == 0:
        problem.x[0, number(0, shape[0] - 1), number(0, height - 1), number(0, width - 1)] = draw(
            st.sampled_from(SPECIALS)
        )
    return problem


def eagers(p: Problem, exact: Tensor) -> list[Tensor]:
    """Eager's results in both memory formats and by oneDNN, all images at a time and the problem's own alone.

    Where NaN comes of an infinity that no pixel meets with zero, or leaks into its neighbours, as in bfloat16 on a CPU,
    also as they are without that.
    """
    ways = [(f, False) for f in FORMATS]
    if DEVICE == "cpu" and onednn._refused_dtype(p.x.dtype) is None and not isinstance(p.geometry["padding"], str):
        ways.append((torch.channels_last, True))
    found = []
    for memory_format, by_onednn in ways:
        both = (p, p.own()) if p.n else (p,)  # aten::mkldnn_convolution itself crashes on an empty batch
        whole, *own = (q.map(lambda t, f=memory_format: in_format(t, f)).eager(by_onednn) for q in both)
        found += [whole, torch.cat([*own, whole[p.n :]])]
    leaks = [(torch.isfinite(y) != torch.isfinite(exact)) | (y.isnan() != exact.isnan()) for y in found]
    return found + [torch.where(at, exact.to(y.dtype), y) for y, at in zip(found, leaks, strict=True) if at.any()]


def assert_right(out: Tensor, p: Problem, own: int) -> None:
    """The first ``own`` images, ``out``, are within the budget that one of eager's results allows."""
    exact = p.map(Tensor.double).eager()
    errors = [measure(torch.cat([out, eager[own:]]), eager, exact) for eager in eagers(p, exact)]
    assert any(error.ok for error in errors), errors


def significant(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, without the dimensions of size one, whose stride means nothing."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def check_conv(p: Problem, backend: str) -> None:
    """Values within the budget, and eager's shape, strides and dtype; or a refusal by a backend that was named."""
    eager, out = p.own().eager(), p.fused(backend)
    if out is None:
        return
    assert out.shape == eager.shape and out.dtype == eager.dtype
    assert significant(out) == significant(eager)
    assert_right(out, p, p.n)


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """Those in which the backend has something of its own to show."""
    wide = () if backend in ("onednn", "cpu", "triton", "cudnn", "cuda") else (torch.float64,)
    return (torch.float32, torch.bfloat16, torch.float16, *wide)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=6 * PROBLEMS)
@given(data=st.data())
def test_conv_bn_act_is_eager(backend: str, data: st.DataObject) -> None:
    check_conv(data.draw(problems(dtypes_of(backend))), backend)


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN computes on the CPU")
def test_onednn_refuses_a_window_in_the_padding() -> None:
    """It crashes there, in eager too once a problem is large; a small one must not."""
    for kernel, padding in (((1, 3), (1, 1)), ((3, 2), (2, 2)), ((2, 2), (0, 3))):
        x, weight, vector = torch.randn(2, 4, 5, 6), torch.randn(3, 4, *kernel), torch.rand(3) + 0.5
        with pytest.raises(backends.BackendError, match="as wide as the filter"):
            rf.conv_bn_act(x, weight, None, None, vector, vector, padding=padding, backend="onednn")
        eager = F.relu(F.batch_norm(F.conv2d(x, weight, None, 1, padding), vector, vector))
        torch.testing.assert_close(rf.conv_bn_act(x, weight, None, None, vector, vector, padding=padding), eager)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=3 * PROBLEMS)
@given(p=problems((torch.float32, torch.bfloat16), specials=False))
def test_an_image_does_not_depend_on_its_neighbours(backend: str, p: Problem) -> None:
    """What stands in the other images of a batch, NaN too, changes nothing in this one beyond the budget."""
    x = p.x.clone()
    x[1 : p.n] = math.nan
    out = dataclasses.replace(p, x=x).fused(backend)
    if out is None or p.n < 2:
        return
    assert_right(out[:1], p, 1)


@hypothesis.settings(max_examples=3 * PROBLEMS)
@given(p=problems((torch.float64,), specials=False))
def test_gradients_of_conv_bn_act_are_eagers(p: Problem) -> None:
    p = p.own()
    names = [k for k in ("x", "weight", "bias", "bn_weight", "bn_bias", "residual") if getattr(p, k) is not None]
    for name in names:
        getattr(p, name).requires_grad_()
    leaves = [getattr(p, name) for name in names]
    ours, theirs = (
        torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).to(DEVICE))
        for out in (p.fused("auto"), p.eager())
    )
    for name, got, want in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@st.composite
def addends(draw: Any, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape, of any number of dimensions, each in a layout of its own."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=5)))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor() -> Tensor:
        t = (torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-8, 5))).to(DEVICE, dtype)
        if t.numel() and draw(st.integers(0, 3)) == 0:
            t.view(-1)[draw(st.integers(0, t.numel() - 1))] = draw(st.sampled_from([*SPECIALS, 0.0, -0.0]))
        if shape and shape[0] > 1 and draw(st.integers(0, 5)) == 0:
            return t[:1].expand(shape)
        return laid_out(t, draw(st.sampled_from(LAYOUTS)))

    return tensor(), tensor()


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=6 * PROBLEMS)
@given(data=st.data())
def test_add_relu_is_eager(backend: str, data: st.DataObject) -> None:
    a, b = data.draw(addends(dtypes_of(backend)))
    want = F.relu(a + b)
    try:
        out = rf.add_relu(a, b, backend=backend)
    except backends.BackendError as error:
        assert backend not in (backends.AUTO, "reference") and backend in str(error)
        if a.numel() and backend != "cudnn":
            devices.assert_may_refuse(backend, a.dtype, str(error))
        return
    assert_within_budget(out, want, F.relu(a.double() + b.double()))
    assert out.stride() == want.stride()


@given(pair=addends((torch.float64,)))
def test_gradients_of_add_relu_are_eagers(pair: tuple[Tensor, Tensor]) -> None:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in pair]
    ours, theirs = (
        torch.autograd.grad(out.sum(), leaves) for out in (rf.add_relu(*leaves), F.relu(leaves[0] + leaves[1]))
    )
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)
