"""An eager network and its fused twin, to which the same things are done, and their predictions compared.

What is compared is always the fused model against eager's computation with the very tensors that the fused model holds
at that moment: after each step the eager twin takes over the values of the fused one. So differences do not add up,
and nothing but a wrong prediction is told as one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from small_networks import images, network
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.testing.budget import measure

MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": contextlib.nullcontext,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a prediction is made."""

    mode: str = "no_grad"
    autocast: bool = False
    batch: int = 2
    size: int = 8
    channels_last: bool = False

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with MODES[self.mode](), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            yield

    def images(self, dtype: torch.dtype) -> Tensor:
        x = images(self.batch, self.size, self.size + self.batch, dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


@dataclass
class Side:
    """One of the twins, and what is known of it."""

    model: nn.Module
    aliases: dict[str, Tensor] = field(default_factory=dict)  # other ways to the memory of its tensors, by their names
    handles: list[Any] = field(default_factory=list)  # of hooks
    random: torch.Generator = field(default_factory=torch.Generator)
    kept: list[Any] = field(default_factory=list)  # what has to stay alive

    def below(self, limit: int) -> int:
        """A number drawn alike on both sides."""
        return int(torch.randint(limit, (), generator=self.random))

    def pick(self, things: list[Any]) -> Any:
        return things[self.below(len(things))]


Way = Callable[[Side], object]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def run(model: nn.Module, x: Tensor, look: Look) -> dict[str, Tensor]:
    """The prediction and, where the mode records gradients, those of x and of the parameters."""
    if look.mode != "grad":
        with look.context():
            return {"y": model(x)}
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with look.context():
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    return found | {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def copied(model: nn.Module) -> nn.Module:
    """A copy, also of what hooks compute anew at each call: pruned and normalised weights, which have a history."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                module.__dict__[name] = value.detach()
    return copy.deepcopy(model)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64; tensors made in inference mode cannot leave it otherwise."""
    with torch.inference_mode(False), torch.no_grad():
        return copied(model).double()


def check_prediction(ours: Tensor, eager: Tensor, exact: Tensor, others: Callable[[], list[Tensor]]) -> None:
    """Within the budget of ``resnet_fused.testing.budget``; float64 is computed by eager's own functions."""
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, eager, rtol=1e-8, atol=1e-8)
        return
    result = measure(ours, eager, exact)
    if not result.ok:
        result = measure(ours, eager, exact, *others())
    assert result.ok, f"prediction: {result}"


def check_gradients(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], low: bool) -> None:
    """By their norms: a ReLU whose input is almost zero decides either way, which moves a gradient by some percent in
    float32 and by a quarter in bfloat16 (``low``), eager's as well as ours."""
    assert list(ours) == list(eager)
    for name, value in ours.items():
        wanted = exact[name].double()
        error, eagers = (value.double() - wanted).norm(), (eager[name].double() - wanted).norm()
        limit = 4 * eagers + (0.4 if low else 0.1) * wanted.norm() + 1e-6
        assert error <= limit, f"{name}: off by {error:.3g}, eager by {eagers:.3g}, norm {wanted.norm():.3g}"


class Twins:
    """The two models and what is done to them."""

    def __init__(self, kind: str = "basic", dtype: torch.dtype = torch.float32, backend: str = "auto") -> None:
        model = network(kind).to(dtype)
        self.eager, self.fused = Side(model), Side(rf.fuse(model, backend=backend))
        self.backend = backend

    @property
    def dtype(self) -> torch.dtype:
        return next(self.fused.model.parameters()).dtype

    def refuses(self, error: BaseException) -> bool:
        """Whether this is a backend's right: one that was named serves a call or raises."""
        return self.backend != "auto" and isinstance(error, rf.BackendError)

    def do(self, way: Way, seed: int = 0) -> None:
        """Do it to both. What eager can, the fused one can."""
        raised = []
        for side in (self.eager, self.fused):
            side.random.manual_seed(seed)
            try:
                way(side)
            except Exception as error:
                raised.append(error)
            else:
                raised.append(None)
        if raised[1] is not None and raised[0] is None and not self.refuses(raised[1]):
            raise AssertionError(f"eager does this, the fused model raises {raised[1]!r}") from raised[1]
        self.meet(strict=raised == [None, None])

    def check(self, look: Look, calls: int = 3) -> None:
        """Predict several times, so that whatever is packed is packed after the last, and compare each time."""
        moves = any(m.training for m in self.eager.model.modules())
        found: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        x = look.images(torch.float32 if look.autocast else self.dtype)
        for _ in range(calls):
            if found is None or moves:
                exact_model = in_float64(self.eager.model)
                before = copied(self.eager.model) if moves else self.eager.model
                try:
                    eager = run(self.eager.model, x, look)
                except Exception:  # then ours may raise too, or not
                    with contextlib.suppress(Exception):
                        run(self.fused.model, x, look)
                    self.meet(strict=False)
                    return
                exact = run(exact_model, x.double(), Look(look.mode))
                found = eager, exact
            eager, exact = found

            def others(before: nn.Module = before) -> list[Tensor]:
                turned = copied(before).to(memory_format=torch.channels_last)
                return [run(turned, x.contiguous(memory_format=torch.channels_last), look)["y"]]

            try:
                ours = run(self.fused.model, x, look)
            except rf.BackendError as error:
                if not self.refuses(error):
                    raise
                self.meet(strict=False)
                return
            with torch.inference_mode(look.mode == "inference"):
                check_prediction(ours["y"], eager["y"], exact["y"].double(), others)
                del ours["y"]
                low = look.autocast or self.dtype.itemsize == 2
                check_gradients(ours, {k: eager[k] for k in eager if k != "y"}, exact, low)
            if moves:
                self.meet()
        for side in (self.eager, self.fused):
            side.model.zero_grad()

    def meet(self, strict: bool = True) -> None:
        """Compare everything that the two hold, and let the eager one take over the values of the other."""
        eager, fused = tensors_of(self.eager.model), tensors_of(self.fused.model)
        if strict:
            assert list(self.eager.model.state_dict()) == list(self.fused.model.state_dict())
            assert list(eager) == list(fused)
        for name, theirs in eager.items():
            ours = fused.get(name)
            if not strict and (ours is None or ours.shape != theirs.shape):
                continue
            assert (ours.shape, ours.dtype, ours.requires_grad) == (theirs.shape, theirs.dtype, theirs.requires_grad)
            with torch.inference_mode():
                a, b = ours.double(), theirs.double()
                if strict and not torch.equal(a, b):
                    share = 0.05 if ours.dtype in (torch.float32, torch.float64) else 0.2
                    off = (a - b).norm() / b.norm().clamp_min(1e-6)
                    assert off < share, f"{name}: holds other values than eager's, off by {off:.3g}"
                if not torch.equal(a, b):
                    theirs.copy_(ours)
        ours, theirs = ([m.training for m in s.model.modules()] for s in (self.fused, self.eager))
        assert not strict or ours == theirs

    def train(self, look: Look, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        """One step of an optimizer, after a forward and a backward pass of each model; eager's gradients for both."""
        self.check(Look("grad", look.autocast, look.batch, look.size, look.channels_last), calls=1)
        x = look.images(torch.float32 if look.autocast else self.dtype)
        recorded = Look("grad", look.autocast)
        try:
            run(self.eager.model, x, recorded)
        except Exception:  # tensors made in inference mode, say
            return
        try:
            run(self.fused.model, x, recorded)
        except rf.BackendError as error:
            if not self.refuses(error):
                raise
            return
        torch.nn.utils.clip_grad_norm_(self.eager.model.parameters(), 4.0)
        for ours, theirs in zip(self.fused.model.parameters(), self.eager.model.parameters(), strict=True):
            ours.grad = None if theirs.grad is None else torch.empty_like(ours).copy_(theirs.grad)

        def step(side: Side) -> None:
            trained = [p for p in side.model.parameters() if p.grad is not None]

            def decay() -> Tensor:  # for those that ask for a loss and its gradients several times
                loss = sum((p.square().sum() for p in trained), torch.zeros(()))
                torch.autograd.backward(loss, inputs=trained)
                return loss

            if trained:
                optimizer = make(trained)
                optimizer.step(decay) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
            side.model.zero_grad()

        self.do(step)
