"""The cases of training: one step forward and backward, of the batch-norm op and of whole models."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import functional, roofline
from resnet_fused.testing.bench import cases
from resnet_fused.testing.bench.cases import Case, Parts
from resnet_fused.testing.training import saved_bytes

MODELS = ("resnet18", "resnet50")


class TrainingCase(Case):
    """A step forward and backward. Parameters are float32; where the dtype is another, the step runs under autocast."""

    training = True

    def make(self, device: torch.device, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Module in training mode, parameters in float32, and inputs: activations in the case's dtype, images not."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build().train()
            inputs = [torch.randn(shape) for shape in self.shapes]
        dtype = self.dtype if isinstance(module, BatchNormAct) else torch.float32
        return module.to(device), tuple(x.to(device, dtype) for x in inputs)

    def call(self, run: Callable[..., Any], inputs: tuple[Tensor, ...], module: nn.Module | None = None) -> Step:
        """The step of ``run``, with the gradients of ``module``'s parameters, and of the inputs of a kernel."""
        assert module is not None
        return Step(run, module, inputs, self.dtype)

    def cost(self, module: nn.Module, rates: roofline.Device) -> dict[str, Any]:
        """Three times the FLOPs of the forward pass, bound by arithmetic alone. Of the batch-norm op the bytes: each
        tensor once in the forward and once in the backward pass."""
        if isinstance(module, BatchNormAct):
            passes = 8 if len(self.shapes) > 1 else 6  # x, y; y, dy, x, dx; and the sum's other side in and out
            moved = passes * math.prod(self.shapes[0]) * self.dtype.itemsize
            return {"flops": 0, "bytes": moved, "bound_ms": 1e3 * moved / rates.bytes_per_s}
        flops = 3 * roofline.count(module, *self.shapes)[self.level].flops
        return {"flops": flops, "bytes": "", "bound_ms": 1e3 * flops / rates.rate(self.dtype)}


class Step:
    """One step: output, gradients and running statistics. Nothing is accumulated, so every call computes the same."""

    def __init__(
        self, run: Callable[..., Any], module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype
    ) -> None:
        self.run, self.module, self.dtype = run, module, dtype
        wanted = isinstance(module, BatchNormAct)
        self.inputs = [x.detach().requires_grad_(wanted) for x in inputs]
        self.sources = [*(self.inputs if wanted else ()), *module.parameters()]
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._start = [b.clone() for b in self.buffers]
        self._grad: Tensor | None = None

    def __call__(self) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            with self._autocast():
                out = self.run(*self.inputs)
            return [out.detach(), *torch.autograd.grad(out, self.sources, self._gradient_of(out)), *self.buffers]

    def rewind(self) -> None:
        """Give the running statistics the values that they had before the first step."""
        for buffer, start in zip(self.buffers, self._start, strict=True):
            buffer.copy_(start)

    def kept_bytes(self) -> int:
        """Bytes that one forward pass keeps for the gradient."""
        with torch.inference_mode(False), torch.enable_grad(), self._autocast():
            return saved_bytes(self.run, *self.inputs, own=(*self.module.parameters(), *self.module.buffers()))

    def _autocast(self) -> Any:
        if self.dtype in (torch.float32, torch.float64) or self.inputs[0].dtype == torch.float64:
            return contextlib.nullcontext()
        return torch.autocast(
            self.inputs[0].device.type, self.dtype, cache_enabled=False
        )  # a graph must not keep casts

    def _gradient_of(self, out: Tensor) -> Tensor:
        """The output's gradient: the same values in every dtype, made once, since a captured step may draw nothing."""
        if self._grad is None or self._grad.shape != out.shape or self._grad.dtype != out.dtype:
            values = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            self._grad = torch.empty_like(out.detach()).copy_(values)
        return self._grad


class BatchNormAct(nn.BatchNorm2d):
    """batch_norm_act in eager PyTorch: batch norm by the batch's statistics, perhaps a sum, and ReLU."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if residual is not None:
            y = y + residual
        return F.relu(y, inplace=True)

    def fused(self, backend: str) -> Callable[..., Tensor]:
        """The same through our op, served by ``backend``."""

        def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return functional.batch_norm_act(
                x, self.weight, self.bias, self.running_mean, self.running_var, residual, momentum=self.momentum,
                eps=self.eps, num_batches_tracked=self.num_batches_tracked, backend=backend,
            )  # fmt: skip

        return call


def _fuse_kernel(module: nn.Module, backend: str) -> Callable[..., Tensor]:
    assert isinstance(module, BatchNormAct)
    return module.fused(backend)


def training_cases(names: tuple[str, ...], size: int | None) -> Iterator[Parts]:
    """batch_norm_act on each distinct shape that follows a convolution, and whole models."""
    seen: set[Any] = set()
    for model in names:
        for path, module, shape, _ in cases.runs(model, size):
            summed = cases.is_last(path, model, size)
            if type(module) is nn.BatchNorm2d and "downsample" not in path and (shape, summed) not in seen:
                seen.add((shape, summed))
                build = functools.partial(BatchNormAct, shape[0])
                yield model, "batch_norm_act" + "-res" * summed, (shape,) * (1 + summed), build, _fuse_kernel, "block"
    yield from cases.model_cases(names, size)
