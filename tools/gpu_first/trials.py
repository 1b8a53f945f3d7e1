"""Every way that a kernel can be asked for: each CUDA kernel, each Triton config, each of cuDNN's two convolutions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused import extension
from resnet_fused.ops import block
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, short_dtype
from resnet_fused.testing import norm_cases
from resnet_fused.testing.cases import ConvCase, double, in_format

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
CONV_CASES = (
    ConvCase(1, 72, 8, 10, 136, residual=True),
    ConvCase(1, 40, 8, 9, 72, kernel=3, padding=1, residual=True, bias=True),
    ConvCase(2, 24, 11, 7, 80, kernel=3, stride=2, padding=1, act="none", affine=False),
    ConvCase(2, 64, 9, 10, 136, stride=2, act="none"),
    ConvCase(1, 24, 7, 7, 40, kernel=3, padding=1, groups=2),
    ConvCase(1, 72, 3, 4, 40, kernel=3, padding=1, residual=True),
    ConvCase(1, 20, 9, 7, 36, kernel=3, padding=1, residual=True),
    ConvCase(1, 3, 21, 19, 24, kernel=7, stride=2, padding=3),
)
RESNET_CASES = (
    ConvCase(4, 64, 56, 56, 64, kernel=3, padding=1),
    ConvCase(4, 256, 56, 56, 64),
    ConvCase(4, 64, 56, 56, 256, residual=True),
    ConvCase(4, 128, 56, 56, 128, kernel=3, stride=2, padding=1),
    ConvCase(4, 512, 7, 7, 2048, residual=True),
)
BLOCKS = ((256, 64, 1), (64, 64, 1), (256, 64, 1, True), (512, 128, 1), (256, 128, 1), (256, 128, 2))


@dataclass(frozen=True)
class Trial:
    """One kernel on one problem. ``eager`` are what eager PyTorch makes of it, in each memory format, ``exact`` the
    float64 run; they are made when asked for."""

    op: str
    backend: str
    kernel: str
    dtype: str
    case: str
    run: Callable[[], Tensor]
    eager: Callable[[], list[Tensor]]
    exact: Callable[[], Tensor]


def backend_of(op: str, backend: str) -> Any:
    return importlib.import_module(f"resnet_fused.ops.{op}.{backend}")


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """How float32 is multiplied, each in turn."""
    return ("tf32", "ieee") if dtype == torch.float32 else ("tf32",)


def conv_trials(backend: str, device: str, small: bool) -> Iterator[Trial]:
    for dtype in HALVES[:1] if small and backend == "triton" else DTYPES:
        for precision in precisions(dtype):
            torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
            label = short_dtype(dtype) + (f"-{precision}" if dtype == torch.float32 else "")
            cases = CONV_CASES[1:2] if small and backend == "triton" else CONV_CASES
            for case in cases if small else (*cases, *RESNET_CASES):
                yield from _conv(backend, case, case.make(dtype, device), label, small)
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]


def _conv(backend: str, case: ConvCase, call: ConvBNActCall, label: str, small: bool) -> Iterator[Trial]:
    module = backend_of("conv_bn_act", backend)

    def eager() -> list[Tensor]:
        return [reference.run(in_format(call, f)) for f in (torch.channels_last, torch.contiguous_format)]

    def exact() -> Tensor:
        return reference.run(double(call))

    def trial(name: str, run: Callable[[], Tensor]) -> Trial:
        return Trial("conv_bn_act", backend, name, label, case.id(), run, eager, exact)

    if backend == "cudnn":
        if call.act == "relu" and call.conv.groups == 1:
            name = "cudnn_convolution_relu" if call.residual is None else "cudnn_convolution_add_relu"
            yield trial(name, lambda: module.run(call))
        return
    for config in _few(module.configs(call), backend) if small else module.configs(call):
        name = f"{config.kernel}-split{config.splits}" if backend == "cuda" else str(config)
        yield trial(name, lambda config=config: module.run(call, config))  # type: ignore[misc]


def _few(configs: tuple[Any, ...], backend: str) -> list[Any]:
    """Every CUDA kernel whole and in two parts; one Triton config of each kind, the smallest."""
    if backend == "cuda":
        return [config for config in configs if config.splits in (1, 2)]
    found: dict[tuple[str, bool], Any] = {}
    for config in sorted(configs, key=lambda c: (c.block_m * c.block_n, c.split_k)):
        found.setdefault((config.kernel, config.split_k > 1), config)
    return list(found.values())


def block_call(cin: int, mid: int, stride: int, project: bool, size: tuple[int, int, int], dtype: torch.dtype,
               device: str) -> BlockCall:  # fmt: skip
    """A bottleneck with random weights and ``[n, cin, h, w]``."""

    def conv(c: int, k: int, kernel: int = 1, stride: int = 1) -> ConvBN:
        case = ConvCase(1, c, 1, 1, k, kernel=kernel, stride=stride, padding=kernel // 2)
        return case.make(dtype, device, seed=c + k + kernel).conv

    n, h, w = size
    x = torch.randn(n, cin, h, w).to(device, dtype).contiguous(memory_format=torch.channels_last)
    shortcut = conv(cin, 4 * mid, stride=stride) if project else None
    return BlockCall(x, (conv(cin, mid), conv(mid, mid, 3, stride), conv(mid, 4 * mid)), shortcut, None)


def block_trials(backend: str, device: str, small: bool) -> Iterator[Trial]:
    module = backend_of("bottleneck", backend)
    problems = [(cin, mid, stride, bool(more) or cin != 4 * mid) for cin, mid, stride, *more in BLOCKS]
    sizes = ((1, 9, 17),) if small else ((2, 15, 17), (8, 56, 56))
    if small and backend == "triton":
        problems, sizes = problems[1:2], ((1, 5, 6),)
    for dtype in HALVES[:1] if small and backend == "triton" else HALVES:
        for problem in problems:
            for size in sizes:
                call = block_call(*problem, size, dtype, device)
                reason = module.supports(call)
                configs = ("",) if backend == "triton" or reason else module.configs(call)
                for config in configs:
                    yield _block(module, backend, call, config, short_dtype(dtype))


def _block(module: Any, backend: str, call: BlockCall, config: str, dtype: str) -> Trial:
    def wide(conv: ConvBN) -> ConvBN:
        return ConvBN(*[None if t is None else t.double() for t in conv[:6]], *conv[6:])  # type: ignore[arg-type]

    def exact() -> Tensor:
        convs = tuple(map(wide, call.convs))
        return block.run_chain(
            BlockCall(call.x.double(), convs, call.shortcut and wide(call.shortcut), None), reference.run
        )

    n, c, h, w = call.x.shape
    mid, stride = call.convs[1].weight.shape[0], call.convs[1].stride[0]
    case = f"N{n}-C{c}x{h}x{w}-mid{mid}s{stride}" + "-project" * (call.shortcut is not None)
    return Trial(
        "bottleneck", backend, config or "whole block", dtype, case,
        lambda: module.run(call, config) if config else module.run(call),
        lambda: [block.run_chain(call, reference.run)], exact,
    )  # fmt: skip


def add_trials(backend: str, device: str) -> Iterator[Trial]:
    module = backend_of("add_relu", backend)
    for dtype in DTYPES:
        flat = torch.randn(2, 3, 40, 9, 11).to(device, dtype)
        offset = torch.randn(2, 12 * 40 + 1).to(device, dtype)[:, 1:]  # not aligned to 16 bytes
        strided = torch.randn(2, 8, 12, 10).to(device, dtype)[..., ::2]
        for name, (a, b) in {"flat": flat, "offset": offset, "strided": (strided[0], strided[1].mT.mT)}.items():
            yield Trial(
                "add_relu", backend, name, short_dtype(dtype), "x".join(map(str, a.shape)),
                lambda a=a, b=b: module.run(AddReLUCall(a, b)),  # type: ignore[misc]
                lambda a=a, b=b: [torch.relu(a + b)],  # type: ignore[misc]
                lambda a=a, b=b: torch.relu(a.double() + b.double()),  # type: ignore[misc]
            )  # fmt: skip


def norm_trials(backend: str, device: str, small: bool) -> Iterator[Trial]:
    """Forward and backward in one row: the output against float64, then everything against the rules of the tests."""
    from resnet_fused import functional

    def ours(call: Any) -> Tensor:
        x, weight, bias, mean, var, count, residual, training, momentum, eps, act = call
        return functional.batch_norm_act(
            x, weight, bias, mean, var, residual, training=training, momentum=momentum, eps=eps, act=act,
            num_batches_tracked=count, backend=backend,
        )  # fmt: skip

    cases = norm_cases.NORM_CASES[:2] if small and backend == "triton" else norm_cases.NORM_CASES
    for dtype in HALVES[:1] if small and backend == "triton" else DTYPES:
        for case in cases:
            call = case.make(dtype, device)

            def run(call: Any = call) -> Tensor:
                grad = norm_cases.upstream_of(call)
                found = norm_cases.outcome(ours, norm_cases.copied(call), grad)
                norm_cases.assert_outcome(found, call, grad)
                return found["output"]

            yield Trial(
                "batch_norm_act", backend, "forward and backward", short_dtype(dtype), str(case), run,
                lambda call=call: [norm_cases.eager(norm_cases.copied(call)).detach()],  # type: ignore[misc]
                lambda call=call: norm_cases.eager(norm_cases.copied(call, torch.float64)).detach(),  # type: ignore[misc]
            )  # fmt: skip


def trials(backend: str, device: str, small: bool) -> Iterator[Trial]:
    """All of one backend's."""
    yield from conv_trials(backend, device, small)
    if backend != "cudnn":
        yield from block_trials(backend, device, small)
        yield from add_trials(backend, device)
        yield from norm_trials(backend, device, small)


def expected(backend: str) -> set[str]:
    """Kernels and configs that a device's trials have to take, beginning with these names."""
    if backend == "cudnn":
        return {"cudnn_convolution_relu", "cudnn_convolution_add_relu"}
    if backend == "cuda":
        library = extension.module()
        limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin  # type: ignore[attr-defined]
        convs = {row["name"] for row in library.conv_bn_act_kernels()}
        return convs | {row["name"] for row in library.bottleneck_kernels() if row["shared"] <= limit}
    from resnet_fused.ops.conv_bn_act import triton_config as cfg

    here = cfg.architecture(0)
    classes = [(dtype, precision) for dtype in DTYPES for precision in precisions(dtype)]
    return {str(c) for dtype, how in classes for c in cfg.shipped(dtype, how) if cfg.fits(c, dtype, here)}
