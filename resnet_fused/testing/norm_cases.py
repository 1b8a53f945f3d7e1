"""The cases of batch_norm_act, and what eager PyTorch and a float64 run make of one: for the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops.batch_norm_act.call import BatchNormCall
from resnet_fused.testing.budget import assert_within_budget


@dataclass(frozen=True)
class NormCase:
    """One problem; ``mixed`` keeps γ, β and the running statistics in float32 beside a half-precision x."""

    n: int
    c: int
    h: int
    w: int
    residual: bool = False
    act: str = "relu"
    training: bool = True
    momentum: float | None = 0.1
    affine: bool = True
    tracked: bool = True
    channels_last: bool = True
    mixed: bool = False

    def __str__(self) -> str:
        text = f"N{self.n}-C{self.c}x{self.h}x{self.w}-{self.act}" + "-res" * self.residual
        text += "-eval" * (not self.training) + "-average" * (self.momentum is None)
        text += "-noaffine" * (not self.affine) + "-untracked" * (not self.tracked)
        return text + "-nchw" * (not self.channels_last) + "-mixed" * self.mixed

    def make(self, dtype: torch.dtype, device: str = "cpu") -> BatchNormCall:
        """Fresh tensors, whose mean is far from zero beside their deviation."""
        wide = torch.float32 if self.mixed and dtype != torch.float64 else dtype
        layout = torch.channels_last if self.channels_last else torch.contiguous_format

        def image(shift: float) -> Tensor:
            value = torch.randn(self.n, self.c, self.h, self.w) + shift
            return value.to(device, dtype).contiguous(memory_format=layout)

        def vector(low: float, high: float) -> Tensor:
            return (torch.rand(self.c) * (high - low) + low).to(device, wide)

        gamma, beta = (vector(0.5, 1.5), vector(-0.5, 0.5)) if self.affine else (None, None)
        mean, var = (vector(-0.5, 0.5), vector(0.5, 1.5)) if self.tracked else (None, None)
        count = torch.tensor(2, device=device) if self.tracked else None
        return BatchNormCall(
            image(1.0), gamma, beta, mean, var, count, image(0.0) if self.residual else None, self.training,
            self.momentum, 1e-5, self.act,
        )  # fmt: skip


NORM_CASES = (
    NormCase(2, 5, 7, 3),
    NormCase(2, 5, 7, 3, residual=True),
    NormCase(3, 64, 5, 6, residual=True, channels_last=False),
    NormCase(2, 8, 4, 4, act="none", channels_last=False),
    NormCase(2, 33, 1, 1, residual=True, act="none"),
    NormCase(1, 40, 9, 8, momentum=None),
    NormCase(4, 7, 3, 5, affine=False, residual=True),
    NormCase(2, 16, 5, 5, tracked=False),
    NormCase(2, 16, 5, 5, tracked=False, momentum=None),
    NormCase(2, 9, 6, 5, mixed=True, residual=True),
    NormCase(2, 9, 6, 5, mixed=True, momentum=None, affine=False, channels_last=False),
    NormCase(2, 12, 5, 4, training=False, residual=True),
    NormCase(2, 12, 5, 4, training=False, act="none", mixed=True, channels_last=False),
    NormCase(1, 6, 1, 1, training=False, affine=False),
)


def eager(call: BatchNormCall) -> Tensor:
    """The documented equivalent; it moves the call's own statistics."""
    factor = call.momentum or 0.0
    if call.training and call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
        factor = 1 / float(call.num_batches_tracked) if call.momentum is None else factor
    y = F.batch_norm(
        call.x, call.running_mean, call.running_var, call.weight, call.bias, call.training, factor, call.eps
    )  # fmt: skip
    y = y if call.residual is None else y + call.residual
    return F.relu(y) if call.act == "relu" else y


def copied(call: BatchNormCall, dtype: torch.dtype | None = None, grad: bool = True) -> BatchNormCall:
    """The call on copies of its tensors, floating ones in ``dtype``; inputs of the gradient ask for one."""

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        return value.requires_grad_() if grad and name in ("x", "weight", "bias", "residual") else value

    return BatchNormCall(*(one(name, value) for name, value in zip(call._fields, call, strict=True)))


def outcome(run: Callable[[BatchNormCall], Tensor], call: BatchNormCall, upstream: Tensor) -> dict[str, Tensor]:
    """What a call and its backward pass leave: output, gradients, statistics."""
    y = run(call)
    y.backward(upstream.to(y.dtype))
    found = {"output": y.detach()}
    for name in ("x", "weight", "bias", "residual"):
        if (value := getattr(call, name)) is not None:
            found[f"grad {name}"] = value.grad
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if (value := getattr(call, name)) is not None:
            found[name] = value
    return found


def upstream_of(call: BatchNormCall) -> Tensor:
    """A gradient of the output, channels_last."""
    grad = torch.randn(call.x.shape).to(call.x.device, call.x.dtype)
    return grad.contiguous(memory_format=torch.channels_last)


def assert_outcome(got: dict[str, Tensor], call: BatchNormCall, grad: Tensor) -> None:
    """Hold output, gradients and statistics of a call, as ``outcome`` gives them, against eager's and a float64 run's.

    Where eager rounds before the sum or the ReLU and the kernel does not, a value at the ReLU's edge may fall on the
    other side: the gradient's yardstick takes the mask of the output itself.
    """
    theirs = outcome(eager, copied(call), grad)
    if call.act == "relu":
        grad = torch.where(got["output"] > 0, grad, 0)
        linear = call._replace(act="none")
        exact = outcome(eager, copied(linear, torch.float64), grad.double())
        theirs = {**outcome(eager, copied(linear), grad), "output": theirs["output"]}
        exact["output"] = F.relu(exact["output"])
    else:
        exact = outcome(eager, copied(call, torch.float64), grad.double())
    assert list(got) == list(theirs)
    for name, value in got.items():
        assert value.stride() == theirs[name].stride(), name
        if value.is_floating_point():
            assert_within_budget(value, theirs[name], exact[name].double(), tf32=False)
        else:
            assert torch.equal(value, theirs[name]), name
