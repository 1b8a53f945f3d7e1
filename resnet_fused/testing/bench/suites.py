"""The suites of the benchmark, and their cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from resnet_fused.testing.bench import cases as inference
from resnet_fused.testing.bench import training_cases as training
from resnet_fused.testing.bench.cases import Case, Parts

SUITES = ("kernels", "blocks", "models", "training")
_List = Callable[[tuple[str, ...], "int | None"], Iterator[Parts]]
_LISTS: dict[str, tuple[type[Case], _List, tuple[str, ...]]] = {
    "kernels": (Case, inference.kernel_cases, inference.KERNEL_MODELS),
    "blocks": (Case, inference.block_cases, inference.KERNEL_MODELS),
    "models": (Case, inference.model_cases, inference.MODELS),
    "training": (training.TrainingCase, training.training_cases, training.MODELS),
}


def cases(
    suite: str,
    *,
    batches: Iterable[int] = (1, 8, 32),
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    models: Sequence[str] | None = None,
    size: int | None = 224,
) -> list[Case]:
    """All cases of a suite.

    Args:
        suite: one of SUITES.
        batches, dtypes: the cases come in each combination.
        models: names as in :func:`resnet_fused.testing.bench.cases.network`; by default ResNet-18 and -50, in the
            suite ``models`` -34 and -101 too.
        size: height and width of the images; None for each model's own.

    Raises:
        ValueError: there is no such suite.
        ModelError: there is no such model.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, need one of {SUITES}")
    kind, parts, default = _LISTS[suite]
    names = tuple(models or default)
    return [
        kind(suite, model, name, batch, dtype, tuple((batch, *shape) for shape in shapes), build, fused, level)
        for dtype in dtypes
        for batch in batches
        for model, name, shapes, build, fused, level in parts(names, size)
    ]
