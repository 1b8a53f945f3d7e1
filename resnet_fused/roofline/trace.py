"""The operations of a forward pass and the tensors that flow between them, seen on the meta device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fused.ops import library

_KINDS = {
    "convolution": "conv",
    "native_batch_norm": "bn",
    "_native_batch_norm_legit_no_training": "bn",
    "cudnn_batch_norm": "bn",
    "max_pool2d_with_indices": "max_pool",
    "mean": "avg_pool",
    "avg_pool2d": "avg_pool",
    "_adaptive_avg_pool2d": "avg_pool",
    "addmm": "linear",
    "mm": "linear",
}
_SHAPE_ONLY = ("new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like")


@dataclass
class Op:
    """One operation that touches activations.

    reads maps a value to the elements read of it; out is the value written. modules are the names of the modules that
    were running, outermost first. weights maps the constants read to their sizes.
    """

    kind: str
    modules: tuple[str, ...]
    reads: dict[int, int]
    weights: dict[int, int]
    out: int
    flops: int

    @property
    def name(self) -> str:
        return self.modules[-1] if self.modules else ""


@dataclass
class Trace:
    """Operations in the order in which they ran; ``size`` gives the elements of each value, ``batch`` the images."""

    ops: list[Op]
    size: dict[int, int]
    outputs: set[int]
    batch: int


def trace(model: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> Trace:
    """Run a copy of ``model`` without weights, in eval mode, on meta tensors of these shapes."""
    twin = _meta_copy(model).eval()
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.get_default_dtype())
    inputs = [torch.empty(shape, device="meta", dtype=dtype) for shape in shapes]
    recorder = _Recorder(inputs)
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(recorder.enter(name))
        module.register_forward_hook(recorder.leave, always_call=True)
    with torch.no_grad(), recorder:
        result = twin(*inputs)
    outputs = {recorder.values[_storage(t)] for t in _tensors(result) if _storage(t) in recorder.values}
    return Trace(recorder.ops, recorder.size, outputs, shapes[0][0])


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device; no weight is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Recorder(TorchDispatchMode):
    """Names each content of each storage a value: views share it, an operation in place makes a new one."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.values: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self._modules: list[str] = []
        self._constants: set[int] = set()
        self._alive: list[Tensor] = []  # a storage's address must not come back for another tensor
        for tensor in inputs:
            self._new(tensor)

    def enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self._modules.append(name)

    def leave(self, *_: Any) -> None:
        self._modules.pop()

    def _new(self, tensor: Tensor, constant: bool = False) -> int:
        value = len(self.size)
        self.values[_storage(tensor)] = value
        self.size[value] = tensor.numel()
        self._alive.append(tensor)
        if constant:
            self._constants.add(value)
        return value

    def _value(self, tensor: Tensor) -> int:
        known = self.values.get(_storage(tensor))
        return self._new(tensor, constant=True) if known is None else known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "resnet_fused":
            with self:
                return library.eager_form(func)(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        kind = func._schema.name.removeprefix("aten::").rstrip("_")
        tensors = () if kind in _SHAPE_ONLY else _tensors((args, kwargs))
        reads = {self._value(t): t.numel() for t in tensors}
        result = func(*args, **kwargs)
        out = next(_tensors(result), None)
        mutates = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if out is None or (_storage(out) in self.values and not mutates):
            return result
        active = {v: min(n, self.size[v]) for v, n in reads.items() if v not in self._constants}
        written = self._new(out, constant=not active)
        if active:
            weights = {v: self.size[v] for v in reads if v in self._constants}
            flops = _flops(kind, args, out)
            self.ops.append(Op(_KINDS.get(kind, kind), tuple(self._modules), active, weights, written, flops))
        return result


def _flops(kind: str, args: Any, out: Tensor) -> int:
    """Two per multiply-add."""
    match kind:
        case "convolution":
            depth = math.prod(args[1].shape[1:])
        case "mm" | "bmm":
            depth = args[0].shape[-1]
        case "addmm" | "baddbmm":
            depth = args[1].shape[-1]
        case _:
            depth = 0
    return 2 * int(depth) * out.numel()
