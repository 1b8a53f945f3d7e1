"""The op resnet_fused::conv_bn_act: schema, fake, autograd and autocast rules, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import library, packed
from resnet_fused.ops.conv_bn_act import reference, triton_config, unpacked
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, check_call
from resnet_fused.ops.schemas import SCHEMAS
from resnet_fused.ops.tensor_cache import CACHE

OP = library.define("conv_bn_act", SCHEMAS["conv_bn_act"])
_CHANNELS_LAST, _SCALED = packed.new_kind(), packed.new_kind()


def call_op(x: Tensor, conv: ConvBN, residual: Tensor | None, act: str, backend: str) -> Tensor:
    """Call the registered op, or its kernel where nothing else would happen; aten's ops under function transforms."""
    if library.transformed():
        call = ConvBNActCall(x, conv, residual, act)
        check_call(call)
        backends.check_name(backend)
        return reference.run(call)
    if library.goes_straight(x, (*conv[:6], residual)):
        return compute(ConvBNActCall(x, conv, residual, act), backend)
    return OP(x, *conv, residual, act, backend)  # type: ignore[no-any-return]


def candidates(x: Tensor, conv: ConvBN) -> tuple[str, ...]:
    """The static rule of ``backend="auto"``: backends in the order in which they are tried."""
    if x.device.type == "cpu":
        return ("cpu", "onednn", "reference")
    if x.device.type == "cuda" and x.dtype != torch.float64:
        # A 1x1 convolution is bound by memory, where the fused epilogue pays whole; a larger filter by arithmetic,
        # where cuDNN's kernels are the safer choice until a tuning table says otherwise. Its fused 7x7 has been seen
        # many times slower than the plain one (pytorch#68506), so larger filters stay with eager, but for the stem of a
        # network: there Triton's kernel moves less than a third of eager's bytes. That is counted (bench/NOTES.md),
        # not measured. This project's own CUDA kernels come last of the fused ones: no GPU has timed them yet.
        filter_size = conv.weight.shape[2] * conv.weight.shape[3]
        if filter_size > 9:
            channels, size = conv.weight.shape[1], (conv.weight.shape[2], conv.weight.shape[3])
            stem = triton_config.windowed(size, channels, conv.dilation, conv.groups)
            return ("triton", "reference") if stem else ("reference",)
        if filter_size == 1 and conv.groups == 1:
            return ("triton", "cudnn", "cuda", "reference")
        return ("cudnn", "triton", "cuda", "reference")
    return ("reference",)


def compute(call: ConvBNActCall, backend: str) -> Tensor:
    """Check the call, pick the backend, run it, and give the result eager's strides."""
    check_call(call)
    if call.x.numel() == 0 or call.conv.weight.numel() == 0:
        backend = "reference"
    elif backend == backends.AUTO and not packed.settled(call.conv.tensors()):
        return unpacked.run(call)
    module = server(call, backend)
    out: Tensor = module.run(call)
    return out if module is reference else reference.like_eager(out, call)


def server(call: ConvBNActCall, backend: str) -> backends.Server:
    """Who computes a sound call."""
    return backends.choose("conv_bn_act", call, backend, candidates(call.x, call.conv))


def _call(args: tuple[Any, ...]) -> ConvBNActCall:
    """The op's flat arguments (without the backend) as a call."""
    x, *conv, residual, act = args
    for i in range(7, 10):  # the dispatcher gives lists
        conv[i] = tuple(conv[i])
    return ConvBNActCall(x, ConvBN(*conv), residual, act)


def _kernel(*args: Any) -> Tensor:
    return compute(_call(args[:-1]), args[-1])


def _fake(*args: Any) -> Tensor:
    call = _call(args[:-1])
    check_call(call)
    backends.check_name(args[-1])
    return reference.run(call)


def _autocast(cast: Any, *args: Any) -> Tensor:
    """Convolution in the autocast dtype; a residual of a wider dtype is added as eager does, with type promotion."""
    call, backend = _call(args[:-1]), args[-1]
    x, conv = cast(call.x), call.conv._replace(weight=library.cast_parameter(cast, call.conv.weight))
    residual = call.residual
    if residual is None or residual.dtype == x.dtype:
        return call_op(x, conv, residual, call.act, backend)
    y = call_op(x, conv, None, "none", backend) + residual
    return torch.relu(y) if call.act == "relu" else y


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output: Tensor = OP(*args)
        call = _call(args[:-1])
        conv = call.conv
        ctx.geometry = conv[6:]
        ctx.beta_dtype = None if conv.bn_bias is None else conv.bn_bias.dtype
        ctx.has_residual = call.residual is not None
        ctx.save_for_backward(
            call.x, conv.weight, conv.bias, conv.bn_weight, conv.running_mean, conv.running_var,
            output if call.act == "relu" else None,
        )  # fmt: skip
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, grads[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Frozen-BN backward. With s = γ/√(var+eps), g the gradient behind the ReLU and V the gradient of the raw weight:

    dx = conv_dinput(g, s·w);  dw = s·V, V = conv_dweight(x, g);  dβ = Σ g;  d_residual = g;  d_bias = s·dβ;
    dγ = (⟨V, w⟩ + (bias − mean)·dβ)/√(var+eps), because Σ g·conv(x, w) = ⟨V, w⟩ per output channel: the
    convolution's output is neither stored nor computed again.
    """
    x, weight, bias, gamma, mean, var, output = ctx.saved_tensors
    eps, stride, padding, dilation, groups = ctx.geometry
    need_x, need_weight, need_bias, need_gamma, need_beta = ctx.needs_input_grad[:5]
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.rsqrt(var.to(wide) + eps)
    scale = rstd if gamma is None else rstd * gamma.to(wide)
    column = (-1, 1, 1, 1)

    def convolution_backward(w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            grad, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
        )

    dx = dweight = dbias = dgamma = dbeta = None
    if need_x:
        scaled = _scaled(weight, scale) if torch.is_grad_enabled() else _kept_scaled(weight, scale, ctx.saved_tensors)
        dx = convolution_backward(scaled, [True, False, False])[0]
    if need_bias or need_gamma or need_beta:
        dbeta = grad.sum((0, 2, 3), dtype=wide)
    if need_weight or need_gamma:
        raw = convolution_backward(weight, [False, True, False])[1].to(wide)
        if need_gamma:
            assert dbeta is not None
            offset = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
            dgamma = (((raw * weight.to(wide)).sum((1, 2, 3)) + offset * dbeta) * rstd).to(gamma.dtype)
        if need_weight:
            dweight = (raw * scale.view(column)).to(weight.dtype)
    if need_bias:
        assert dbeta is not None
        dbias = (scale * dbeta).to(bias.dtype)
    dbeta = dbeta.to(ctx.beta_dtype) if need_beta and dbeta is not None else None
    dresidual = grad if ctx.has_residual else None
    return (dx, dweight, dbias, dgamma, dbeta, *[None] * 7, dresidual, None, None)


def _keeps_output(conv: ConvBN) -> bool:
    """Whether γ alone is trained: its gradient needs the convolution's output, and to keep that, as aten does, is
    quicker than a filter's gradient."""
    return conv.bn_weight is not None and conv.bn_weight.requires_grad and not conv.weight.requires_grad


def _with_kept_weight(call: ConvBNActCall) -> ConvBNActCall:
    """The call with a copy of its weight that aten need not copy again, where the weight stays from call to call."""
    weight = call.conv.weight
    if weight.requires_grad or call.x.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return call
    if not packed.settled((weight,)):
        return call
    kept = CACHE.get(_CHANNELS_LAST, (weight,), None, lambda: packed.outside_of_modes(_channels_last, weight))
    return call._replace(conv=call.conv._replace(weight=kept))


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _kept_scaled(weight: Tensor, scale: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
    """:func:`_scaled` in channels_last, kept where the weights stay: gradients of images through a frozen network."""
    _, _, _, gamma, mean, var, _ = saved
    tensors = (weight, gamma, mean, var)
    if any(t is not None and t.requires_grad for t in tensors) or not packed.settled(tensors):
        return _scaled(weight, scale)

    def build() -> Tensor:
        return _channels_last(_scaled(weight, scale))

    kept: Tensor = CACHE.get(_SCALED, tensors, scale.dtype, lambda: packed.outside_of_modes(build))
    return kept


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def _autograd(*args: Any) -> Tensor:
    if library.transformed():
        return reference.run(_call(args[:-1]))
    if not library.records(args):
        with torch._C._AutoDispatchBelowAutograd():
            return OP(*args)  # type: ignore[no-any-return]
    call = _call(args[:-1])
    if args[-1] == backends.AUTO and (_keeps_output(call.conv) or not packed.settled(call.conv.tensors())):
        check_call(call)
        return unpacked.differentiable(_with_kept_weight(call))
    return _Function.apply(*args)  # type: ignore[no-any-return, no-untyped-call]


library.implement("conv_bn_act", _kernel, _fake)
library.LIBRARY.impl("conv_bn_act", _autograd, "Autograd")
library.implement_autocast("conv_bn_act", _autocast)
