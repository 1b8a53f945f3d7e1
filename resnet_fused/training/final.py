"""The final comparison of a trained model: eager and fused on every test image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import resnet_fused
from resnet_fused.testing.compare import Verdict, check
from resnet_fused.testing.eager import eager_copy
from resnet_fused.training.loop import Trainer, logits_of
from resnet_fused.training.switches import full_float32


@dataclass(frozen=True)
class Final:
    """Accuracies on ``tested_on`` images, how many predictions of the fused model are eager's, and the comparison of
    both with float64: on a few images, where predictions differ on such."""

    accuracy: float
    accuracy_fused: float
    equal_predictions: int
    tested_on: int
    fused_parts: int
    verdict: Verdict


def compare(trainer: Trainer, model: nn.Module) -> Final:
    """Run ``model``, in eval mode, eager and fused over the test images. All processes call it.

    In full float32: TF32's rounding, not fusion, could turn a prediction that is nearly a tie.
    """
    fused = resnet_fused.fuse(model)
    eager = eager_copy(model, channels_last=True)
    totals = torch.zeros(4, dtype=torch.float64, device=trainer.device)
    few = torch.empty(0)
    verdict = None
    with full_float32():
        for x, y in trainer.test_batches():
            with torch.inference_mode():
                before, after = (logits_of(m(x)).argmax(1) for m in (eager, fused))
                rows = [before == y, after == y, before == after, torch.ones_like(y)]
                totals += torch.stack([row.double().sum() for row in rows])
            apart = x[before != after]
            if len(apart) or not len(few):
                few = apart if len(apart) else x[:8]
        if len(few):
            verdict = check("whole model", type(model).__name__, "", eager, fused, (few,))
    verdicts = [v for v in trainer.world.gather(verdict) if v is not None]
    right, right_fused, equal, count = trainer.world.sum(totals).tolist()
    return Final(
        right / count,
        right_fused / count,
        int(equal),
        int(count),
        len(resnet_fused.report(fused).fused),
        next((v for v in verdicts if not v.ok), verdicts[0]),
    )
