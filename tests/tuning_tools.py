"""What the tests of tuning tables and of the tuner share: fixtures (to be imported), a clock, small calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall
from resnet_fused.testing.statistics import calibrate
from resnet_fused.testing.timing import Timing
from resnet_fused.tuning import environment, lookup, table, tuner, verify
from resnet_fused.tuning.table import Entry

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, name="own_tables")
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables are read, from a directory of the test's own; Triton's interpreter is no candidate."""
    monkeypatch.setenv("RESNET_FUSED_TUNING", "1")
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    backends._unavailable.cache_clear()
    lookup.forget()
    yield tmp_path
    backends._unavailable.cache_clear()
    monkeypatch.undo()
    lookup.forget()


@pytest.fixture(name="register")
def _register() -> Iterator[Callable[..., list[Any]]]:
    """Register a backend that computes as eager does, and list the calls that it serves."""
    names: dict[str, None] = {}

    def make(name: str, op: str = "conv_bn_act", run: Any = reference.run, **options: Any) -> list[Any]:
        served: list[Any] = []

        def kernel(call: Any, *config: Any) -> Tensor:
            served.append((call, *config))
            return run(call)

        rf.register_backend(name, op, **options)(kernel)
        names[name] = None
        return served

    yield make
    for name in names:
        rf.unregister_backend(name)


def clock(monkeypatch: pytest.MonkeyPatch, fastest: str) -> list[str]:
    """Candidates whose label is ``fastest`` take 1 ms, all others 2 ms; gives the labels that were ever timed."""
    timed: list[str] = []

    def interleaved(runs: dict[str, Any], **options: Any) -> dict[str, Timing]:
        timed.extend(runs)
        return {name: Timing((1e-3 if name == fastest else 2e-3,)) for name in runs}

    monkeypatch.setattr(tuner, "interleaved", interleaved)
    monkeypatch.setattr(verify, "interleaved", interleaved)
    return timed


def conv_call(channels: int = 8, n: int = 2) -> ConvBNActCall:
    x = torch.randn(n, channels, 6, 6)
    vectors = [torch.rand(channels) + 0.5 for _ in range(4)]
    conv = ConvBN(torch.randn(channels, channels, 3, 3) / 9, None, *vectors, 1e-5, (1, 1), (1, 1))
    return ConvBNActCall(x, conv, None, "relu")


def run_auto(call: ConvBNActCall) -> Tensor:
    c = call.conv
    return rf.conv_bn_act(
        call.x, c.weight, c.bn_weight, c.bn_bias, c.running_mean, c.running_var, padding=1, backend="auto"
    )


def write(entries: dict[str, Entry]) -> Path:
    """The user's table, as another process would leave it; read anew."""
    facts = environment.describe(CPU)
    table.merge(environment.path_for(facts), facts, entries)
    lookup.forget()
    return environment.path_for(facts)


def network() -> tuple[nn.Module, Tensor]:
    model = rf.resnet20(num_classes=3)
    x = torch.randn(2, 3, 12, 12)
    model.eval()
    calibrate(model, x, perturb=True)
    return model, x
