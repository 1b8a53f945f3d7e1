"""What training-mode batch norm with its residual and ReLU moves, fused and as eager's separate operations.

``python -m resnet_fused.roofline.norm`` prints the account of ResNet-50's batch norms in one training step on an H200.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.modules.resnet import resnet50
from resnet_fused.roofline.bound import H200

_SIZE = 2  # bytes of a bfloat16


class Passes(NamedTuple):
    """Full-size tensors that are read and written, each time that a kernel does: once per element and pass."""

    reads: int
    writes: int

    @property
    def bytes_per_element(self) -> int:
        return (self.reads + self.writes) * _SIZE


class Kind(NamedTuple):
    """What stands behind a batch norm."""

    name: str
    relu: bool
    residual: bool


KINDS = (Kind("norm", False, False), Kind("norm, ReLU", True, False), Kind("norm, residual, ReLU", True, True))


def fused(kind: Kind) -> tuple[Passes, Passes]:
    """(forward, backward) of csrc/batch_norm_act.

    Forward: the statistics read x; the output's pass reads x and the residual and writes. Backward: the sums read the
    gradient, x and, for ReLU's mask, the output; the gradient's pass reads them again and writes the gradient of x and,
    where ReLU changes it, that of the residual.
    """
    backward = 2 + kind.relu
    return Passes(2 + kind.residual, 1), Passes(2 * backward, 1 + (kind.residual and kind.relu))


def eager(kind: Kind) -> tuple[Passes, Passes]:
    """(forward, backward) of PyTorch's operations one after another, the sum and ReLU in place.

    Batch norm as above without the rest; the sum reads two and writes one, ReLU reads and writes one, ReLU's gradient
    reads two and writes one. The sum's own gradient moves nothing.
    """
    forward = Passes(2 + 2 * kind.residual + kind.relu, 1 + kind.residual + kind.relu)
    return forward, Passes(4 + 2 * kind.relu, 1 + kind.relu)


def norms(side: int = 224) -> dict[Kind, int]:
    """Elements per image of ResNet-50's batch norms, by kind."""
    with torch.device("meta"):
        model = resnet50()
        found = dict.fromkeys(KINDS, 0)

        def add(kind: Kind) -> object:
            def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                found[kind] += out.numel()

            return hook

        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):  # its output is what the batch norm behind it takes
                last, projection = name.endswith("conv3"), "downsample" in name
                module.register_forward_hook(add(KINDS[0 if projection else 2 if last else 1]))  # type: ignore[arg-type]
        model.train()(torch.empty(1, 3, side, side))
    return found


def main() -> int:
    batch, rate = 256, H200.bytes_per_s
    print("| behind the convolution | Melem per image | forward, bytes per element: fused / separate | backward | "
          f"batch {batch}, ms at {rate / 1e12} TB/s: fused / separate |")  # fmt: skip
    print("|---|" + "---:|" * 4)
    total = [0.0, 0.0]
    for kind, elements in norms().items():
        ways = fused(kind), eager(kind)
        bytes_ = [[passes.bytes_per_element for passes in way] for way in ways]
        times = [1e3 * batch * elements * sum(way) / rate for way in bytes_]
        total = [a + b for a, b in zip(total, times, strict=True)]
        pairs = [f"{ours} / {theirs}" for ours, theirs in zip(*bytes_, strict=True)]
        print(f"| {kind.name} | {elements / 1e6:.2f} | {' | '.join(pairs)} | {times[0]:.2f} / {times[1]:.2f} |")
    print(f"| all | {sum(norms().values()) / 1e6:.2f} | | | **{total[0]:.2f} / {total[1]:.2f}** |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
