"""Networks on the CPU by one call of the compiled library (csrc/cpu/plan.cpp): steps, buffers and packed weights.

Images go from the first step to the last a few at a time. What lies between two steps is then small enough for the C
library's heap, which keeps it: larger buffers are taken from the system and given back at each use, page by page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import block, cpu_convolution, packed, workspace
from resnet_fused.ops.batch_norm_act import call as batch_norm_act
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, check_call, output_shape
from resnet_fused.ops.cpu_convolution import Convolution, Method
from resnet_fused.ops.layout import eager_strides, with_strides
from resnet_fused.tuning import lookup

# All buffers together: with half as many images the last stages' matrix products are small, and so slow.
BYTES = 36 << 20

_INPUT, _RESULT, _IDENTITY, _BUFFERS = range(4)
_CONVOLUTION, _MAX_POOL, _MEAN = range(3)
_NO_WINDOW = (1, 1, 1, 1, 0, 0, 1, 1)

Pair = tuple[int, int]
Shape = tuple[int, ...]


class Conv(NamedTuple):
    """relu(norm(conv(x)))"""

    conv: ConvBN


class MaxPool(NamedTuple):
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


class Mean(NamedTuple):
    """The mean of each channel, [N, C]; the last step of a network."""


class Residual(NamedTuple):
    """A residual block of the op ``name``, whose shortcut is a projection or x itself."""

    name: str
    convs: tuple[ConvBN, ...]
    shortcut: ConvBN | None


Step = Conv | MaxPool | Mean | Residual


def convs_of(steps: Iterable[Step]) -> list[ConvBN]:
    found: list[ConvBN] = []
    for step in steps:
        if isinstance(step, Conv):
            found.append(step.conv)
        elif isinstance(step, Residual):
            found += step.convs if step.shortcut is None else (*step.convs, step.shortcut)
    return found


def make(steps: Sequence[Step], x: Tensor, backend: str, channels_last: bool) -> CpuPlan | None:
    """A plan for inputs like ``x``, or None where somebody else computes one of the steps.

    Args:
        backend: that of the module which the steps are from.
        channels_last: whether feature maps become that, as in ``modules.parts.feature_map``.

    Raises:
        ValueError, TypeError: a step does not take its input.
    """
    workspace.adapt_heap()
    now, shape = x, tuple(x.shape)
    for step in steps:
        now = now.contiguous(memory_format=torch.channels_last) if channels_last and now.dim() == 4 else now
        if isinstance(step, Mean):
            now = now.new_empty(now.shape[:2])
        elif isinstance(step, MaxPool):
            shape = _pooled(step, tuple(now.shape))
            now = torch.empty(shape, dtype=x.dtype, memory_format=batch_norm_act.dense_format(now))
        elif not _serves(step, now, backend):
            return None
        elif isinstance(step, Conv):
            now = _like(output_shape(step.conv, now.shape), eager_strides(reference.eager, now, (step.conv,), None), x)
        else:
            strides = eager_strides(block.eager, now, (*step.convs, step.shortcut), None)
            shape = tuple(now.shape)
            for conv in step.convs:
                shape = output_shape(conv, shape)
            now = _like(shape, strides, x)
    return CpuPlan(steps, tuple(x.shape), x.dtype, now.stride())


def _like(shape: Shape, strides: Shape, x: Tensor) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=x.dtype)


def _serves(step: Conv | Residual, x: Tensor, backend: str) -> bool:
    """Whether the library's kernels compute this step: asked for by name, or by "auto"."""
    if backend not in (backends.AUTO, backends.Backend.CPU):
        return False
    if isinstance(step, Conv):
        name, call = "conv_bn_act", ConvBNActCall(x, step.conv, None, "relu")
        check_call(call)
    else:
        name, call = step.name, BlockCall(x, step.convs, step.shortcut, None)  # type: ignore[assignment]
        block.check_block(call)  # type: ignore[arg-type]
    found = lookup.find(name, call) if backend == backends.AUTO else None
    if found is not None and found.entry.backend != backends.Backend.CPU:
        return False
    return backends.refusal(name, backends.Backend.CPU, call) is None


def _pooled(pool: MaxPool, shape: Shape) -> Shape:
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape[2:], *pool, strict=True)
    ]  # fmt: skip
    reach = [d * (k - 1) + 1 for k, d in zip(pool.kernel, pool.dilation, strict=True)]
    if any(p > r // 2 for p, r in zip(pool.padding, reach, strict=True)):
        raise ValueError(f"padding: got {pool.padding}, need at most half of a window of {pool.kernel}")
    if min(sizes) < 1:
        raise ValueError(f"x: got an image of {shape[2]}x{shape[3]}, need one that a pool of {pool.kernel} fits in")
    return (*shape[:2], *sizes)


class CpuPlan:
    """The steps for inputs of one shape and dtype, as long as nobody writes to the tensors that they name."""

    def __init__(self, steps: Sequence[Step], shape: Shape, dtype: torch.dtype, strides: Shape) -> None:
        self._steps, self._shape, self._dtype, self._strides = steps, shape, dtype, strides
        self._exact: frozenset[int] = frozenset()
        self._handle = self._make()

    def __call__(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        out, refused = torch.ops.resnet_fused_cpu.plan_run.default(self._handle, x, identity)
        while refused >= 0:  # Winograd's method is not for this input: from now on with the direct sum at hand
            self._exact |= {refused}
            self._handle = self._make()
            out, refused = torch.ops.resnet_fused_cpu.plan_run.default(self._handle, x, identity)
        return out if out.stride() == self._strides else with_strides(out, self._strides)

    def _make(self) -> Tensor:
        n = self._shape[0]
        layout = _Layout(self._steps, self._shape, self._dtype, n, self._exact)
        images = layout.images()
        if images < n:
            layout = _Layout(self._steps, self._shape, self._dtype, images, self._exact)
        return packed.outside_of_modes(layout.create, images)  # type: ignore[no-any-return]


class _Layout:
    """What csrc/cpu/plan.cpp takes: every step's integers and tensors, and which buffers they use.

    images: how many are under way at a time, as far as that decides by which method a convolution is computed.
    """

    def __init__(
        self, steps: Sequence[Step], shape: Shape, dtype: torch.dtype, images: int, exact: frozenset[int]
    ) -> None:
        self._dtype, self._exact, self._count = dtype, exact, 0
        self._all, self._shape = shape[0], (images, *shape[1:])
        self._sizes: list[int] = []  # of the buffers, in bytes of one image
        self._free: set[int] = set()
        self._packed: list[Tensor] = []
        self._integers: list[int] = []
        at, now = _INPUT, self._shape
        for i, step in enumerate(steps):
            at, now = self._add(step, at, now, i + 1 == len(steps))

    def images(self) -> int:
        """How many images to take at a time: all, or even shares whose buffers stay small."""
        n, each = self._all, max(self._sizes, default=1)
        most = max(1, min(BYTES // max(1, sum(self._sizes)), workspace.LARGEST_BUFFER // each))
        return -(-n // -(-n // most))

    def create(self, images: int) -> Tensor:
        head = [int(self._dtype == torch.bfloat16), *self._shape[1:], images, len(self._sizes), *self._sizes]
        return torch.ops.resnet_fused_cpu.plan_create.default(  # type: ignore[no-any-return]
            self._packed, [*head, self._count, *self._integers]
        )

    def _add(self, step: Step, at: int, shape: Shape, last: bool) -> tuple[int, Shape]:
        """Place and shape of what the step gives."""
        if isinstance(step, Residual):
            return self._residual(step, at, shape, last)
        out: Shape
        if isinstance(step, Conv):
            out = output_shape(step.conv, shape)
            to = self._take(out, last)
            self._convolve(step.conv, shape, at, to, None, relu=True)
        elif isinstance(step, MaxPool):
            out = _pooled(step, shape)
            to = self._take(out, last)
            self._step(_MAX_POOL, at, to, None, False, Method.DIRECT, sum(step, ()), [])
        else:
            out, to = (*shape[:2], 1, 1), _RESULT
            self._step(_MEAN, at, to, None, False, Method.DIRECT, _NO_WINDOW, [])
        self._give(at)
        return to, out

    def _residual(self, step: Residual, at: int, shape: Shape, last: bool) -> tuple[int, Shape]:
        hidden, now = at, shape
        out: Shape
        for conv in step.convs[:-1]:
            out = output_shape(conv, now)
            to = self._take(out, False)
            self._convolve(conv, now, hidden, to, None, relu=True)
            if hidden != at:
                self._give(hidden)
            hidden, now = to, out
        conv, residual = step.convs[-1], at
        out = output_shape(conv, now)
        to = self._take(out, last)
        if step.shortcut is not None:
            # The sum is written into the projection where it can be done over: see csrc/cpu/plan.cpp.
            in_place = self._method(conv, now) == Method.DIRECT
            residual = to if in_place else self._take(out, False)
            self._convolve(step.shortcut, shape, at, residual, None, relu=False)
        self._convolve(conv, now, hidden, to, residual, relu=True)
        for place in {hidden, residual, at} - {to}:
            self._give(place)
        return to, out

    def _method(self, conv: ConvBN, shape: Shape) -> Method:
        return cpu_convolution.method_for(conv, self._dtype, shape)

    def _convolve(self, conv: ConvBN, shape: Shape, at: int, to: int, residual: int | None, *, relu: bool) -> None:
        method = self._method(conv, shape)
        step = Convolution(conv, method)
        tensors = list(step.packed)
        if self._count in self._exact:
            tensors.append(Convolution(conv, Method.DIRECT).packed[0])
        self._step(_CONVOLUTION, at, to, residual, relu, method, step.geometry[1:], tensors)

    def _step(
        self, kind: int, at: int, to: int, residual: int | None, relu: bool, method: Method,
        window: Sequence[int], tensors: list[Tensor],
    ) -> None:  # fmt: skip
        added = -1 if residual is None else residual
        self._integers += [kind, at, to, added, int(relu), int(method), *window, len(tensors)]
        self._packed += tensors
        self._count += 1

    def _take(self, shape: Shape, last: bool) -> int:
        """A place for a tensor of this shape: the result's, or the free buffer that fits best."""
        if last:
            return _RESULT
        size = shape[1] * shape[2] * shape[3] * self._dtype.itemsize
        free = sorted(self._free, key=lambda i: (self._sizes[i] < size, abs(self._sizes[i] - size)))
        if not free:
            self._sizes.append(size)
            return _BUFFERS + len(self._sizes) - 1
        self._free.remove(free[0])
        self._sizes[free[0]] = max(self._sizes[free[0]], size)
        return _BUFFERS + free[0]

    def _give(self, place: int) -> None:
        if place >= _BUFFERS:
            self._free.add(place - _BUFFERS)
