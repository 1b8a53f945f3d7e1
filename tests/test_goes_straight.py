"""When a kernel of ours may be called past the dispatcher: where nobody could tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused.ops import library

Context = Callable[[], contextlib.AbstractContextManager[object]]

STRAIGHT: dict[str, Context] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


OBSERVED: dict[str, Context] = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Dispatched,
    "function mode": Functions,
    "default device": lambda: torch.device("meta"),
    "profiler": profile,
}


@pytest.mark.parametrize("mode", STRAIGHT)
def test_plain_inference_goes_straight(mode: str) -> None:
    x = torch.ones(1)
    with STRAIGHT[mode]():
        assert library.goes_straight(x, (x, nn.Parameter(x), None))
        assert library.goes_straight(torch.ones(1), ())


@pytest.mark.parametrize("mode", OBSERVED)
def test_whoever_looks_sees_the_op(mode: str) -> None:
    x = torch.ones(1)
    with torch.no_grad(), OBSERVED[mode]():
        assert not library.goes_straight(x, ())


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_transforms_tracing_and_other_tensors_go_through_the_dispatcher() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(library.goes_straight(x, ()))
        return x * 2

    class Subclass(Tensor):
        pass

    x = torch.ones(2, 2)
    with torch.no_grad():
        torch.func.vmap(look)(x)
        torch.func.functionalize(look)(x)
        torch.jit.trace(look, x, check_trace=False)
        look(x.to("meta"))
        look(x.as_subclass(Subclass))
        seen.append(library.goes_straight(x, (x.as_subclass(Subclass),)))
    assert len(seen) == 6 and not any(seen)


@pytest.mark.parametrize("kind", ["block", "stem"])
def test_the_same_either_way(kind: str) -> None:
    torch.manual_seed(0)
    module: nn.Module = rf.FusedBasicBlock(32, 32) if kind == "block" else rf.FusedConvBNReLU(32, 32, 3, padding=1)
    module.eval()
    x = torch.randn(2, 32, 7, 9)
    with torch.no_grad():
        straight = module(x)
        with profile() as observed:
            through = module(x)
        with torch.device("meta"):
            elsewhere = module(x)
    assert torch.equal(straight, through) and torch.equal(straight, elsewhere)
    assert straight.stride() == through.stride()
    assert any(event.key.startswith("resnet_fused::") for event in observed.key_averages())


def test_bad_input_is_named_without_the_dispatcher() -> None:
    block = rf.FusedBasicBlock(32, 32).eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="x: "):
        block(torch.randn(2, 16, 7, 9))
