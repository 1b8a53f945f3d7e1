"""The same cases and contenders under pytest-benchmark, for its comparisons and histograms:

    pytest bench/ --benchmark-only --suite blocks --batch 8 --benchmark-autosave
    pytest-benchmark compare --group-by=group --histogram      # needs pytest-benchmark[histogram]

Each contender is compared with eager before it is timed; run.py, where they take turns, gives the figures to quote.
"""

from __future__ import annotations

import pytest
import torch

from resnet_fused.testing.bench import contenders, measure
from resnet_fused.testing.bench.machine import machine_for


def test_bench(benchmark, case, contender, device):
    module, inputs = case.make(device)
    factory = contenders.table(device)[0][contender]
    plan = measure.Plan(gate_images=4)
    entrant = measure.enter(case, module, inputs, {contender: factory}, machine_for(device), plan)[contender]
    if entrant.status == "absent":
        pytest.skip(entrant.note)
    assert entrant.call is not None, f"outside the error budget: {entrant.note}"
    call = entrant.call

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = case.id
    benchmark.extra_info |= {"contender": contender, "gate": entrant.gate, "batch": case.batch}
    with torch.inference_mode():
        benchmark(run)
