"""The demo's second part: ResNets over crops of two photographs, eager and fused, whole and block by block."""

from __future__ import annotations

import copy
import importlib.resources
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import resnet_fused
from resnet_fused.cli.common import DTYPES, steps
from resnet_fused.cli.demo.variants import time_variants, variants
from resnet_fused.testing.compare import check, fused_parts
from resnet_fused.testing.statistics import calibrate
from resnet_fused.testing.timing import interleaved
from resnet_fused.training.data import DEVIATION, MEAN
from resnet_fused.training.images import decode


@dataclass(frozen=True)
class Config:
    """Which models see the crops, and how long they are timed."""

    models: tuple[str, ...] = ("resnet18", "resnet50")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    size: int = 224
    rows: int = 2
    columns: int = 2
    repeats: int = 9
    max_seconds: float = 12.0
    seed: int = 0


def crops(size: int, rows: int, columns: int) -> Tensor:
    """``rows × columns`` crops of each of scikit-learn's two photographs (427×640), ``[N, 3, size, size]``, normalised.

    The crops lie evenly between the photograph's edges, and overlap where they must.
    """
    import numpy as np

    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    cut = []
    photographs = importlib.resources.files("sklearn.datasets.images").iterdir()
    for file in sorted((f for f in photographs if f.name.endswith(".jpg")), key=lambda f: f.name):
        image = torch.tensor(np.asarray(decode(file.read_bytes()))).permute(2, 0, 1).float() / 255
        image = (image - mean) / deviation
        tops, lefts = (_offsets(length, size, n) for length, n in zip(image.shape[1:], (rows, columns), strict=True))
        cut += [image[:, top : top + size, left : left + size] for top in tops for left in lefts]
    return torch.stack(cut)


def run(config: Config, device: torch.device, out: Console) -> list[dict[str, Any]]:
    """Every model in every dtype: error against the budget, times, and in the first dtype times of every block."""
    x = crops(config.size, config.rows, config.columns).to(device)
    results = []
    for name in config.models:
        torch.manual_seed(config.seed)
        base = getattr(resnet_fused, name)().eval().to(device)
        calibrate(base, x)
        for dtype in config.dtypes:
            out.print(f"{name}, {len(x)} crops of {config.size}×{config.size}, {dtype}")
            candidates = variants(copy.deepcopy(base).to(DTYPES[dtype]), x.to(DTYPES[dtype]))
            eager, image = candidates["eager channels_last"]
            verdict = check(name, "", "", eager, candidates["fused channels_last"][0], (image,))
            result = {"model": name, "dtype": dtype, "batch": len(x), "size": config.size, "verdict": verdict.to_dict()}
            if verdict.ok:
                timings = time_variants(candidates, config.repeats, out, config.max_seconds)
                result["milliseconds"] = {key: timing.to_dict() for key, timing in timings.items()}
                if dtype == config.dtypes[0]:
                    result["blocks"] = time_blocks(candidates, config, out)
            results.append(result)
    return results


def time_blocks(candidates: dict[str, tuple[nn.Module, Tensor]], config: Config, out: Console) -> list[dict[str, Any]]:
    """Median milliseconds of every fused part alone, eager and fused, both in channels_last."""
    eager, x = candidates["eager channels_last"]
    fused = candidates["fused channels_last"][0]
    parts = fused_parts(eager, fused, x)
    rows = []
    with steps(out, "timing blocks", len(parts)) as advance:
        for part in parts:
            inputs = part.inputs
            calls = {"eager": lambda: part.eager(*inputs), "fused": lambda: part.fused(*inputs)}  # noqa: B023
            timings = interleaved(
                calls, device=x.device, repeats=config.repeats, max_seconds=config.max_seconds / len(parts)
            )
            rows.append({"name": part.name, **{key: 1e3 * timing.p50 for key, timing in timings.items()}})
            advance(part.name)
    return rows


def failures(results: list[dict[str, Any]]) -> list[str]:
    """The faults in ``results`` that make the demo fail."""
    return [f"{r['model']} in {r['dtype']}: {r['verdict']}" for r in results if not r["verdict"]["ok"]]


def _offsets(length: int, size: int, count: int) -> list[int]:
    if size > length:
        raise ValueError(f"size: got {size}, need at most the photograph's {length}")
    return [round(i * (length - size) / max(count - 1, 1)) for i in range(count)]
