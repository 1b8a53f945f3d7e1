"""The whole bottleneck in one Triton launch: in the interpreter where there is no GPU, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from resnet_fused import backends
from resnet_fused.ops import block
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(cin: int, mid: int, project: bool, stride: int, size: tuple[int, int, int], dtype: torch.dtype) -> BlockCall:
    def conv(c: int, k: int, kernel: int = 1, stride: int = 1) -> ConvBN:
        case = ConvCase(1, c, 1, 1, k, kernel=kernel, stride=stride, padding=kernel // 2)
        return case.make(dtype, DEVICE, seed=c + k + kernel).conv

    convs = (conv(cin, mid), conv(mid, mid, 3, stride), conv(mid, 4 * mid))
    x = torch.randn(size[0], cin, *size[1:]).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    return BlockCall(x, convs, conv(cin, 4 * mid, stride=stride) if project else None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((256, 64, False, 1), (2, 9, 17)),
        ((64, 64, True, 1), (3, 5, 6)),
        ((512, 128, False, 1), (1, 9, 5)),
        ((256, 128, True, 1), (1, 3, 18)),
        ((256, 128, True, 2), (1, 17, 19)),
        ((256, 128, True, 2), (2, 6, 1)),
    ],
    ids=str,
)
def test_numbers(shape: tuple[int, int, bool, int], size: tuple[int, int, int], dtype: torch.dtype) -> None:
    from resnet_fused.ops.bottleneck import triton

    if backends.unavailable("triton") is not None:
        pytest.skip(str(backends.unavailable("triton")))
    call = make(*shape, size, dtype)
    assert triton.supports(call) is None

    def wide(conv: ConvBN) -> ConvBN:
        return ConvBN(*[None if t is None else t.double() for t in conv[:6]], *conv[6:])  # type: ignore[arg-type]

    exact = BlockCall(call.x.double(), tuple(map(wide, call.convs)), call.shortcut and wide(call.shortcut), None)
    want = block.run_chain(call, reference.run)
    assert_within_budget(triton.run(call), want, block.run_chain(exact, reference.run))
    other = call._replace(x=call.x.contiguous())
    assert torch.equal(triton.run(other), triton.run(call))


def test_what_it_refuses() -> None:
    from resnet_fused.ops.bottleneck import triton

    if backends.unavailable("triton") is not None:
        pytest.skip(str(backends.unavailable("triton")))
    call = make(256, 64, False, 1, (1, 4, 4), torch.bfloat16)
    assert "no other tensor" in str(triton.supports(call._replace(identity=call.x)))
    assert "float32" in str(triton.supports(call._replace(x=call.x.float()))) or "fp32" in str(
        triton.supports(call._replace(x=call.x.float()))
    )
    assert "these channels" in str(triton.supports(make(1024, 256, False, 1, (1, 2, 2), torch.bfloat16)))
