"""How many Python frames of this package one forward of a network takes: ``python tools/frames.py resnet50``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import resnet_fused as rf

_PACKAGE = str(Path(rf.__file__).parent)


def frames(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """The frames of the third of three calls with ``x``, by function: the first two choose and pack."""
    found: Counter[str] = Counter()

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(_PACKAGE):
            path = Path(frame.f_code.co_filename).relative_to(_PACKAGE)
            found[f"{path}:{frame.f_code.co_qualname}"] += 1

    with torch.no_grad():
        model(x), model(x)
        sys.setprofile(see)
        try:
            model(x)
        finally:
            sys.setprofile(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet50", help="a function of resnet_fused that makes a network")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    model = getattr(rf, options.model)().eval()
    found = frames(model, torch.randn(options.batch, 3, options.size, options.size))
    for name, count in found.most_common():
        print(f"{count:6} {name}")
    print(f"{found.total():6} in all")


if __name__ == "__main__":
    main()
