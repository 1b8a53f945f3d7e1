"""Runs batch_norm_act calls, and their gradients, through the bindings of the CUDA kernels, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import simt_harness
from torch import Tensor

from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall, dense_format

# The tensors among each op's arguments, in order.
FORWARD = ("x", "gamma", "beta", "running_mean", "running_var", "batches", "residual")
APPLY = ("x", "gamma", "beta", "mean", "scale", "residual")
BACKWARD = ("grad", "x", "gamma", "mean", "scale", "output")


@dataclass
class Options:
    """What decides the kernels' path besides the call."""

    seed: int = 0
    multiprocessors: int = 2
    shift: dict[str, int] | None = None  # bytes by which a tensor misses alignment; what is made anew: by one element


def forward(call: BatchNormCall, options: Options) -> tuple[str, Tensor, Tensor, Tensor]:
    """(what was printed, output, mean, scale); the call's statistics and its count of batches follow."""
    if not call.training:
        assert call.running_mean is not None and call.running_var is not None
        text, out = apply(call, call.running_mean, call.running_var, options)
        return text, out, call.x.new_empty(0), call.x.new_empty(0)
    batches = None
    if call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
        batches = call.num_batches_tracked if call.momentum is None else None
    answer = _call(
        "batch_norm_act", FORWARD, ("out",), options, _dense(call.x), call.weight, call.bias, call.running_mean,
        call.running_var, batches, call.residual, call.momentum or 0.0, call.eps, call.act == "relu",
    )  # fmt: skip
    for vector, followed in zip((call.running_mean, call.running_var), answer.arguments[3:5], strict=True):
        if vector is not None:
            vector.copy_(followed)
    return answer.text, *answer.outs


def apply(call: BatchNormCall, mean: Tensor, scale: Tensor, options: Options) -> tuple[str, Tensor]:
    """(what was printed, the output by these statistics)."""
    answer = _call(
        "batch_norm_act_apply", APPLY, ("out",), options, _dense(call.x), call.weight, call.bias, mean, scale,
        call.residual, call.training, call.eps, call.act == "relu",
    )  # fmt: skip
    return answer.text, answer.out


def backward(call: GradientCall, options: Options) -> tuple[str, dict[str, Tensor]]:
    """(what was printed, the gradients by name: dx, dgamma, dbeta, dresidual)."""
    mean, scale = (call.mean, call.rstd) if call.training else (call.running_mean, call.running_var)
    made = ("dx",) * call.need_x + ("dresidual",) * call.need_residual
    answer = _call(
        "batch_norm_act_backward", BACKWARD, made, options, call.grad, _dense(call.x), call.weight, mean, scale,
        call.output, call.training, call.eps, call.need_x, call.need_residual,
    )  # fmt: skip
    grads = zip(("dgamma", "dbeta", "dx", "dresidual"), answer.outs, strict=True)
    return answer.text, {name: grad for name, grad in grads if grad is not None}


def _call(
    op: str, names: tuple[str, ...], made: tuple[str, ...], options: Options, *arguments: object
) -> simt_harness.Answer:
    shift = options.shift or {}
    answer = simt_harness.call(
        f"resnet_fused_cuda::{op}",
        *arguments,
        shift={i: shift[name] for i, name in enumerate(names) if name in shift},
        seed=options.seed,
        multiprocessors=options.multiprocessors,
        shifted=sum(1 << i for i, name in enumerate(made) if name in shift),
    )
    assert "bank conflicts 0\n" in answer.text, answer.text
    return answer


def _dense(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=dense_format(x))
