"""The demo's first part: a small ResNet learns handwritten digits, is fused, and predicts the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

import resnet_fused
from resnet_fused.cli.common import steps
from resnet_fused.cli.demo.variants import time_variants, variants
from resnet_fused.testing.compare import check
from resnet_fused.training import Data, Recipe, Trainer
from resnet_fused.training.data import TensorImages, digits
from resnet_fused.training.switches import full_float32

LEAST_ACCURACY = 0.97


@dataclass(frozen=True)
class Config:
    """How the digits are learnt. The images are 8×8; ``size`` is what they are scaled up to."""

    epochs: int = 10
    size: int = 16
    batch: int = 64
    learning_rate: float = 0.1
    repeats: int = 15
    seed: int = 0


def load(size: int, seed: int) -> tuple[Data, TensorImages]:
    """The digits, and those of them that are held out."""
    data = digits(size, seed)
    assert isinstance(data.val, TensorImages)
    return data, data.val


def train(model: nn.Module, data: Data, config: Config, out: Console) -> None:
    """Train in place with SGD, one learning-rate cycle, images moved by up to an eighth of their size."""
    recipe = Recipe(config.epochs, config.batch, config.learning_rate, config.epochs * 0.3, seed=config.seed)
    trainer = Trainer(model, data, recipe, device=next(model.parameters()).device)
    with steps(out, "training", config.epochs) as advance:
        trainer.run(on_epoch=lambda row: advance(f"loss {row['loss']:.3f}"))
    model.eval()


def run(config: Config, device: torch.device, out: Console) -> dict[str, Any]:
    """Train, fuse, compare every prediction on the held-out digits, and time both."""
    data, held_out = load(config.size, config.seed)
    torch.manual_seed(config.seed)
    model = resnet_fused.resnet20().to(device)
    train(model, data, config, out)
    with full_float32():
        x = held_out.x.to(device)
        candidates = variants(model, x)
        with torch.inference_mode():
            predicted = {name: model(image).argmax(1).cpu() for name, (model, image) in candidates.items()}
        verdict = check("resnet20", "", "", candidates["eager NCHW"][0], candidates["fused NCHW"][0], (x,))
        timings = time_variants(candidates, config.repeats, out, max_seconds=15)
    baseline = predicted["eager NCHW"]
    equal = min(int((p == baseline).sum()) for name, p in predicted.items() if name.startswith("fused"))
    return {
        "model": "resnet20",
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_on": len(data.train),
        "tested_on": len(held_out),
        "accuracy": float((baseline == held_out.y).double().mean()),
        "accuracy_fused": float((predicted["fused NCHW"] == held_out.y).double().mean()),
        "equal_predictions": equal,
        "verdict": verdict.to_dict(),
        "milliseconds": {name: timing.to_dict() for name, timing in timings.items()},
    }


def failures(result: dict[str, Any]) -> list[str]:
    """The faults in ``result`` that make the demo fail."""
    found = []
    if result["accuracy"] < LEAST_ACCURACY:
        found.append(f"accuracy on held-out digits is {result['accuracy']:.2%}, need {LEAST_ACCURACY:.0%}")
    if result["equal_predictions"] != result["tested_on"]:
        found.append(f"only {result['equal_predictions']} of {result['tested_on']} predictions are eager's")
    if not result["verdict"]["ok"]:
        found.append(f"fused logits are outside the error budget: {result['verdict']}")
    return found
