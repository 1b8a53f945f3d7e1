"""What a forward takes outside of its kernels, on a CPU: ``python tools/overhead.py resnet50``.

A network's plan is timed twice: with the guard and all else that a call does in Python, and by itself, as the one call
of the compiled library. The difference of the two is what is outside. Before each of them a buffer larger than the
caches is written, so that both begin as in a process that does other things between two images; ``--warm`` leaves that
out. Run it on a machine that does nothing else; without ``--threads`` it takes one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import resnet_fused as rf

_CACHE = 256 << 20  # bytes, more than any cache


def quantiles(function: Callable[[], object], clear: Callable[[], object], repeats: int) -> list[float]:
    """The 20th, 50th and 80th percentile of the function's time, in microseconds."""
    times = []
    for _ in range(repeats):
        clear()
        start = time.perf_counter_ns()
        function()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return [sorted(times)[len(times) * percent // 100] for percent in (20, 50, 80)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet50", help="a function of resnet_fused that makes a network")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm", action="store_true", help="leave the caches as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = getattr(rf, options.model)().eval()
    x = torch.randn(options.batch, 3, options.size, options.size)
    other = torch.zeros(_CACHE, dtype=torch.uint8)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        network = model._rf_state.prepared.network
        plan = None if network is None else network.plan(x, False)
        if plan is None:
            raise SystemExit(f"{options.model}: no plan computes it here")
        clear: Callable[[], object] = (lambda: None) if options.warm else (lambda: other.add_(1))
        whole, alone, guard = (
            quantiles(function, clear, options.repeats)
            for function in (lambda: model(x), lambda: model.fc(plan(x)), lambda: network.guard.holds(model))
        )
    print(f"{'microseconds':24}{'p20':>10}{'p50':>10}{'p80':>10}")
    for name, times in (("forward", whole), ("the library's call, fc", alone), ("guard", guard)):
        print(f"{name:24}" + "".join(f"{t:10.0f}" for t in times))
    print(f"{'outside (p50 - p50)':34}{whole[1] - alone[1]:10.0f}")


if __name__ == "__main__":
    main()
