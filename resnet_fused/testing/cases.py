"""The case list: shapes that every kernel is tried on, and tensors made for them from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, short_dtype


@dataclass(frozen=True)
class ConvCase:
    """One conv_bn_act problem; sizes as in conv2d."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    residual: bool = False
    act: str = "relu"
    bias: bool = False
    affine: bool = True

    @property
    def kernel_pair(self) -> tuple[int, int]:
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    def id(self, dtype: torch.dtype | None = None) -> str:
        """A readable test id: ``bf16-N2-C64x56x56-K64k3s2``."""
        r, s = self.kernel_pair
        text = f"N{self.n}-C{self.c}x{self.h}x{self.w}-K{self.k}k{r if r == s else f'{r}x{s}'}"
        text += f"s{self.stride}p{self.padding}"
        text += f"d{self.dilation}" * (self.dilation > 1) + f"g{self.groups}" * (self.groups > 1)
        text += "-res" * self.residual + f"-{self.act}" * (self.act != "relu") + "-bias" * self.bias
        text += "-noaffine" * (not self.affine)
        return text if dtype is None else f"{short_dtype(dtype)}-{text}"

    def make(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", *, channels_last: bool = True, seed: int = 0
    ) -> ConvBNActCall:
        """Fresh tensors for this case; the weights are scaled so that outputs are of order one."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def vector(low: float, high: float) -> Tensor:
            return (torch.rand(self.k, generator=generator) * (high - low) + low).to(device, dtype)

        r, s = self.kernel_pair
        fan_in = self.c // self.groups * r * s
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = normal(self.n, self.c, self.h, self.w).to(device, dtype).contiguous(memory_format=layout)
        weight = normal(self.k, self.c // self.groups, r, s) / fan_in**0.5
        conv = ConvBN(
            weight.to(device, dtype).contiguous(memory_format=layout),
            vector(-0.5, 0.5) if self.bias else None,
            vector(0.5, 1.5) if self.affine else None,
            vector(-0.5, 0.5) if self.affine else None,
            vector(-0.5, 0.5),
            vector(0.5, 1.5),
            1e-5,
            (self.stride, self.stride),
            (self.padding, self.padding),
            (self.dilation, self.dilation),
            self.groups,
        )
        residual = None
        if self.residual:
            size = conv.output_size(self.h, self.w)
            residual = normal(self.n, self.k, *size).to(device, dtype).contiguous(memory_format=layout)
        return ConvBNActCall(x, conv, residual, self.act)


def double(call: ConvBNActCall) -> ConvBNActCall:
    """The same call in float64: what the reference is computed on."""
    conv = call.conv
    wide = dict(zip(ConvBN._fields, [t if t is None else t.double() for t in conv.tensors()], strict=False))
    residual = None if call.residual is None else call.residual.double()
    return ConvBNActCall(call.x.double(), conv._replace(**wide), residual, call.act)  # type: ignore[arg-type]


def in_format(call: ConvBNActCall, memory_format: torch.memory_format) -> ConvBNActCall:
    """The same call with x, weight and residual in another memory format."""
    conv = call.conv._replace(weight=call.conv.weight.contiguous(memory_format=memory_format))
    residual = None if call.residual is None else call.residual.contiguous(memory_format=memory_format)
    return ConvBNActCall(call.x.contiguous(memory_format=memory_format), conv, residual, call.act)


# Small problems with odd sizes, tails and every option: what each kernel must take.
CONV_CASES = (
    ConvCase(2, 16, 7, 5, 24),
    ConvCase(1, 64, 9, 9, 32, act="none"),
    ConvCase(3, 20, 5, 7, 17, residual=True),
    ConvCase(2, 16, 8, 9, 32, stride=2, act="none"),
    ConvCase(2, 16, 9, 11, 16, kernel=3, padding=1, residual=True),
    ConvCase(1, 16, 9, 8, 24, kernel=3, stride=2, padding=1),
    ConvCase(1, 24, 11, 10, 16, kernel=3, padding=2, dilation=2, residual=True, act="none"),
    ConvCase(1, 16, 13, 12, 16, kernel=3, stride=2, padding=4, dilation=4),
    ConvCase(1, 3, 21, 19, 16, kernel=7, stride=2, padding=3),
    ConvCase(2, 32, 7, 7, 64, kernel=3, padding=1, groups=4, residual=True),
    ConvCase(1, 16, 8, 7, 16, kernel=3, stride=2, padding=1, groups=16),
    ConvCase(1, 6, 5, 6, 10, kernel=(1, 3), padding=1, bias=True),
    ConvCase(2, 8, 6, 6, 8, kernel=5, padding=2, affine=False, bias=True, residual=True),
    ConvCase(1, 512, 3, 3, 40, kernel=3, padding=1, residual=True),
    ConvCase(1, 1, 4, 4, 1, kernel=3, padding=1),
    ConvCase(1, 8, 1, 1, 8, residual=True),
    ConvCase(2, 16, 3, 3, 8, kernel=3, residual=True),
    ConvCase(2, 16, 4, 5, 1, residual=True),
)
