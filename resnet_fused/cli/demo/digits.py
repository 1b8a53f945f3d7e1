"""The demo's first part: a small ResNet learns handwritten digits, is fused, and predicts the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import resnet_fused
from resnet_fused.cli.bench import time_variants, variants
from resnet_fused.cli.common import steps
from resnet_fused.testing.compare import check

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


@dataclass(frozen=True)
class Split:
    """Images ``[N, 3, S, S]`` in float32, of mean 0 and deviation 1 over the training images, with their digits."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(size: int, seed: int) -> Split:
    """scikit-learn's handwritten digits, a fifth of each digit held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test, train_y, test_y = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )  # fmt: skip

    def upscaled(flat: Any) -> Tensor:
        x = torch.from_numpy(flat).float().view(-1, 1, 8, 8)
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    train_x, test_x = upscaled(train), upscaled(test)
    mean, deviation = train_x.mean(), train_x.std()

    def normalised(x: Tensor) -> Tensor:
        return ((x - mean) / deviation).repeat(1, 3, 1, 1)

    return Split(normalised(train_x), torch.from_numpy(train_y), normalised(test_x), torch.from_numpy(test_y))


def train(model: nn.Module, split: Split, config: Config, out: Console) -> None:
    """Train in place with SGD, one learning-rate cycle, images moved by up to an eighth of their size."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    per_epoch = -(-len(split.train_x) // config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * per_epoch
    )
    reach = config.size // 8
    model.train()
    with steps(out, "training", config.epochs) as advance:
        for _ in range(config.epochs):
            total = 0.0
            for chosen in torch.randperm(len(split.train_x), generator=generator).split(config.batch):
                dx, dy = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
                x = torch.roll(split.train_x[chosen], (dy, dx), (2, 3))  # the border is background
                loss = F.cross_entropy(model(x.to(device)), split.train_y[chosen].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss) * len(chosen)
            advance(f"loss {total / len(split.train_x):.3f}")
    model.eval()


def run(config: Config, device: torch.device, out: Console) -> dict[str, Any]:
    """Train, fuse, compare every prediction on the held-out digits, and time both."""
    split = load(config.size, config.seed)
    torch.manual_seed(config.seed)
    model = resnet_fused.resnet20().to(device)
    train(model, split, config, out)
    with _full_float32():
        x = split.test_x.to(device)
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
        "trained_on": len(split.train_y),
        "tested_on": len(split.test_y),
        "accuracy": float((baseline == split.test_y).double().mean()),
        "accuracy_fused": float((predicted["fused NCHW"] == split.test_y).double().mean()),
        "equal_predictions": equal,
        "verdict": verdict.to_dict(),
        "milliseconds": {name: timing.to_dict() for name, timing in timings.items()},
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What in ``result`` the demo must not let pass."""
    found = []
    if result["accuracy"] < LEAST_ACCURACY:
        found.append(f"accuracy on held-out digits is {result['accuracy']:.2%}, need {LEAST_ACCURACY:.0%}")
    if result["equal_predictions"] != result["tested_on"]:
        found.append(f"only {result['equal_predictions']} of {result['tested_on']} predictions are eager's")
    if not result["verdict"]["ok"]:
        found.append(f"fused logits are outside the error budget: {result['verdict']}")
    return found


@contextmanager
def _full_float32() -> Iterator[None]:
    """Without TF32: its rounding, not fusion, could then turn a prediction that is nearly a tie."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
