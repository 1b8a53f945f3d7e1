"""batch_norm_act as an op of PyTorch: derivatives, what is kept for them, autocast, compilation, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_backends import BACKENDS, device_of, ours
from torch import Tensor, nn

from resnet_fused import backends, functional
from resnet_fused.ops.batch_norm_act import api
from resnet_fused.ops.batch_norm_act.call import BatchNormCall
from resnet_fused.testing.norm_cases import NORM_CASES, NormCase, copied, eager, outcome, upstream_of


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend: str, act: str, residual: bool, training: bool) -> None:
    """First and second derivatives; the affine part off as well."""
    for affine in (True, False):
        case = NormCase(2, 3, 2, 3, residual=residual, act=act, training=training, affine=affine)
        call = copied(case.make(torch.float64))
        names = [n for n in ("x", "weight", "bias", "residual") if getattr(call, n) is not None]

        def function(*values: Tensor, call: BatchNormCall = call, names: list[str] = names) -> Tensor:
            fresh = copied(call._replace(**dict.fromkeys(names)))
            return ours(fresh._replace(**dict(zip(names, values, strict=True))), backend)

        inputs = tuple(getattr(call, n) for n in names)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_second_derivative_is_eagers(backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32, device_of(backend))

    def penalty(run: Callable[[BatchNormCall], Tensor]) -> Tensor:
        fresh = copied(call)
        y = run(fresh)
        loss = (y * torch.linspace(0, 1, y.numel(), device=y.device).view(y.shape)).sum()
        (grad,) = torch.autograd.grad(loss, fresh.x, create_graph=True)
        grad.square().sum().backward()
        assert fresh.x.grad is not None
        return fresh.x.grad

    torch.testing.assert_close(penalty(lambda c: ours(c, backend)), penalty(eager))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "case",
    [NORM_CASES[1], NORM_CASES[5], NORM_CASES[6], NORM_CASES[7], NORM_CASES[10], NORM_CASES[11], NORM_CASES[13]],
    ids=str,
)
def test_opcheck(case: NormCase, grad: bool) -> None:
    torch.library.opcheck(api.OP, (*copied(case.make(torch.float32), grad=grad), "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_wants_a_gradient_gets_one(backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32, device_of(backend))
    for name in ("x", "weight", "bias", "residual"):
        fresh = copied(call, grad=False)
        getattr(fresh, name).requires_grad_()
        ours(fresh, backend).sum().backward()
        assert getattr(fresh, name).grad is not None
        assert all(getattr(fresh, n).grad is None for n in ("x", "weight", "bias", "residual") if n != name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_mask_is_kept(backend: str) -> None:
    """x, the output and two vectors."""
    call = copied(NormCase(2, 16, 8, 8, residual=True).make(torch.float32, device_of(backend)))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(call, backend)
    assert sum(kept.values()) <= 2 * call.x.numel() * 4 + 8 * 16 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_changed_before_the_backward_pass_are_noticed(backend: str) -> None:
    """Frozen ones are read again; eager raises too."""
    call = copied(NormCase(2, 5, 4, 3, training=False).make(torch.float32, device_of(backend)))
    out = ours(call, backend).sum()
    assert call.running_mean is not None
    call.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_a_kernel_that_moves_statistics_says_so(backend: str) -> None:
    call = copied(NormCase(2, 5, 4, 3).make(torch.float32, device_of(backend)))
    assert call.running_mean is not None and call.running_var is not None
    before = call.running_mean._version, call.running_var._version
    ours(call, backend)
    assert call.running_mean._version > before[0] and call.running_var._version > before[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    device = device_of(backend)
    call = NormCase(2, 5, 4, 3, residual=True, mixed=True).make(torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        assert ours(copied(call), backend).dtype == torch.bfloat16
        wide = call._replace(residual=call.residual.float())  # type: ignore[union-attr]
        out, want = ours(copied(wide), backend), eager(copied(wide))
    assert out.dtype == want.dtype == torch.float32


@pytest.mark.minimum
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training: bool, backend: str) -> None:
    call = NormCase(2, 5, 4, 3, residual=True, training=training).make(torch.float32)
    compiled = torch.compile(lambda c: ours(c, backend), fullgraph=True, backend="aot_eager")
    grad = upstream_of(call)
    found, want = outcome(compiled, copied(call), grad), outcome(eager, copied(call), grad)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_bad_input_is_named() -> None:
    call = NormCase(2, 5, 4, 3, residual=True).make(torch.float32)
    assert call.residual is not None and call.weight is not None and call.running_var is not None

    def expect(kind: type[Exception], match: str, **changed: Any) -> None:
        for backend in ("auto", "reference"):
            before = None if call.running_mean is None else call.running_mean.clone()
            with pytest.raises(kind, match=match):
                ours(call._replace(**changed), backend)
            assert before is not None and torch.equal(before, call.running_mean), "statistics moved"  # type: ignore[arg-type]
            assert call.num_batches_tracked == 2

    expect(ValueError, r"x: got shape \(5, 4, 3\), need 4 dimensions", x=call.x[0])
    expect(TypeError, r"x: got torch.int64", x=call.x.long())
    expect(ValueError, r"weight: got shape \(4,\), need \(5,\)", weight=call.weight[:4])
    expect(TypeError, r"running_var: got torch.float64, need torch.float32", running_var=call.running_var.double())
    expect(ValueError, r"residual: got shape \(2, 5, 4, 2\)", residual=call.residual[..., :2])
    expect(TypeError, r"residual: got torch.bfloat16", residual=call.residual.bfloat16())
    expect(ValueError, r"act: got 'gelu'", act="gelu")
    expect(ValueError, r"running_var: got None, need both", running_var=None)
    none = {"running_mean": None, "running_var": None}
    expect(ValueError, r"running_mean: got None, need the statistics", **none, training=False)
    expect(ValueError, r"num_batches_tracked: got None", num_batches_tracked=None, momentum=None)
    expect(ValueError, r"more than 1 value per channel", x=call.x[:1, :, :1, :1], residual=None)
    expect(ValueError, r"one device", bias=torch.empty(5, device="meta"))
    with pytest.raises(ValueError, match=r"backend: got 'nope'"):
        ours(call, "nope")
    with pytest.raises(backends.BackendError, match=r"onednn has no batch_norm_act"):
        ours(call, "onednn")


def test_one_value_per_channel_says_what_batch_norm_says() -> None:
    x = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError) as theirs:
        nn.BatchNorm2d(3)(x)
    with pytest.raises(ValueError) as mine:
        functional.batch_norm_act(x, None, None, None, None)
    assert str(mine.value) == str(theirs.value)
