"""How long the host takes for one forward of a network, ours beside eager's, where no kernel runs.

``python tools/host_time.py [--model resnet50] [--batch 1]``. Ours: a fused network's plan, with Triton's own launcher
up to the driver, which a stand-in takes the place of (stand_in_cuda.py): what the host does for a GPU but for the
driver's own work. Eager's: the same network on an empty batch on the CPU, so modules, dispatch and allocation, but no
kernels; on a GPU cuDNN's look-ups and the driver's work come on top. Prints milliseconds, the best and the median of
several runs, launches, and allocations between the first launch and the last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from stand_in_cuda import StandIn, on_gpu

import resnet_fused as rf
from resnet_fused.ops import device_plan, packed
from resnet_fused.testing.torchvision_compat import import_torchvision


def measure(run: Callable[[], object], repeats: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of one call: the best and the median of several rounds."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        taken.append((time.perf_counter() - begin) / repeats * 1e3)
    return min(taken), statistics.median(taken)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=["resnet18", "resnet34", "resnet50", "resnet101"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=20, help="forwards of a round")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["RESNET_FUSED_TUNING"] = "0"
    stand_in = StandIn()
    build = getattr(import_torchvision().models, options.model)
    rows, rounds = {}, (options.repeats, options.rounds)
    eager = build(weights=None).eval().half()
    fused = rf.fuse(eager)
    with torch.inference_mode():
        empty = torch.empty(0, 3, options.size, options.size, dtype=torch.half)
        rows["eager, no kernels"] = measure(lambda: eager(empty), *rounds)
        x = torch.empty(options.batch, 3, options.size, options.size, dtype=torch.half)
        x = x.contiguous(memory_format=torch.channels_last)
        with on_gpu(), packed.at_once(), mock.patch.object(device_plan, "_mean", _mean_of_none):
            fused(x)
            before = stand_in.launches()
            fused(x)
            launches = stand_in.launches() - before
            rows["fused, plan and guard"] = measure(lambda: fused(x), *rounds)
            (plan,) = fused._rf_state.prepared.network.guard.kept.values()
            rows["fused, plan alone"] = measure(lambda: plan(x), *rounds)
            behind = operations(lambda: plan(x))
    print(f"{options.model}, float16, batch {options.batch}, {options.size} pixels; torch {torch.__version__}")
    print(f"{launches} launches; what aten does behind the last: {', '.join(behind) or 'nothing'}")
    print(f"{'host time of a forward, ms':30s} {'best':>8s} {'median':>8s}")
    for name, (best, median) in rows.items():
        print(f"{name:30s} {best:8.3f} {median:8.3f}")


def operations(run: Callable[[], object]) -> list[str]:
    """The operations of aten in ``run()``, in their order."""
    found: list[str] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found.append(str(function))
            return function(*args, **(kwargs or {}))

    with Listen():
        run()
    return found


def _mean_of_none(y: Tensor) -> Tensor:
    """The head of a batch of none: its kernels run on the CPU here, which would be timed with the host."""
    return torch.flatten(F.adaptive_avg_pool2d(y[:0], 1), 1)


if __name__ == "__main__":
    main()
