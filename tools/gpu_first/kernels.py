"""Every kernel against float64, one row of CSV each; or, for the sanitizer and the profiler, some of them run once."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_first.device import BACKENDS
from gpu_first.trials import RESNET_CASES, Trial, backend_of, block_call, expected, trials
from resnet_fused import extension
from resnet_fused.testing.bench import environment
from resnet_fused.testing.budget import measure

COLUMNS = ("op", "backend", "kernel", "dtype", "case", "status", "ratio", "error", "eager_error", "note")


def row(trial: Trial) -> dict[str, Any]:
    """What came of it: "ok", "outside" (of the error budget) or "failed", with error over budget."""
    found: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    found |= {key: getattr(trial, key) for key in COLUMNS[:5]}
    try:
        out = trial.run()
        eager, *others = trial.eager()
        error = measure(out, eager, trial.exact(), *others)
        if out.is_cuda:
            torch.cuda.synchronize()
    except Exception as raised:  # one kernel's failure does not keep the others from being tried
        text = " ".join(str(raised).split())[:300]
        return found | {"status": "failed", "note": f"{type(raised).__name__}: {text}"}
    figures = {"ratio": error.ratio, "error": error.error, "eager_error": error.eager_error}
    return found | {"status": "ok" if error.ok else "outside"} | {k: f"{v:.4g}" for k, v in figures.items()}


def write(path: Path, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes the rows as they come, so that those before a hang are kept."""
    kept = []
    with path.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for one in found:
            writer.writerow(one)
            kept.append(one)
            if one["status"] not in ("ok", "stand-in"):
                print(*(one[key] for key in COLUMNS if one[key]), flush=True)
    return kept


def all_rows(backends: Sequence[str], device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Those of every trial, then one for each kernel that none took."""
    for backend in backends:
        taken = set()
        try:
            for trial in trials(backend, device, small):
                print(trial.op, backend, trial.kernel, trial.dtype, trial.case, flush=True)
                taken.add(trial.kernel)
                yield row(trial)
            untried = [name for name in sorted(expected(backend)) if not any(_is(name, kernel) for kernel in taken)]
        except Exception as raised:  # a backend that is not here
            untried, text = ["all"], f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        else:
            text = "no case takes it"
        for name in untried:
            yield dict.fromkeys(COLUMNS, "") | {"backend": backend, "kernel": name, "status": "failed", "note": text}


def _is(name: str, kernel: str) -> bool:
    return kernel == name or kernel.rpartition("-split")[0] == name


def rehearsal(small: bool = True) -> Iterator[dict[str, Any]]:
    """On a CPU: Triton's kernels in the interpreter, and for the kernels that only a GPU runs eager's own numbers."""
    for trial in trials("triton", "cpu", small):
        yield row(trial)
    names: dict[str, list[str]] = {"cudnn": ["cudnn_convolution_relu", "cudnn_convolution_add_relu"], "cuda": []}
    if extension.missing() is None:
        library = extension.module()
        names["cuda"] = [r["name"] for r in (*library.conv_bn_act_kernels(), *library.bottleneck_kernels())]
    model = next(trials("triton", "cpu", small))
    for backend, kernels in names.items():
        for kernel in kernels:
            stand_in = dataclasses.replace(model, backend=backend, kernel=kernel, run=_first(model.eager))
            yield row(stand_in) | {"status": "stand-in", "note": "eager PyTorch on a CPU stands in"}


def _first(many: Callable[[], list[Tensor]]) -> Callable[[], Tensor]:
    return lambda: many()[0]


def profile() -> int:
    """Three launches between the profiler's marks, on ResNet-50's sizes at batch 32: a 3x3 by CUDA, a 1x1 by Triton, a
    whole bottleneck by CUDA."""
    conv = backend_of("conv_bn_act", "cuda")
    pointwise = backend_of("conv_bn_act", "triton")
    whole = backend_of("bottleneck", "cuda")
    three, one = (dataclasses.replace(case, n=32).make(torch.bfloat16, "cuda") for case in RESNET_CASES[:2])
    block = block_call(256, 64, 1, False, (32, 56, 56), torch.bfloat16, "cuda")
    calls = (lambda: conv.run(three), lambda: pointwise.run(one), lambda: whole.run(block))
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
    print("figure: 3x3 by cuda, 1x1 by triton, bottleneck by cuda, in ncu.csv")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=BACKENDS, action="append", default=[])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--small", action="store_true", help="few configs and small shapes")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.profile:
        return profile()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is on first use
    device = torch.device("cpu" if args.dry_run else "cuda")
    torch.manual_seed(0)
    with environment.pinned(device):
        torch.backends.cudnn.benchmark = False  # a search runs every algorithm: nothing here is timed
        found = rehearsal() if args.dry_run else all_rows(args.backend or BACKENDS, "cuda", args.small)
        rows = write(args.csv, found) if args.csv else list(found)
    counts = Counter(one["status"] for one in rows)
    worst = max((float(one["ratio"]) for one in rows if one["ratio"]), default=float("nan"))
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"figure: {told}; worst {worst:.2f} of the budget")
    return 0 if rows and not counts["failed"] and not counts["outside"] else 1


if __name__ == "__main__":
    sys.exit(main())
