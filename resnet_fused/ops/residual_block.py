"""A residual block in training mode as one op that keeps less for its gradient: what is cheap is computed again.

Kept are the block's input, the raw output of each convolution (of the last one too only with "activations") and the
statistics. Normalised activations are computed again in the backward pass, by batch_norm_act without running
statistics: these move once, in the forward pass.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops import library
from resnet_fused.ops.batch_norm_act import api as batch_norm_act
from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall
from resnet_fused.ops.convbn import check_addend, check_input

RECOMPUTE = ("activations", "last_conv")
_SLOTS = 4  # three convolutions, fewer in a basic block, and the projection


class ConvNorm(NamedTuple):
    """A convolution with its batch norm, whose mode says which statistics it uses; as ConvBN and BatchNormCall."""

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def conv(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def norm(self, x: Tensor, act: str, residual: Tensor | None = None) -> BatchNormCall:
        return BatchNormCall(
            x, self.bn_weight, self.bn_bias, self.running_mean, self.running_var, self.num_batches_tracked, residual,
            self.training, self.momentum, self.eps, act,
        )  # fmt: skip


class ResidualBlock(NamedTuple):
    """``relu(norm_n(conv_n(… relu(norm_1(conv_1(x))) …)) + shortcut)``.

    shortcut projects x; identity is added as it is; with neither, x is added.
    """

    x: Tensor
    convs: tuple[ConvNorm, ...]
    shortcut: ConvNorm | None
    identity: Tensor | None

    def parameters(self) -> list[Tensor | None]:
        """x, identity, and the four parameters of each convolution with its norm: what may want a gradient."""
        found: list[Tensor | None] = [self.x, self.identity]
        for pair in self.pairs():
            found += pair[:4]
        return found

    def pairs(self) -> tuple[ConvNorm, ...]:
        return self.convs if self.shortcut is None else (*self.convs, self.shortcut)


def _schema() -> str:
    parts = ["Tensor x", "Tensor? identity"]
    for slot in range(_SLOTS):
        parts += [f"Tensor? {name}{slot}" for name in ConvNorm._fields[:4]]
        for i, name in enumerate(ConvNorm._fields[4:7]):
            parts.append(f"Tensor({'abcdefghijkl'[3 * slot + i]}!)? {name}{slot}")
        parts += [f"bool training{slot}", f"float? momentum{slot}", f"float eps{slot}"]
        parts += [f"int[2] {name}{slot}" for name in ("stride", "padding", "dilation")] + [f"int groups{slot}"]
    return f"({', '.join(parts)}, str recompute, str backend)"


_WIDTH = len(ConvNorm._fields)
_NO_PAIR = (None,) * 7 + (False, None, 0.0, (1, 1), (0, 0), (1, 1), 1)

# What writes to arguments may not return a list. Kept are the raw outputs by slot, of no elements where there is
# nothing to keep, and the statistics: means and 1/√(var + eps) of all norms that take the batch's, [2, channels].
_RESULT = f"(Tensor output, {', '.join(f'Tensor raw{slot}' for slot in range(_SLOTS))}, Tensor statistics)"
OP = library.define("residual_block", f"{_schema()} -> {_RESULT}")
_CONSTANT = re.sub(r"\([a-l]!\)", "", _schema())  # the gradient writes nothing
BACKWARD = library.define(
    "residual_block_backward", f"(Tensor grad, Tensor[] kept, bool[] wanted, {_CONSTANT[1:]} -> Tensor[]"
)


def call_op(block: ResidualBlock, recompute: str, backend: str) -> Tensor:
    """Call the registered op."""
    return OP(*_flat(block), recompute, backend)[0]  # type: ignore[no-any-return]


def _flat(block: ResidualBlock) -> list[Any]:
    flat: list[Any] = [block.x, block.identity]
    empty = (_NO_PAIR,) * (_SLOTS - 1 - len(block.convs))
    for pair in (*block.convs, *empty, block.shortcut or _NO_PAIR):
        flat += [*pair]  # Dynamo of torch 2.11 adds lists to lists alone
    return flat


def _unpack(args: Any) -> ResidualBlock:
    pairs: list[ConvNorm | None] = []
    for slot in range(_SLOTS):
        fields = list(args[2 + slot * _WIDTH : 2 + (slot + 1) * _WIDTH])
        fields[10:13] = map(tuple, fields[10:13])  # the dispatcher gives lists
        pairs.append(None if fields[0] is None else ConvNorm(*fields))
    return ResidualBlock(args[0], tuple(p for p in pairs[:-1] if p is not None), pairs[-1], args[1])


def _check(block: ResidualBlock, recompute: str) -> None:
    check_input(block.x)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, need None or one of {RECOMPUTE}")


def _forward(block: ResidualBlock, recompute: str, norm: Any) -> tuple[Tensor, ...]:
    """The output, and what is kept."""
    _check(block, recompute)
    raws = [block.x.new_empty(0) for _ in range(_SLOTS)]
    statistics: list[list[Tensor]] = []
    hidden, *early, last = block.x, *block.convs
    for i, pair in enumerate(early):
        raws[i] = pair.conv(hidden)
        hidden, *found = norm(pair.norm(raws[i], "relu"))
        statistics.append(found)
    raw = last.conv(hidden)
    if recompute == "activations":
        raws[len(early)] = raw
    residual, projected = block.x if block.identity is None else block.identity, []
    if block.shortcut is not None:
        raws[-1] = block.shortcut.conv(block.x)
        residual, *projected = norm(block.shortcut.norm(raws[-1], "none"))
    check_addend(residual, tuple(raw.shape), raw, "shortcut")  # type: ignore[arg-type]
    output, *found = norm(last.norm(raw, "relu", residual))
    statistics += [found, projected] if projected else [found]
    return output, *raws, torch.stack([torch.cat(vectors) for vectors in zip(*statistics, strict=True)])


def _backward(
    grad: Tensor, kept: list[Tensor], wanted: list[bool], block: ResidualBlock, recompute: str, backend: str
) -> list[Tensor | None]:
    """Gradients of ``block.parameters()``, those that are wanted."""
    pairs, depth = block.pairs(), len(block.convs)
    *raws, statistics = kept
    projected = raws.pop()
    sizes = [pair.weight.shape[0] if pair.training else 0 for pair in pairs]
    means, rstds = (vector.split(sizes) for vector in statistics)
    result: list[Tensor | None] = [None] * len(wanted)
    into_x: list[Tensor] = []

    def activation(i: int) -> Tensor:
        """The input of convolution i."""
        if i == 0:
            return block.x
        call = pairs[i - 1].norm(raws[i - 1], "relu")
        return batch_norm_act.compute_again(call, means[i - 1], rstds[i - 1], backend)

    def through(i: int, grad: Tensor, raw: Tensor, output: Tensor | None, x: Tensor, residual: bool) -> Any:
        """Back through pair i: the gradient of the convolution's input, and that of the residual."""
        pair, at = pairs[i], 2 + 4 * i
        need_input = wanted[0] if i in (0, depth) else True
        if not (need_input or residual or any(wanted[at : at + 4])):
            return None, None
        need_raw = need_input or wanted[at] or wanted[at + 1]
        call = GradientCall(
            grad, raw, pair.bn_weight, *((None, None) if pair.training else pair[4:6]), means[i], rstds[i], output,
            pair.training, pair.eps, need_raw, residual,
        )  # fmt: skip
        draw, dgamma, dbeta, dresidual = batch_norm_act.compute_backward(call, backend)
        for place, gradient, owner in ((at + 2, dgamma, pair.bn_weight), (at + 3, dbeta, pair.bn_bias)):
            if wanted[place] and owner is not None:
                result[place] = gradient.to(owner.dtype)
        if draw is None:
            return None, dresidual
        mask = [need_input, wanted[at], wanted[at + 1]]
        dx, result[at], result[at + 1] = torch.ops.aten.convolution_backward(
            draw, x, pair.weight, None if pair.bias is None else [pair.weight.shape[0]],
            pair.stride, pair.padding, pair.dilation, False, [0, 0], pair.groups, mask,
        )  # fmt: skip
        return dx, dresidual

    last = depth - 1
    hidden = activation(last)
    raw = raws[last] if recompute == "activations" else pairs[last].conv(hidden)
    residual = block.x if block.identity is None else block.identity
    if block.shortcut is not None:
        residual = batch_norm_act.compute_again(
            block.shortcut.norm(projected, "none"), means[depth], rstds[depth], backend
        )  # fmt: skip
    output = batch_norm_act.compute_again(pairs[last].norm(raw, "relu", residual), means[last], rstds[last], backend)
    del residual
    residual_wanted = block.shortcut is not None or wanted[0 if block.identity is None else 1]
    grad, dresidual = through(last, grad, raw, output, hidden, residual_wanted)
    del raw, output
    for i in range(last - 1, -1, -1):
        if grad is None:
            break
        output, hidden = hidden, activation(i)
        grad, _ = through(i, grad, raws[i], output, hidden, False)
    if wanted[0] and grad is not None:
        into_x.append(grad)
    if block.shortcut is not None:
        grad, _ = through(depth, dresidual, projected, None, block.x, False)
        if wanted[0] and grad is not None:
            into_x.append(grad)
    elif block.identity is not None:
        result[1] = dresidual if wanted[1] else None
    elif dresidual is not None:
        into_x.append(dresidual)
    if into_x:
        result[0] = into_x[0] if len(into_x) == 1 else into_x[0] + into_x[1]
    return result


def _kernel(*args: Any) -> tuple[Tensor, ...]:
    return _forward(_unpack(args), args[-2], lambda call: batch_norm_act.compute(call, args[-1]))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return _forward(_unpack(args), args[-2], lambda call: batch_norm_act._fake(*call, args[-1]))


def _backward_kernel(grad: Tensor, kept: list[Tensor], wanted: list[bool], *args: Any) -> list[Tensor]:
    found = _backward(grad, kept, wanted, _unpack(args), args[-2], args[-1])
    return [g for g, w in zip(found, wanted, strict=True) if w and g is not None]


def _backward_fake(grad: Tensor, kept: list[Tensor], wanted: list[bool], *args: Any) -> list[Tensor]:
    parameters = _unpack(args).parameters()
    return [torch.empty_like(p) for p, w in zip(parameters, wanted, strict=True) if w and p is not None]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], *parameters: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output, *kept = OP(*args)
        block = _unpack(args)
        frozen = [t for pair in block.pairs() if not pair.training for t in pair[4:6]]
        ctx.save_for_backward(*parameters, *kept, *frozen)
        ctx.sizes = len(parameters), len(kept)
        # No tensor may stay in ctx beside the saved ones: only what describes the block.
        ctx.pairs = [pair[7:] for pair in block.pairs()]
        ctx.projects, ctx.options = block.shortcut is not None, args[-2:]
        ctx.mark_non_differentiable(*kept)
        return output, *kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "recompute: a fused block that recomputes has no second derivative; use recompute=None for create_graph"
            )
        saved, (first, second) = ctx.saved_tensors, ctx.sizes
        parameters, kept, frozen = saved[:first], saved[first : first + second], list(saved[first + second :])
        wanted = [w and p is not None for w, p in zip(ctx.needs_input_grad[1:], parameters, strict=True)]
        pairs = []
        for i, description in enumerate(ctx.pairs):
            training = description[0]
            statistics = (None, None) if training else (frozen.pop(0), frozen.pop(0))
            pairs.append(ConvNorm._make((*parameters[2 + 4 * i : 6 + 4 * i], *statistics, None, *description)))
        shortcut = pairs.pop() if ctx.projects else None
        block = ResidualBlock(parameters[0], tuple(pairs), shortcut, parameters[1])
        found = iter(BACKWARD(grad, list(kept), wanted, *_flat(block), *ctx.options))
        return (None, *(next(found) if w else None for w in wanted))


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    parameters = _unpack(args).parameters()
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        return _Function.apply(args, *parameters)  # type: ignore[no-any-return, no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return OP(*args)  # type: ignore[no-any-return]


def _autocast(cast: Any, *args: Any) -> tuple[Tensor, ...]:
    """Convolutions in the autocast dtype; the shortcut is added in it, as eager's sum in place does."""
    block = _unpack(args)

    def low(pair: ConvNorm) -> ConvNorm:
        return pair._replace(weight=library.cast_parameter(cast, pair.weight), bias=cast(pair.bias))

    x, identity = cast(block.x), cast(block.identity)
    shortcut = None if block.shortcut is None else low(block.shortcut)
    return OP(*_flat(ResidualBlock(x, tuple(map(low, block.convs)), shortcut, identity)), *args[-2:])  # type: ignore[no-any-return]


library.implement("residual_block", _kernel, _fake)
library.LIBRARY.impl("residual_block", _autograd, "Autograd")
library.implement_autocast("residual_block", _autocast)
library.implement("residual_block_backward", _backward_kernel, _backward_fake)
