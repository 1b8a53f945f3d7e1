"""Derivatives of every kind through fused models and through the functions: what eager gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from small_networks import images, network, norms_of
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import resnet_fused as rf
from resnet_fused.functional import batch_norm_act
from resnet_fused.ops.convbn import ConvBN

pytestmark = [pytest.mark.waits, pytest.mark.usefixtures("one_thread")]

TARGETS = torch.tensor([1, 2])


def direction(x: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def directions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: direction(t, at) for at, (n, t) in enumerate(tensors.items())}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda named: F.cross_entropy(functional_call(model, named, (x,)), y)


def few(model: nn.Module) -> dict[str, Tensor]:
    """Some parameters of each sort, where a derivative has a size for each of them."""
    return {n: p for n, p in detached(model).items() if n in ("layer1.0.bn1.weight", "layer2.0.bn2.bias")}


# Forward mode.


def dual_numbers(model: nn.Module, x: Tensor) -> Any:
    with fwd.dual_level():
        out = fwd.unpack_dual(model(fwd.make_dual(x, direction(x))))
    return out.primal, out.tangent


def dual_numbers_without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return dual_numbers(model, x)


def dual_weights(model: nn.Module, x: Tensor) -> Any:
    with fwd.dual_level():
        named = {n: fwd.make_dual(p, direction(p)) for n, p in detached(model).items()}
        return fwd.unpack_dual(functional_call(model, named, (x,))).tangent


def dual_statistics(model: nn.Module, x: Tensor) -> Any:
    with fwd.dual_level():
        named = {n: fwd.make_dual(b, direction(b) * 0.1) for n, b in model.named_buffers() if "running" in n}
        return fwd.unpack_dual(functional_call(model, named, (x,))).tangent


def func_jvp(model: nn.Module, x: Tensor) -> Any:
    return jvp(model, (x,), (direction(x),))


def func_jvp_without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return func_jvp(model, x)


def jvp_of_weights(model: nn.Module, x: Tensor) -> Any:
    named = detached(model)
    return jvp(loss_of(model, x, TARGETS), (named,), (directions(named),))


def jacobian_forward(model: nn.Module, x: Tensor) -> Any:
    return jacfwd(lambda t: model(x * t))(torch.ones(2, 1, 1, 1, dtype=x.dtype))


def functional_jvp(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jvp(model, x, direction(x))


def jacobian_of_strategy(model: nn.Module, x: Tensor) -> Any:
    """Of what has rules for it in eager: pooling and flattening have none."""

    def features(t: Tensor) -> Tensor:
        return model.layer1(model.relu(model.bn1(model.conv1(x * t))))

    small = torch.ones(2, 1, 1, 1, dtype=x.dtype)
    return torch.autograd.functional.jacobian(features, small, vectorize=True, strategy="forward-mode")


def packed_before(model: nn.Module, x: Tensor) -> Any:
    """After predictions that packed the weights, and before others."""
    with torch.no_grad():
        first = [model(x) for _ in range(3)][-1]
    found = func_jvp(model, x)
    with torch.no_grad():
        return first, found, model(x)


# Backward mode, and both.


def gradient(model: nn.Module, x: Tensor) -> Any:
    return grad(loss_of(model, x, TARGETS))(detached(model))


def gradient_of_image(model: nn.Module, x: Tensor) -> Any:
    return grad(lambda t: model(t).square().sum())(x)


def per_sample_gradients(model: nn.Module, x: Tensor) -> Any:
    def loss(named: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, named, (image[None],)), target[None])

    return vmap(grad(loss), (None, 0, 0))(detached(model), x, TARGETS)


def ensemble(model: nn.Module, x: Tensor) -> Any:
    stacked = {n: torch.stack([p, p * 0.9, p * 1.1]) for n, p in detached(model).items()}
    return vmap(lambda named: functional_call(model, named, (x,)))(stacked)


def mapped(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return vmap(lambda image: model(image[None])[0])(x)


def mapped_twice(model: nn.Module, x: Tensor) -> Any:
    twice = torch.stack([x, x * 0.5])
    return vmap(vmap(lambda image: model(image[None])[0]))(twice)


def jacobian_reverse(model: nn.Module, x: Tensor) -> Any:
    return jacrev(lambda t: model(t[None])[0])(x[0])


def jacobian_of_weights(model: nn.Module, x: Tensor) -> Any:
    return jacrev(lambda named: functional_call(model, named, (x,)))(few(model))


def vjp_of_weights(model: nn.Module, x: Tensor) -> Any:
    out, back = vjp(lambda named: functional_call(model, named, (x,)), detached(model))
    return out, back(direction(out))


def jacobian_vectorised(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jacobian(model, x[:1], vectorize=True)


def batched_gradients(model: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    y = model(x)
    rows = torch.stack([direction(y, seed) for seed in range(3)])
    return torch.autograd.grad(y, x, rows, is_grads_batched=True)


# Second derivatives.


def double_backward(model: nn.Module, x: Tensor) -> Any:
    """A gradient penalty: also with respect to parameters that want a gradient."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return first, torch.autograd.grad(first.square().sum(), wanted, allow_unused=True)


def hvp_of_image(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.hvp(lambda t: model(t).square().sum(), x, direction(x))


def hvp_forward_over_reverse(model: nn.Module, x: Tensor) -> Any:
    named = detached(model)
    return jvp(grad(loss_of(model, x, TARGETS)), (named,), (directions(named),))


def hutchinson(model: nn.Module, x: Tensor) -> Any:
    named = detached(model)
    _, back = vjp(grad(loss_of(model, x, TARGETS)), named)
    return back(directions(named))


def hutchinson_vectorised(model: nn.Module, x: Tensor) -> Any:
    named = few(model)
    rows = {n: torch.stack([direction(t, seed) for seed in range(2)]) for n, t in named.items()}
    _, back = vjp(grad(loss_of(model, x, TARGETS)), named)
    return vmap(back)(rows)


def hessian_of_scales(model: nn.Module, x: Tensor) -> Any:
    return hessian(lambda t: model(x * t).square().sum())(torch.ones(2, 1, 1, 1, dtype=x.dtype))


def hessian_reverse_over_reverse(model: nn.Module, x: Tensor) -> Any:
    return jacrev(grad(lambda t: model(x * t).square().sum()))(torch.ones(2, 1, 1, 1, dtype=x.dtype))


DERIVATIVES = [
    dual_numbers, dual_numbers_without_gradients, dual_weights, dual_statistics, func_jvp, func_jvp_without_gradients,
    jvp_of_weights, jacobian_forward, functional_jvp, jacobian_of_strategy, packed_before, gradient, gradient_of_image,
    per_sample_gradients, ensemble, mapped, mapped_twice, jacobian_reverse, jacobian_of_weights, vjp_of_weights,
    jacobian_vectorised, batched_gradients, double_backward, hvp_of_image, hvp_forward_over_reverse, hutchinson,
    hutchinson_vectorised, hessian_of_scales, hessian_reverse_over_reverse,
]  # fmt: skip


def same(ours: Any, eager: Any) -> None:
    """Nested tensors alike, by their norms: single elements hang on the rounding of a ReLU's input."""
    ours, eager = (torch.utils._pytree.tree_flatten(found)[0] for found in (ours, eager))
    assert len(ours) == len(eager)
    for mine, theirs in zip(ours, eager, strict=True):
        if theirs is None:
            assert mine is None
            continue
        assert mine is not None, "no derivative where eager has one"
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        share = 1e-9 if theirs.dtype == torch.float64 else 2e-3
        off = (mine.double() - theirs.double()).norm()
        assert off <= share * theirs.double().norm() + 1e-9, f"off by {off:.3g} of {theirs.double().norm():.3g}"


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda f: f.__name__)
def test_of_a_model(derivative: Callable[..., Any], kind: str, frozen: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        eager = network(kind).to(dtype).requires_grad_(not frozen)
        fused = rf.fuse(eager)
        x = images(2, 8, dtype=dtype)
        same(derivative(fused, x), derivative(eager, x))


@pytest.mark.parametrize("derivative", [func_jvp, gradient_of_image, per_sample_gradients, double_backward])
def test_of_a_model_fused_generically(derivative: Callable[..., Any]) -> None:
    eager = network("basic")
    x = images(2, 8)
    same(derivative(rf.fuse(eager, generic=True), x), derivative(eager, x))


@pytest.mark.parametrize("recompute", ["activations", "last_conv"])
@pytest.mark.parametrize("derivative", [func_jvp, gradient_of_image, per_sample_gradients])
def test_of_a_model_that_recomputes(derivative: Callable[..., Any], recompute: str) -> None:
    eager = network("bottleneck")
    x = images(2, 8)
    same(derivative(rf.fuse(eager, recompute=recompute), x), derivative(eager, x))


@pytest.mark.parametrize("derivative", [func_jvp, gradient_of_image, mapped, per_sample_gradients, double_backward])
def test_in_training_mode(derivative: Callable[..., Any]) -> None:
    """With the batch's statistics; running ones cannot be written to under a transform, in eager either."""
    eager = network("basic").double().train()
    for norm in norms_of(eager):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    fused = rf.fuse(eager)
    x = images(2, 8, dtype=torch.float64)
    same(derivative(fused, x), derivative(eager, x))


def test_double_backward_moves_the_statistics_once() -> None:
    eager = network("basic").double().train()
    fused = rf.fuse(eager)
    x = images(4, 8, dtype=torch.float64)
    same(double_backward(fused, x), double_backward(eager, x))
    same(dict(fused.named_buffers()), dict(eager.named_buffers()))


# The functions by themselves: f(tensors) of ours and of eager.


def pair(cin: int, cout: int, size: int, stride: int = 1) -> ConvBN:
    g = torch.Generator().manual_seed(cin + cout + size)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64) + 0.2

    weight = torch.randn(cout, cin, size, size, generator=g, dtype=torch.float64) * 0.2
    return ConvBN(
        weight, None, uniform(cout), uniform(cout), uniform(cout), uniform(cout), 1e-5, (stride, stride),
        (size // 2, size // 2), (1, 1), 1,
    )  # fmt: skip


def eager_conv(x: Tensor, c: ConvBN) -> Tensor:
    y = F.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
    return F.batch_norm(y, c.running_mean, c.running_var, c.bn_weight, c.bn_bias, False, 0.0, c.eps)


def eager_block(x: Tensor, *convs: ConvBN, shortcut: ConvBN | None = None) -> Tensor:
    hidden = x
    for conv in convs[:-1]:
        hidden = F.relu(eager_conv(hidden, conv))
    return F.relu(eager_conv(hidden, convs[-1]) + (x if shortcut is None else eager_conv(x, shortcut)))


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ONE, TWO, THREE = pair(8, 8, 3), pair(8, 8, 3), pair(8, 8, 1)
FIRST, PROJECTION = pair(8, 8, 3, 2), pair(8, 8, 1, 2)


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "conv_bn_act": (
        lambda x, w: rf.conv_bn_act(x, w, *ONE[2:6], residual=x, padding=1),
        lambda x, w: F.relu(eager_conv(x, ONE._replace(weight=w)) + x),
    ),
    "conv_bn_act without ReLU": (
        lambda x, w: rf.conv_bn_act(x, w, *ONE[2:6], padding=1, stride=2, act="none"),
        lambda x, w: eager_conv(x, FIRST._replace(weight=w, **dict(zip(ConvBN._fields[2:6], ONE[2:6], strict=True)))),
    ),
    "add_relu": (lambda x, w: rf.add_relu(x, x.flip(2) * w.sum()), lambda x, w: F.relu(x + x.flip(2) * w.sum())),
    "batch_norm_act": (
        lambda x, w: batch_norm_act(x, w[:, 0, 0, 0], ONE.bn_bias, None, None, x),
        lambda x, w: F.relu(F.batch_norm(x, None, None, w[:, 0, 0, 0], ONE.bn_bias, True) + x),
    ),
    "batch_norm_act in eval mode": (
        lambda x, w: batch_norm_act(x, w[:, 0, 0, 0], *ONE[3:6], training=False),
        lambda x, w: F.relu(F.batch_norm(x, ONE[4], ONE[5], w[:, 0, 0, 0], ONE.bn_bias, False)),
    ),
    "basic_block": (
        lambda x, w: rf.basic_block(x, ONE._replace(weight=w), TWO),
        lambda x, w: eager_block(x, ONE._replace(weight=w), TWO),
    ),
    "basic_block with a projection": (
        lambda x, w: rf.basic_block(x, FIRST._replace(weight=w), TWO, PROJECTION),
        lambda x, w: eager_block(x, FIRST._replace(weight=w), TWO, shortcut=PROJECTION),
    ),
    "bottleneck": (
        lambda x, w: rf.bottleneck(x, THREE, ONE._replace(weight=w), THREE),
        lambda x, w: eager_block(x, THREE, ONE._replace(weight=w), THREE),
    ),
}


def _forward(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    return jvp(f, (x, w), (direction(x), direction(w)))


def _forward_without_gradients(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    with torch.no_grad(), fwd.dual_level():
        return fwd.unpack_dual(f(fwd.make_dual(x, direction(x)), w)).tangent


def _backward(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    return grad(lambda *a: f(*a).square().sum(), (0, 1))(x, w)


def _mapped(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    return vmap(lambda t: f(t, w))(torch.stack([x, x * 0.5, -x]))


def _mapped_weights(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    return vmap(lambda t: f(x, t))(torch.stack([w, w * 0.5]))


def _per_sample(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    return vmap(grad(lambda t, v: f(t, v).square().sum(), (0, 1)), (0, None))(torch.stack([x, x * 0.5]), w)


def _forward_over_reverse(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    return jvp(grad(lambda t: f(x, t).square().sum()), (w,), (direction(w),))


def _twice(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    first = torch.autograd.grad(f(x, w).square().sum(), (x, w), create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))


def _linearised(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    return torch.func.linearize(lambda t: f(t, w), x)[1](direction(x))


WAYS_TO_DERIVE = [_forward, _forward_without_gradients, _backward, _mapped, _mapped_weights, _per_sample,
                  _forward_over_reverse, _twice, _linearised]  # fmt: skip


@pytest.mark.parametrize("derive", WAYS_TO_DERIVE, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_a_function(name: str, derive: Callable[..., Any]) -> None:
    ours, eager = FUNCTIONS[name]
    same(derive(ours, X, ONE.weight), derive(eager, X, ONE.weight))


def test_numeric_check_of_each_function() -> None:
    """By finite differences in float64, forward and backward."""
    for name, (ours, _) in FUNCTIONS.items():
        x, w = X[:1, :, :3, :3].clone().requires_grad_(), ONE.weight.clone().requires_grad_()
        if "batch_norm" not in name:
            assert torch.autograd.gradcheck(ours, (x, w), check_forward_ad=True, fast_mode=True), name


def test_nothing_of_a_derivative_stays() -> None:
    """A prediction after a transform is the one before it, and the transform's wrappers are in no cache."""
    eager = network("basic")
    fused = rf.fuse(eager)
    x = images(2, 8)
    with torch.no_grad():
        before = [fused(x) for _ in range(3)][-1]
        for derivative in (func_jvp, mapped, per_sample_gradients):
            derivative(fused, x)
            assert torch.equal(fused(x), before)
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        same(copied(x), before)
