"""Options of ``pytest bench/ --benchmark-only``, and the cases and contenders that they ask for."""

from __future__ import annotations

import pytest
import torch

from resnet_fused.cli.common import DTYPES, UserError, load_plugins, pick_device
from resnet_fused.testing.bench import contenders, suites

DEFAULT = ("eager NCHW", "eager channels_last", "fused")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--suite", choices=suites.SUITES, default="blocks")
    group.addoption("--device", default="auto", help="cpu, cuda, cuda:1, … (default: CUDA where there is one)")
    group.addoption("--batch", type=int, default=8)
    group.addoption("--dtype", choices=tuple(DTYPES), default="float32")
    group.addoption("--model", nargs="+", help="as in resnet-fused bench (default: those of the suite)")
    group.addoption("--size", type=int, help="height and width of the images (default: the model's own)")
    group.addoption("--case", default="", help="only cases whose id contains this text")
    group.addoption("--contender", nargs="+", default=list(DEFAULT), help="as in resnet-fused bench, or 'all'")
    group.addoption("--load", action="append", default=[], help="import first: a FILE.py or MODULE with backends")


def pytest_configure(config: pytest.Config) -> None:
    try:
        load_plugins(config.getoption("--load"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    wanted = option("--contender")
    try:
        names = list(contenders.choose(_device(metafunc.config), () if wanted == ["all"] else wanted)[0])
        found = suites.cases(
            option("--suite"),
            batches=[option("--batch")],
            dtypes=[DTYPES[option("--dtype")]],
            models=option("--model"),
            size=option("--size"),
        )
    except (ValueError, UserError) as error:
        raise pytest.UsageError(str(error)) from error
    chosen = [case for case in found if option("--case") in case.id]
    if not chosen:
        raise pytest.UsageError(f"--case {option('--case')}: no case has this in its name")
    metafunc.parametrize("case", chosen, ids=[case.id for case in chosen], scope="module")
    metafunc.parametrize("contender", names)


def _device(config: pytest.Config) -> torch.device:
    return pick_device(config.getoption("--device"))


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    return _device(pytestconfig)
