"""add_relu: values, gradients, registration, layouts, bad input."""

from __future__ import annotations

import devices
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from resnet_fused import backends, functional
from resnet_fused.ops.add_relu import api
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.testing.budget import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1,), (4, 0, 3), (3, 1, 1, 1), (129,)], ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, b = torch.randn(2, *shape).to(device, dtype)
    want = F.relu(a + b)
    for name in devices.able("add_relu", AddReLUCall(a, b)):
        out = functional.add_relu(a, b, backend=name)
        assert_within_budget(out, want, F.relu(a.double() + b.double()), tf32=False)
        assert out.stride() == want.stride()


@given(data=st.data())
def test_strides_follow_eagers(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    order = data.draw(st.permutations(range(len(shape))))
    a = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    b = torch.randn(shape)
    out = functional.add_relu(a, b)
    assert out.stride() == F.relu(a + b).stride()
    assert torch.equal(out, F.relu(a + b))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_specials_pass(special: float, device: str) -> None:
    a, b = torch.randn(2, 64, device=device)
    a[3] = b[5] = special
    out, want = functional.add_relu(a, b), F.relu(a + b)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())


def test_gradients() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    assert torch.autograd.gradcheck(functional.add_relu, (a, b))
    assert torch.autograd.gradgradcheck(functional.add_relu, (a, b))


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad: bool) -> None:
    a, b = torch.randn(2, 3, 4, requires_grad=grad), torch.randn(2, 3, 4)
    torch.library.opcheck(api.OP, (a, b, "auto"))


def test_autocast_promotes_as_eager_does() -> None:
    a, b = torch.randn(8), torch.randn(8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.add_relu(a, b).dtype == (a + b).dtype
        assert functional.add_relu(b, b).dtype == (b + b).dtype


def test_bad_input_is_named() -> None:
    a = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"b: got shape \(4, 3\), need that of a, \(3, 4\)"):
        functional.add_relu(a, a.T)
    with pytest.raises(TypeError, match=r"b: got torch.float64"):
        functional.add_relu(a, a.double())
    with pytest.raises(TypeError, match=r"a: got torch.int64"):
        functional.add_relu(a.long(), a.long())
    with pytest.raises(ValueError, match=r"one device"):
        functional.add_relu(a, torch.empty(3, 4, device="meta"))
    with pytest.raises(backends.BackendError, match=r"onednn has no add_relu"):
        functional.add_relu(a, a, backend="onednn")
