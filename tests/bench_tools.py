"""What the tests of the harness share: a stand-in for a machine, contenders, a case (fixture, to be imported)."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import roofline
from resnet_fused.testing.bench import contenders, measure, store, suites
from resnet_fused.testing.bench.machine import Machine

CPU = torch.device("cpu")
RATES = roofline.Device("toy", {torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9)
QUICK = measure.Plan(repeats=3, min_seconds=1e-5)
FACTS = dict.fromkeys(store.ENVIRONMENT, "x")


class StandIn(Machine):
    """A CPU that says it has a second cache state and graphs; what it is asked for is kept."""

    caches = ("warm", "cold")
    graphs = True

    def __init__(self):
        super().__init__(CPU)
        self.captured = []

    def graph(self, call):
        self.captured.append(call)
        return lambda: call()


@pytest.fixture(name="case")
def _case():
    return next(c for c in suites.cases("kernels", batches=[2], dtypes=[torch.float32], size=32) if "add" in c.id)


def pool(*names):
    present, _ = contenders.table(CPU)
    return {name: present[name] for name in names or ("eager NCHW", "eager channels_last", "fused")}
