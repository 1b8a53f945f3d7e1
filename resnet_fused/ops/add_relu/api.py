"""The op resnet_fused::add_relu: schema, fake, autograd and autocast rules, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import library
from resnet_fused.ops.add_relu import reference
from resnet_fused.ops.add_relu.call import AddReLUCall, check_call
from resnet_fused.ops.schemas import SCHEMAS

OP = library.define("add_relu", SCHEMAS["add_relu"])


def call_op(a: Tensor, b: Tensor, backend: str) -> Tensor:
    """Call the registered op; aten's ops under function transforms."""
    if library.transformed():
        return _fake(a, b, backend)
    return OP(a, b, backend)  # type: ignore[no-any-return]


def candidates(a: Tensor) -> tuple[str, ...]:
    """The static rule of ``backend="auto"``: backends in the order in which they are tried."""
    if a.device.type == "cuda" and a.dtype != torch.float64:
        return ("triton", "cuda", "reference")  # one pass over memory instead of two; no GPU has timed cuda yet
    return ("reference",)


def compute(call: AddReLUCall, backend: str) -> Tensor:
    """Check the call, pick the backend, run it. Backends give the strides of ``a + b`` themselves."""
    check_call(call)
    if call.a.numel() == 0:
        backend = "reference"
    out: Tensor = backends.choose("add_relu", call, backend, candidates(call.a)).run(call)
    return out


def _kernel(a: Tensor, b: Tensor, backend: str) -> Tensor:
    return compute(AddReLUCall(a, b), backend)


def _fake(a: Tensor, b: Tensor, backend: str) -> Tensor:
    check_call(AddReLUCall(a, b))
    backends.check_name(backend)
    return reference.run(AddReLUCall(a, b))


def _autocast(cast: Any, a: Tensor, b: Tensor, backend: str) -> Tensor:
    """Addition is not cast under autocast; operands of two dtypes are promoted, as eager's sum is."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return OP(a.to(dtype), b.to(dtype), backend)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad = torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0)
    return grad, grad, None


library.implement("add_relu", _kernel, _fake)
library.implement_autocast("add_relu", _autocast)
torch.library.register_autograd("resnet_fused::add_relu", _backward, setup_context=_setup_context, lib=library.LIBRARY)
