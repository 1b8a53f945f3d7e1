"""The public maths, one function per op. All take ``backend="auto"`` or a backend's name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops.add_relu import api as _add_relu
from resnet_fused.ops.basic_block import api as _basic_block
from resnet_fused.ops.batch_norm_act import api as _batch_norm_act
from resnet_fused.ops.batch_norm_act.call import BatchNormCall
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.bottleneck import api as _bottleneck
from resnet_fused.ops.conv_bn_act import api as _conv_bn_act
from resnet_fused.ops.convbn import ConvBN

__all__ = ["ConvBN", "add_relu", "basic_block", "batch_norm_act", "bottleneck", "conv_bn_act"]

IntOrPair = int | tuple[int, int]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    act: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """Convolution, batch norm with given statistics, residual add and ReLU in one pass.

    Equivalent to::

        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
        y = y + residual            # when given
        y = F.relu(y)               # when act="relu"

    Args:
        x: ``[N, C, H, W]`` (or ``[C, H, W]``), float16, bfloat16, float32 or float64, any strides.
        weight: ``[K, C/groups, R, S]`` of x's dtype.
        bn_weight, bn_bias: γ and β, ``[K]``, or None for ones and zeros.
        running_mean, running_var: ``[K]``. The vectors may be float32 where x has half precision.
        eps: added to the variance.
        residual: a tensor of the output's shape, or None.
        bias: the convolution's own bias, ``[K]``, or None.
        stride, padding, dilation: integers or (height, width) pairs; padding may be "same" or "valid".
        groups: number of groups of channels, as in conv2d.
        act: "relu" or "none". ReLU keeps NaN.
        backend: "auto", or a name in ``resnet_fused.backends.NAMES``; a named backend never falls back.

    Returns:
        ``[N, K, P, Q]`` in x's dtype, with the strides that the eager expression has. Half-precision results are
        accumulated in float32 and rounded once. Differentiable in x, weight, bias, γ, β and residual.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.
        BackendError: the named backend cannot run this call; the message says why.
    """
    if x.dim() == 3:
        if residual is not None:
            residual = residual.unsqueeze(0)
        x, unbatched = x.unsqueeze(0), True
    else:
        unbatched = False
    stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
    x, padding = _pad(x, weight, stride, padding, dilation)
    conv = ConvBN(
        weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, stride, padding, dilation, groups
    )  # fmt: skip
    y = _conv_bn_act.call_op(x, conv, residual, act, backends.check_name(backend))
    return y.squeeze(0) if unbatched else y


def add_relu(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Sum and ReLU in one pass. ReLU keeps NaN.

    Equivalent to::

        F.relu(a + b)

    Args:
        a, b: tensors of one shape, dtype (floating) and device, any strides.
        backend: "auto", or a name in ``resnet_fused.backends.NAMES``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ; the message names the argument.
        BackendError: the named backend cannot run this call.
    """
    return _add_relu.call_op(a, b, backends.check_name(backend))


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    num_batches_tracked: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Batch norm with the batch's statistics; residual add and ReLU in the pass that normalises.

    Equivalent to::

        num_batches_tracked += 1                                    # when training
        factor = 1 / num_batches_tracked if momentum is None else momentum
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, factor, eps)
        y = y + residual            # when given
        y = F.relu(y)               # when act="relu"

    Args:
        x: ``[N, C, H, W]``, float16, bfloat16, float32 or float64, any strides.
        weight, bias: γ and β, ``[C]``, or None for ones and zeros.
        running_mean, running_var: ``[C]``, or both None. Written once when training. The vectors may be float32 where
            x has half precision.
        residual: a tensor of x's shape, or None.
        training: normalise with the mean and variance of the batch, else with the running ones.
        momentum: weight of the batch in the running statistics; None for the average over all batches so far.
        eps: added to the variance.
        act: "relu" or "none". ReLU keeps NaN.
        num_batches_tracked: integer scalar on x's device, or None; needed when momentum is None.
        backend: "auto", or a name in ``resnet_fused.backends.NAMES``; a named backend never falls back.

    Returns:
        ``[N, C, H, W]`` in x's dtype, with the strides that F.batch_norm gives. Differentiable in x, weight, bias and
        residual, twice too. The gradient keeps x, the statistics and the output, but no mask. An empty batch gives
        an empty result.

    Raises:
        ValueError, TypeError: an argument is invalid, or there is one value per channel when training.
        BackendError: the named backend cannot run this call; the message says why.
    """
    call = BatchNormCall(
        x, weight, bias, running_mean, running_var, num_batches_tracked, residual, training, momentum, eps, act
    )  # fmt: skip
    return _batch_norm_act.call_op(call, backends.check_name(backend))


def bottleneck(
    x: Tensor,
    conv1: ConvBN,
    conv2: ConvBN,
    conv3: ConvBN,
    shortcut: ConvBN | None = None,
    identity: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """A whole bottleneck block in eval mode, as one call.

    Equivalent to::

        y = conv_bn_act(x, *conv1)                                   # act="relu"
        y = conv_bn_act(y, *conv2)                                   # act="relu"
        r = conv_bn_act(x, *shortcut, act="none") if shortcut else (x if identity is None else identity)
        y = conv_bn_act(y, *conv3, residual=r)                       # act="relu"

    Args:
        x: ``[N, C, H, W]``, as in conv_bn_act.
        conv1, conv2, conv3: the convolutions with their batch norms.
        shortcut: the projection of x, or None.
        identity: a ready shortcut to add instead of x; at most one of shortcut and identity.

    Returns:
        The block's output, with eager's strides. Differentiable: where a gradient is recorded it runs as conv_bn_act.

    Raises:
        ValueError, TypeError, BackendError: as in conv_bn_act.
    """
    return _bottleneck.call_op(BlockCall(x, (conv1, conv2, conv3), shortcut, identity), backends.check_name(backend))


def basic_block(
    x: Tensor,
    conv1: ConvBN,
    conv2: ConvBN,
    shortcut: ConvBN | None = None,
    identity: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """A whole basic block in eval mode, as one call.

    Equivalent to::

        y = conv_bn_act(x, *conv1)                                   # act="relu"
        r = conv_bn_act(x, *shortcut, act="none") if shortcut else (x if identity is None else identity)
        y = conv_bn_act(y, *conv2, residual=r)                       # act="relu"

    Arguments, result and errors as in :func:`bottleneck`.
    """
    return _basic_block.call_op(BlockCall(x, (conv1, conv2), shortcut, identity), backends.check_name(backend))


def _pair(value: IntOrPair, name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    pair = tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name}: got {value!r}, need an integer or a (height, width) pair")
    return pair


def _pad(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: IntOrPair | str, dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Padding as a symmetric pair; what "same" needs beyond that is padded into x, as conv2d does."""
    if not isinstance(padding, str):
        return x, _pair(padding, "padding")
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"padding: got {padding!r}, need integers, 'same' or 'valid'")
    if stride != (1, 1):
        raise ValueError(f"padding: 'same' needs stride 1, got stride {stride}")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):  # one more row or column at the end
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)
