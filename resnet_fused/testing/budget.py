"""The error budget: how far from a float64 reference a result may be, with no tolerance picked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """The worst element of a result, against its budget.

    ``ratio`` is error over budget (above 1: outside); ``error`` and ``eager_error`` are absolute.
    """

    ratio: float
    error: float
    eager_error: float

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


TF32_EPS = 2.0**-10  # TensorFloat-32 has ten explicit bits of mantissa


def tf32_allowed(out: Tensor) -> bool:
    """Whether what made ``out`` may have multiplied in TensorFloat-32, by PyTorch's flag for cuDNN's convolutions."""
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return out.is_cuda and out.dtype == torch.float32 and precision == "tf32"


def measure(out: Tensor, eager: Tensor, reference: Tensor, *others: Tensor, tf32: bool | None = None) -> Error:
    """Compare ``out`` with a float64 ``reference``, allowing twice eager's own error plus one rounding step.

    The budget of an element is ``2 · max|eager − reference| + ε·|reference|`` with ε the machine epsilon of ``out``'s
    dtype. NaN and infinities must stand where eager has them: elsewhere the ratio is infinite.

    ``others`` are what eager gives for the same values in the other memory format (channels_last or contiguous), or in
    a larger batch, when at hand; their error counts as eager's too. On a CPU they differ in float32 by up to ten times:
    eager sums long products in another order by oneDNN than by the plain matrix product that it takes for one small
    image, and kernels of ours compute in channels_last whichever the input has.

    Where ``tf32`` is allowed (None asks :func:`tf32_allowed`) eager's error counts as no less than one rounding step of
    TF32 at the largest element of ``reference``. It takes that step wherever it multiplies in TF32; for convolutions
    of few channels it often does not, and is then a thousand times more exact than it promises.

    Raises:
        ValueError: shape, dtype or device of ``out`` differ from ``eager``'s.
    """
    for name in ("shape", "dtype", "device"):
        if getattr(out, name) != getattr(eager, name):
            raise ValueError(f"out: {name} is {getattr(out, name)}, eager's is {getattr(eager, name)}")
    if reference.dtype != torch.float64:
        raise ValueError(f"reference: got {reference.dtype}, need torch.float64")
    if out.numel() == 0:
        return Error(0.0, 0.0, 0.0)
    finite = torch.isfinite(eager)
    same_special = torch.equal(torch.isnan(out), torch.isnan(eager)) and torch.equal(
        torch.where(torch.isinf(out), out, 0), torch.where(torch.isinf(eager), eager, 0)
    )
    if not same_special:
        return Error(float("inf"), float("inf"), float("nan"))
    if not bool(finite.any()):
        return Error(0.0, 0.0, 0.0)
    reference = reference.to(out.device)[finite]
    error = (out[finite].double() - reference).abs()
    eager_error = (eager[finite].double() - reference).abs().max()
    for other in others:
        eager_error = torch.maximum(eager_error, (other[finite].double() - reference).abs().max())
    if tf32_allowed(out) if tf32 is None else tf32:
        eager_error = eager_error.clamp(min=TF32_EPS * float(reference.abs().max()))
    budget = 2 * eager_error + torch.finfo(out.dtype).eps * reference.abs()
    ratio = torch.where(error == 0, 0.0, error / budget)
    return Error(float(ratio.max()), float(error.max()), float(eager_error))


def assert_within_budget(
    out: Tensor, eager: Tensor, reference: Tensor, *others: Tensor, tf32: bool | None = None
) -> None:
    """Raise AssertionError, with the figures, unless ``out`` is within the budget of :func:`measure`."""
    result = measure(out, eager, reference, *others, tf32=tf32)
    assert result.ok, (
        f"error is {result.ratio:.3g} of the budget: {result.error:.3g} against float64, "
        f"eager's {result.eager_error:.3g}"
    )
