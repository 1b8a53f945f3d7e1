"""bottleneck and basic_block: one call, the same block; values, gradients, sub-batches, registration, bad input."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from resnet_fused import functional
from resnet_fused.ops import block, block_cpu, packed, workspace
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.ops.tensor_cache import CACHE
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase

F32 = torch.float32


def conv(
    c: int, k: int, kernel: int = 1, stride: int = 1, groups: int = 1, dtype: torch.dtype = torch.float32
) -> ConvBN:
    case = ConvCase(1, c, 9, 9, k, kernel=kernel, stride=stride, padding=kernel // 2, groups=groups)
    return case.make(dtype, seed=c + 7 * k + kernel).conv


def make(kind: str, dtype: torch.dtype = torch.float32, n: int = 3) -> BlockCall:
    """A small block of this kind: "<op>", with "-proj" a projection, "-ready" a shortcut computed elsewhere."""
    c = 32 if kind.endswith("proj") else 64
    stride = 2 if kind.endswith("proj") else 1
    if kind.startswith("bottleneck"):
        convs = (conv(c, 16, dtype=dtype), conv(16, 16, 3, stride, 4, dtype=dtype), conv(16, 64, dtype=dtype))
    else:
        convs = (conv(c, 64, 3, stride, dtype=dtype), conv(64, 64, 3, dtype=dtype))
    x = torch.randn(n, c, 9, 7).to(dtype).to(memory_format=torch.channels_last)
    shortcut = conv(c, 64, stride=2, dtype=dtype) if kind.endswith("proj") else None
    identity = torch.randn(n, 64, 9, 7).to(dtype) if kind.endswith("ready") else None
    return BlockCall(x, convs, shortcut, identity)


KINDS = ["bottleneck", "bottleneck-proj", "bottleneck-ready", "basic_block", "basic_block-proj", "basic_block-ready"]


def run(call: BlockCall, backend: str = "auto") -> Tensor:
    op = functional.bottleneck if len(call.convs) == 3 else functional.basic_block
    return op(call.x, *call.convs, call.shortcut, call.identity, backend=backend)


def eager(call: BlockCall, fmt: torch.memory_format | None = None) -> Tensor:
    if fmt is not None:
        call = change(call, lambda t: t.contiguous(memory_format=fmt) if t.dim() == 4 else t)
    return block.run_chain(call, reference.run)


def change(call: BlockCall, fn: object) -> BlockCall:
    def one(c: ConvBN | None) -> ConvBN | None:
        return None if c is None else ConvBN(*[None if t is None else fn(t) for t in c[:6]], *c[6:])  # type: ignore

    convs = tuple(c for c in map(one, call.convs) if c is not None)
    return BlockCall(fn(call.x), convs, one(call.shortcut), None if call.identity is None else fn(call.identity))  # type: ignore


def assert_right(call: BlockCall, backend: str = "auto") -> None:
    exact = eager(change(call, lambda t: t.double()))
    out, want = run(call, backend), eager(call)
    assert_within_budget(out, want, exact, eager(call, torch.contiguous_format))
    assert out.stride() == want.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_strides(kind: str, dtype: torch.dtype) -> None:
    call = make(kind, dtype)
    assert_right(call)
    assert_right(call._replace(x=call.x.contiguous()))


@pytest.mark.parametrize("n", [1, 5, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_sub_batches_give_the_same(kind: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(kind, n=n)
    monkeypatch.setattr(workspace, "LARGEST_BUFFER", 2 * 64 * 9 * 7 * 4)
    call.x[n - 1, 0, 0, 0] = float("nan")
    before = call.x.clone()
    out = run(call)
    assert torch.equal(out.isnan(), eager(call).isnan())
    assert_right(call)
    assert torch.equal(call.x.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_dies_with_the_weights(kind: str, backend: str) -> None:
    packed.clear()
    call = make(kind)
    run(call, backend)
    weights = [weakref.ref(c.weight) for c in call.convs]
    x = weakref.ref(call.x)
    assert len(CACHE)
    del call
    gc.collect()
    assert x() is None and all(weight() is None for weight in weights)
    assert not len(CACHE)


def test_the_shortcut_is_never_written_to() -> None:
    for kind in ("basic_block", "basic_block-ready"):
        call = make(kind)
        kept = [t.clone() for t in (call.x, call.identity) if t is not None]
        block_cpu.bind_onednn(call)(call)
        for before, after in zip(kept, [t for t in (call.x, call.identity) if t is not None], strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_eagers(kind: str) -> None:
    call = change(make(kind), lambda t: t.double().requires_grad_())

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        tensors = [call.x, *(t for c in call.convs for t in (c.weight, c.bn_weight, c.bn_bias))]
        return torch.autograd.grad(out.square().sum(), [t for t in tensors if t is not None])

    def frozen(c: ConvBN) -> ConvBN:
        return c._replace(running_mean=c.running_mean.detach(), running_var=c.running_var.detach())

    shortcut = None if call.shortcut is None else frozen(call.shortcut)
    call = call._replace(convs=tuple(map(frozen, call.convs)), shortcut=shortcut)
    for got, want in zip(gradients(run(call)), gradients(eager(call)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, grad: bool) -> None:
    call = make(kind, n=2)
    call.convs[0].weight.requires_grad_(grad)
    shortcut = call.shortcut if call.shortcut is not None else block._NO_CONV
    flat = [call.x, *(v for c in call.convs for v in c), *shortcut, call.identity, "auto"]
    op = getattr(torch.ops.resnet_fused, kind.split("-")[0]).default
    torch.library.opcheck(op, tuple(flat))


def test_autocast_gives_eagers_dtype() -> None:
    for kind in KINDS:
        call = make(kind)
        with torch.autocast("cpu", torch.bfloat16):
            out, want = run(call), eager(call)
        assert out.dtype == want.dtype, kind
        torch.testing.assert_close(out, want, rtol=3e-2, atol=3e-2)


def test_empty_batch() -> None:
    for kind in KINDS:
        call = make(kind, n=0)
        assert run(call).shape == eager(call).shape


def test_bad_input_is_named() -> None:
    call = make("bottleneck")
    with pytest.raises(ValueError, match=r"shortcut: got None, but x of shape \(3, 32, 9, 7\) cannot be added"):
        run(make("bottleneck-proj")._replace(shortcut=None))
    with pytest.raises(ValueError, match=r"conv2\.weight: the input has 16 channels"):
        run(call._replace(convs=(call.convs[0], conv(32, 16, 3), call.convs[2])))
    with pytest.raises(ValueError, match=r"identity: got a tensor beside shortcut"):
        run(make("bottleneck-proj")._replace(identity=torch.zeros(3, 64, 5, 4)))
    with pytest.raises(ValueError, match=r"shortcut: gives shape"):
        run(make("bottleneck-proj")._replace(shortcut=conv(32, 64)))
    with pytest.raises(ValueError, match=r"identity: got shape"):
        run(call._replace(identity=torch.zeros(3, 64, 5, 4)))
    with pytest.raises(ValueError, match=r"x: got shape"):
        run(call._replace(x=torch.zeros(64)))
