"""Options of ``pytest bench/ --benchmark-only``, and the cases and contenders that they ask for."""

from __future__ import annotations

import pytest
import torch
from run import DTYPES

from resnet_fused import registry
from resnet_fused.testing.bench import cases, contenders

DEFAULT = ("eager NCHW", "eager channels_last", "fused")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--suite", choices=cases.SUITES, default="blocks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--batch", type=int, default=8)
    group.addoption("--dtype", choices=tuple(DTYPES), default="float32")
    group.addoption("--model", nargs="+", help="torchvision's names (default: those of the suite)")
    group.addoption("--size", type=int, default=224, help="height and width of the images")
    group.addoption("--case", default="", help="only cases whose id contains this text")
    group.addoption("--contender", nargs="+", default=list(DEFAULT), help="names as in run.py's tables, or 'all'")
    group.addoption("--load", action="append", default=[], help="import first: a FILE.py or MODULE with backends")


def pytest_configure(config: pytest.Config) -> None:
    for plugin in config.getoption("--load"):
        registry.load(plugin)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device = torch.device(option("--device"))
    present, absent = contenders.table(device)
    names = list(present) if option("--contender") == ["all"] else option("--contender")
    for name in names:
        if name not in present:
            raise pytest.UsageError(
                f"--contender {name}: {absent.get(name, 'unknown')}. Here are: {', '.join(present)}"
            )
    found = cases.cases(
        option("--suite"),
        batches=[option("--batch")],
        dtypes=[DTYPES[option("--dtype")]],
        models=option("--model"),
        size=option("--size"),
    )
    chosen = [case for case in found if option("--case") in case.id]
    metafunc.parametrize("case", chosen, ids=[case.id for case in chosen], scope="module")
    metafunc.parametrize("contender", names)


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))
