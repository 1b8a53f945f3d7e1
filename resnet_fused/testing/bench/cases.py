"""The cases of inference: every op on every ResNet shape, every distinct residual block, whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import roofline
from resnet_fused.ops.convbn import short_dtype
from resnet_fused.testing import models
from resnet_fused.testing.compare import ComparisonError
from resnet_fused.testing.eager import eager_copy, original
from resnet_fused.testing.statistics import calibrate

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101")
KERNEL_MODELS = ("resnet18", "resnet50")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One problem: an eager module, what it is fed, and how it is fused.

    ``build()`` gives the module in float32 on the CPU; ``shapes`` are its inputs'; ``fused(module, **options)`` makes
    ours of a module of the case's dtype, with the options of ``fuse``. ``level`` is the level of fusion whose roofline
    the figure is held against.
    """

    suite: str
    model: str
    name: str
    batch: int
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[[], nn.Module]
    fused: Callable[..., Callable[..., Any]]
    level: str

    training = False

    @property
    def id(self) -> str:
        """``resnet50.layer1.0-bf16-N8-C64x56x56``."""
        n, c, h, w = self.shapes[0]
        return f"{self.name}-{short_dtype(self.dtype)}-N{n}-C{c}x{h}x{w}"

    def make(self, device: torch.device, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Module and inputs: random weights, batch norms that are not trivial, all from the seed.

        Raises:
            ComparisonError: the module does not run on them.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build().eval()
            inputs = [torch.randn(shape) for shape in self.shapes]
            # Statistics of a few pixels would blow up on others: the smaller the image, the more of them.
            images = min(64, max(2, 2**14 // (self.shapes[0][2] * self.shapes[0][3])))
            first, *others = (torch.randn(images, *shape[1:]) for shape in self.shapes)
            try:
                calibrate(_Bound(module, others), first, perturb=True, seed=seed)
            except Exception as error:  # whatever a user's model raises is reported in one line
                text = f"{self.model} does not run on an input {self.shapes[0]}: {type(error).__name__}: {error}"
                raise ComparisonError(text) from error
        return module.to(device, self.dtype), tuple(x.to(device, self.dtype) for x in inputs)

    def call(self, run: Callable[..., Any], inputs: tuple[Tensor, ...], module: nn.Module | None = None) -> Call:
        """What is timed of ``run``, which computes as a module does; ``module`` holds its parameters if it has any."""
        return functools.partial(run, *inputs)

    def cost(self, module: nn.Module, rates: roofline.Device) -> dict[str, Any]:
        """FLOPs, bytes and the least time in milliseconds, as columns of a row."""
        counts = roofline.count(module, *self.shapes)[self.level]
        bound = counts.bound(rates, self.dtype).seconds
        return {"flops": counts.flops, "bytes": counts.nbytes(self.dtype), "bound_ms": 1e3 * bound}


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


def _fuse_module(module: nn.Module, **options: Any) -> nn.Module:
    return resnet_fused.fuse(module, strict=True, **options)


def fuse_network(module: nn.Module, **options: Any) -> nn.Module:
    """Ours of a :func:`network`.

    Raises:
        ValueError: nothing in it fuses.
    """
    fused = resnet_fused.fuse(original(module), **options)
    if not resnet_fused.is_fused(fused):
        raise ValueError("nothing in this model fuses; resnet_fused.explain says why")
    return fused


def network(spec: str) -> nn.Module:
    """The eager model that ``spec`` names, in a form of :func:`resnet_fused.testing.models.load`, random weights.

    A bare name is torchvision's where that is installed and has it; our builder of that name is the same network.
    """
    if ":" not in spec:
        try:
            return models.load(f"torchvision:{spec}")
        except models.ModelError:
            pass
    return eager_copy(models.load(spec))


Parts = tuple[str, str, tuple[tuple[int, ...], ...], Callable[[], nn.Module], Any, str]


def model_cases(names: tuple[str, ...], size: int | None) -> Iterator[Parts]:
    """Whole models."""
    for name in names:
        yield name, name, (image(name, size),), functools.partial(network, name), fuse_network, "block"


def image(name: str, size: int | None) -> tuple[int, int, int]:
    """Channels, height and width of what the model is fed: ``size``, or its own where that is None."""
    with torch.device("meta"):
        channels, own = models.input_shape(name, network(name))
    return channels, size or own, size or own


def block_cases(names: tuple[str, ...], size: int | None) -> Iterator[Parts]:
    """Every distinct residual block."""
    for name in names:
        seen = set()
        for path, block, shape, _ in runs(name, size):
            convs = tuple(_geometry(m) for m in block.modules() if isinstance(m, nn.Conv2d))
            if type(block).__name__ in ("BasicBlock", "Bottleneck") and (convs, shape) not in seen:
                seen.add((convs, shape))
                build = functools.partial(_part_of, name, path)
                yield name, f"{name}.{path}", (shape,), build, _fuse_module, "block"


def _part_of(name: str, path: str) -> nn.Module:
    with torch.device("meta"):
        part = network(name).get_submodule(path)
    part.to_empty(device="cpu")
    for module in part.modules():
        getattr(module, "reset_parameters", lambda: None)()
    return part


def kernel_cases(names: tuple[str, ...], size: int | None) -> Iterator[Parts]:
    """conv_bn_act on each distinct convolution, add_relu on each distinct block output."""
    seen: set[Any] = set()
    for model in names:
        for path, module, shape, out in runs(model, size):
            if isinstance(module, nn.Conv2d):
                residual = is_last(path, model, size)
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


def is_last(path: str, model: str, size: int | None) -> bool:
    """Whether the convolution or norm at ``path`` is the last of its block's main path: the sum follows."""
    *_, name = path.split(".")
    if "." not in path or name[:-1] not in ("conv", "bn") or name[-1] == "1":
        return False
    later = f"{path[:-1]}{int(name[-1]) + 1}"
    return all(other != later for other, *_ in runs(model, size))


def _kernel_module(geometry: tuple[Any, ...], residual: bool, act: str) -> nn.Module:
    conv = nn.Conv2d(*geometry, bias=False)  # type: ignore[misc]
    return (ConvBNAddAct if residual else ConvBNAct)(conv, act)


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return (
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride),
        *(conv.padding, conv.dilation, conv.groups),
    )


@functools.cache
def runs(model: str, size: int | None) -> list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]]:
    """Name, module, input and output shape (without the batch) of everything that runs, in order of finishing."""
    shape = image(model, size)
    with torch.device("meta"):
        whole = network(model)
    found: list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]] = []

    def note(module: nn.Module, x: Any, y: Any, path: str) -> None:
        if x and isinstance(x[0], Tensor) and isinstance(y, Tensor):
            found.append((path, module, tuple(x[0].shape[1:]), tuple(y.shape[1:])))

    for path, module in whole.named_modules():
        module.register_forward_hook(functools.partial(note, path=path))
    whole(torch.empty(1, *shape, device="meta"))
    return found
