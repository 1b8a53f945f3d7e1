"""Options of ``pytest bench/ --benchmark-only``, and the cases and contenders that they ask for."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import registry
from resnet_fused.cli.common import DTYPES
from resnet_fused.testing.bench import contenders, suites

DEFAULT = ("eager NCHW", "eager channels_last", "fused")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--suite", choices=suites.SUITES, default="blocks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--batch", type=int, default=8)
    group.addoption("--dtype", choices=tuple(DTYPES), default="float32")
    group.addoption("--model", nargs="+", help="as in resnet-fused bench (default: those of the suite)")
    group.addoption("--size", type=int, help="height and width of the images (default: the model's own)")
    group.addoption("--case", default="", help="only cases whose id contains this text")
    group.addoption("--contender", nargs="+", default=list(DEFAULT), help="as in resnet-fused bench, or 'all'")
    group.addoption("--load", action="append", default=[], help="import first: a FILE.py or MODULE with backends")


def pytest_configure(config: pytest.Config) -> None:
    for plugin in config.getoption("--load"):
        registry.load(plugin)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device = torch.device(option("--device"))
    wanted = option("--contender")
    try:
        names = list(contenders.choose(device, () if wanted == ["all"] else wanted)[0])
    except ValueError as error:
        raise pytest.UsageError(f"--contender {error}") from None
    found = suites.cases(
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
