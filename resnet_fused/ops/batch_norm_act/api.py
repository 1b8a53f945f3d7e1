"""The op resnet_fused::batch_norm_act: schema, fake, autograd and autocast rules, choice of backend.

It writes the running statistics, so its autograd rule is a kernel of its own. The gradient is an op too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import library
from resnet_fused.ops.batch_norm_act import reference
from resnet_fused.ops.batch_norm_act.call import (
    BatchNormCall,
    GradientCall,
    check_call,
    dense_format,
    empty_output,
    wide,
)

OP = library.define(
    "batch_norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor? residual, bool training, float? momentum, float eps, str act, "
    "str backend) -> (Tensor output, Tensor mean, Tensor rstd)",
)
BACKWARD = library.define(
    "batch_norm_act_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? running_mean, Tensor? running_var, Tensor mean, Tensor rstd, "
    "Tensor? output, bool training, float eps, bool need_x, bool need_residual, str backend) -> Tensor[]",
)
BACKENDS = ("reference", "triton", "cuda")

Result = tuple[Tensor, Tensor, Tensor]


def call_op(call: BatchNormCall, backend: str) -> Tensor:
    """Call the registered op; on the CPU, where nothing is quicker, PyTorch's own without an op of ours around it."""
    if backend == backends.AUTO and call.x.device.type == "cpu" and _plain(call):
        check_call(call)
        if call.training and call.num_batches_tracked is not None:
            call.num_batches_tracked.add_(1)
        return reference.differentiable(call)
    return OP(*call, backend)[0]  # type: ignore[no-any-return]


def _plain(call: BatchNormCall) -> bool:
    """Whether the call is one that aten takes as it is."""
    vectors = {v.dtype for v in call[1:5] if isinstance(v, Tensor)}
    same = call.residual is None or call.residual.dtype == call.x.dtype
    return same and len(vectors) <= 1 and call.momentum is not None and call.x.numel() > 0


def candidates(x: Tensor) -> tuple[str, ...]:
    """The static rule of ``backend="auto"``: backends in the order in which they are tried."""
    if x.device.type == "cuda" and x.dtype != torch.float64:
        return ("triton", "cuda", "reference")  # one pass for norm, sum and ReLU; no GPU has timed cuda yet
    return ("reference",)


def compute(call: BatchNormCall, backend: str) -> Result:
    """Check the call, pick the backend, run it: (output, mean, 1/√(var + eps)). The running statistics follow once.

    Without training the latter two have no elements: the running statistics were used.
    """
    check_call(call)
    module = _choose(call, backend)
    call = call._replace(x=_dense(call.x))
    if call.training and call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    if call.x.numel() == 0:
        zeros = call.x.new_zeros(call.x.shape[1] if call.training else 0, dtype=wide(call.x.dtype))
        return empty_output(call.x), zeros, zeros.clone()
    result: Result = module.run(call)
    return result


def compute_again(call: BatchNormCall, mean: Tensor, rstd: Tensor, backend: str) -> Tensor:
    """The output of an earlier ``compute``, to the bit; no running statistic changes."""
    call = call._replace(x=_dense(call.x))
    if call.x.numel() == 0:
        return empty_output(call.x)
    out: Tensor = _choose(call, backend).apply(call, mean, rstd)
    return out


def compute_backward(call: GradientCall, backend: str) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and residual; a residual's gradient without ReLU is ``call.grad`` itself."""
    module = _choose(call, backend)
    if call.x.numel() == 0:
        module = _empty
    dx, dweight, dbias, dresidual = module.backward(call)
    return dx, dweight, dbias, dresidual


class _Empty:
    """The gradient of an empty batch."""

    @staticmethod
    def backward(call: GradientCall) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        zeros = call.x.new_zeros(call.x.shape[1], dtype=wide(call.x.dtype))
        return empty_output(call.x), zeros, zeros.clone(), empty_output(call.x)


_empty: Any = _Empty


def _choose(call: BatchNormCall | GradientCall, backend: str) -> Any:
    return backends.choose("batch_norm_act", call, backend, candidates(call.x))


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=dense_format(x))


def _kernel(*args: Any) -> Result:
    return compute(BatchNormCall(*args[:-1]), args[-1])


def _fake(*args: Any) -> Result:
    call = BatchNormCall(*args[:-1])
    check_call(call)
    backends.check_name(args[-1])
    x = _dense(call.x)
    vector = x.new_empty(x.shape[1] if call.training else 0, dtype=wide(x.dtype))
    return empty_output(x), vector, torch.empty_like(vector)


def _backward_kernel(*args: Any) -> list[Tensor]:
    call = GradientCall(*args[:-1])
    dx, dweight, dbias, dresidual = compute_backward(call, args[-1])
    full = [g for g, wanted in ((dx, call.need_x), (dresidual, call.need_residual)) if wanted and g is not None]
    return [dweight, dbias, *full]


def _backward_fake(*args: Any) -> list[Tensor]:
    call = GradientCall(*args[:-1])
    vector = call.x.new_empty(call.x.shape[1], dtype=wide(call.x.dtype))
    full = [empty_output(call.x)] * call.need_x + [torch.empty_like(call.grad)] * call.need_residual
    return [vector, torch.empty_like(vector), *(g.clone() for g in full)]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Result:
        with torch._C._AutoDispatchBelowAutograd():
            output, mean, rstd = OP(*args)
        call = BatchNormCall(*args[:-1])
        running = (None, None) if call.training else (call.running_mean, call.running_var)
        ctx.save_for_backward(call.x, call.weight, *running, mean, rstd, output if call.act == "relu" else None)
        ctx.options = call.training, call.eps, args[-1]
        ctx.dtypes = [None if vector is None else vector.dtype for vector in (call.weight, call.bias)]
        ctx.mark_non_differentiable(mean, rstd)
        return output, mean, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        output = saved[-1]
        training, eps, backend = ctx.options
        need_x, need_weight, need_bias, *_, need_residual = ctx.needs_input_grad[:7]
        masked = need_residual and output is not None
        call = GradientCall._make((grads[0], *saved, training, eps, need_x, masked))
        dx: Tensor | None
        dresidual: Tensor | None
        if torch.is_grad_enabled():  # a second derivative: through aten, whose gradient is differentiable
            dx, dweight, dbias, dresidual = reference.backward(call)
        else:
            dweight, dbias, *full = BACKWARD(*call, backend)
            dx = full[0] if need_x else None
            dresidual = full[-1] if masked else None
        if need_residual and not masked:
            dresidual = grads[0]
        return (
            dx,
            dweight.to(ctx.dtypes[0]) if need_weight else None,
            dbias.to(ctx.dtypes[1]) if need_bias else None,
            *[None] * 3, dresidual, *[None] * 5,
        )  # fmt: skip


def _autograd(*args: Any) -> Result:
    recording = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if recording:
        result: Result = _Function.apply(*args)  # type: ignore[no-untyped-call]
        return result
    with torch._C._AutoDispatchBelowAutograd():
        return OP(*args)  # type: ignore[no-any-return]


def _autocast(cast: Any, *args: Any) -> Result:
    """Batch norm is not cast under autocast; a residual of another dtype is added with type promotion, as in eager."""
    call = BatchNormCall(*args[:-1])
    residual = call.residual
    if residual is None or residual.dtype == call.x.dtype:
        return OP(*args)  # type: ignore[no-any-return]
    y, mean, rstd = OP(*call._replace(residual=None, act="none"), args[-1])
    y = y + residual
    return torch.relu(y) if call.act == "relu" else y, mean, rstd


library.implement("batch_norm_act", _kernel, _fake)
library.LIBRARY.impl("batch_norm_act", _autograd, "Autograd")
library.implement_autocast("batch_norm_act", _autocast)
library.implement("batch_norm_act_backward", _backward_kernel, _backward_fake)
