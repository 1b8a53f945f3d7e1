"""What is timed: every op on every ResNet shape, every distinct block of ResNet-18 and -50, whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused.ops.convbn import short_dtype
from resnet_fused.testing.statistics import calibrate
from resnet_fused.testing.torchvision_compat import import_torchvision

SUITES = ("kernels", "blocks", "models")
MODELS = ("resnet18", "resnet34", "resnet50", "resnet101")
KERNEL_MODELS = ("resnet18", "resnet50")


@dataclass(frozen=True)
class Case:
    """One problem: an eager module, what it is fed, and how it is fused.

    ``build()`` gives the module in float32 on the CPU; ``shapes`` are its inputs'; ``fused(module, backend)`` makes
    ours of a module of the case's dtype. ``level`` is the level of fusion whose roofline the figure is held against.
    """

    suite: str
    model: str
    name: str
    batch: int
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[[], nn.Module]
    fused: Callable[[nn.Module, str], Callable[..., Tensor]]
    level: str

    @property
    def id(self) -> str:
        """``resnet50.layer1.0-bf16-N8-C64x56x56``."""
        n, c, h, w = self.shapes[0]
        return f"{self.name}-{short_dtype(self.dtype)}-N{n}-C{c}x{h}x{w}"

    def make(self, device: torch.device, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Module and inputs: random weights, batch norms that are not trivial, all from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build().eval()
            inputs = [torch.randn(shape) for shape in self.shapes]
            # Statistics of a few pixels would blow up on others: the smaller the image, the more of them.
            images = min(64, max(2, 2**14 // (self.shapes[0][2] * self.shapes[0][3])))
            first, *others = (torch.randn(images, *shape[1:]) for shape in self.shapes)
            calibrate(_Bound(module, others), first, perturb=True, seed=seed)
        return module.to(device, self.dtype), tuple(x.to(device, self.dtype) for x in inputs)


class _Bound(nn.Module):
    """A module of several inputs as one of its first."""

    def __init__(self, module: nn.Module, others: list[Tensor]) -> None:
        super().__init__()
        self.module, self.others = module, others

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, *self.others)  # type: ignore[no-any-return]


class ConvBNAct(nn.Module):
    """conv_bn_act in eager PyTorch, as a module that every baseline can take apart."""

    def __init__(self, conv: nn.Conv2d, act: str) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y, inplace=True) if self.act == "relu" else y

    def fused(self, backend: str) -> Callable[..., Tensor]:
        """The same through our op, served by ``backend``."""
        conv, bn = self.conv, self.bn
        geometry: Any = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        mean, var = bn.running_mean, bn.running_var
        assert mean is not None and var is not None

        def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return resnet_fused.conv_bn_act(
                *(x, conv.weight, bn.weight, bn.bias, mean, var, bn.eps, residual),
                **(geometry | {"act": self.act, "backend": backend}),
            )

        return call


class ConvBNAddAct(ConvBNAct):
    """The same with a residual."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        y = self.bn(self.conv(x))
        y += residual
        return F.relu(y, inplace=True) if self.act == "relu" else y


class AddReLU(nn.Module):
    """add_relu in eager PyTorch."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.relu_(a + b)

    def fused(self, backend: str) -> Callable[..., Tensor]:
        """The same through our op, served by ``backend``."""
        return functools.partial(resnet_fused.add_relu, backend=backend)


def _fuse_kernel(module: nn.Module, backend: str) -> Callable[..., Tensor]:
    assert isinstance(module, (ConvBNAct, AddReLU))
    return module.fused(backend)


def _fuse_module(module: nn.Module, backend: str) -> nn.Module:
    return resnet_fused.fuse(module, backend=backend, strict=True)


def torchvision_model(name: str) -> nn.Module:
    """torchvision's builder, random weights."""
    return getattr(import_torchvision().models, name)().eval()  # type: ignore[no-any-return]


def cases(
    suite: str,
    *,
    batches: Iterable[int] = (1, 8, 32),
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    models: Sequence[str] | None = None,
    size: int = 224,
) -> list[Case]:
    """All cases of a suite.

    Args:
        suite: one of SUITES.
        batches, dtypes: the cases come in each combination.
        models: torchvision's builders; for kernels and blocks ResNet-18 and -50 unless given.
        size: height and width of the images.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, need one of {SUITES}")
    names = tuple(models or (MODELS if suite == "models" else KERNEL_MODELS))
    make = {"kernels": _kernels, "blocks": _blocks, "models": _models}[suite]
    return [
        Case(suite, model, name, batch, dtype, tuple((batch, *shape) for shape in shapes), build, fused, level)
        for dtype in dtypes
        for batch in batches
        for model, name, shapes, build, fused, level in make(names, size)
    ]


_Parts = tuple[str, str, tuple[tuple[int, ...], ...], Callable[[], nn.Module], Any, str]


def _models(names: tuple[str, ...], size: int) -> Iterator[_Parts]:
    for name in names:
        yield name, name, ((3, size, size),), functools.partial(torchvision_model, name), _fuse_module, "block"


def _blocks(names: tuple[str, ...], size: int) -> Iterator[_Parts]:
    for name in names:
        seen = set()
        for path, block, shape, _ in _runs(name, size):
            convs = tuple(_geometry(m) for m in block.modules() if isinstance(m, nn.Conv2d))
            if type(block).__name__ in ("BasicBlock", "Bottleneck") and (convs, shape) not in seen:
                seen.add((convs, shape))
                build = functools.partial(_part_of, name, path)
                yield name, f"{name}.{path}", (shape,), build, _fuse_module, "block"


def _part_of(name: str, path: str) -> nn.Module:
    with torch.device("meta"):
        part = torchvision_model(name).get_submodule(path)
    part.to_empty(device="cpu")
    for module in part.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
    return part


def _kernels(names: tuple[str, ...], size: int) -> Iterator[_Parts]:
    """conv_bn_act on each distinct convolution, add_relu on each distinct block output."""
    seen: set[Any] = set()
    for model in names:
        for path, module, shape, out in _runs(model, size):
            if isinstance(module, nn.Conv2d):
                residual = path.endswith(".conv3") or (path.endswith(".conv2") and model in ("resnet18", "resnet34"))
                act = "none" if "downsample" in path else "relu"
                key = (_geometry(module), shape, residual, act)
                if key not in seen:
                    seen.add(key)
                    name = f"conv_bn_act-K{module.out_channels}k{module.kernel_size[0]}s{module.stride[0]}"
                    name += "-res" * residual + "-none" * (act == "none")
                    build = functools.partial(_kernel_module, _geometry(module), residual, act)
                    yield model, name, (shape, out) if residual else (shape,), build, _fuse_kernel, "conv"
            elif type(module).__name__ in ("BasicBlock", "Bottleneck") and ("add", out) not in seen:
                seen.add(("add", out))

                yield model, "add_relu", (out, out), AddReLU, _fuse_kernel, "block"


def _kernel_module(geometry: tuple[Any, ...], residual: bool, act: str) -> nn.Module:
    conv = nn.Conv2d(*geometry, bias=False)  # type: ignore[misc]
    return (ConvBNAddAct if residual else ConvBNAct)(conv, act)


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return (
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride),
        *(conv.padding, conv.dilation, conv.groups),
    )


@functools.cache
def _runs(model: str, size: int) -> list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]]:
    """Name, module, input and output shape (without the batch) of everything that runs, in order of finishing."""
    with torch.device("meta"):
        network = torchvision_model(model)
    found: list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]] = []
    for path, module in network.named_modules():
        module.register_forward_hook(
            lambda m, x, y, path=path: found.append((path, m, tuple(x[0].shape[1:]), tuple(y.shape[1:])))
        )
    network(torch.empty(1, 3, size, size, device="meta"))
    return found
