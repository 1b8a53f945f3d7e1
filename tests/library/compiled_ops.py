# ruff: noqa: E402
"""Run in a process of its own: the compiled library first, the package after it, so that the library's ops stay."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
torch.ops.load_library(sys.argv[1])

from resnet_fused.ops import block
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.conv_bn_act import api, reference
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import CONV_CASES, ConvCase, double, in_format

# oneDNN, to which the library's own op leaves the CPU, computes bfloat16 on CPUs with AVX-512 alone.
HALVES = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
DTYPES = (torch.float32, *HALVES, torch.float64)
FORMATS = (torch.channels_last, torch.contiguous_format)


def significant(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def check(out: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, other: torch.Tensor, what: str) -> None:
    try:
        assert_within_budget(out, eager, exact, other)
        assert significant(out) == significant(eager), (out.stride(), eager.stride())
        assert out.dtype == eager.dtype
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def eager_by_onednn(call: ConvBNActCall) -> torch.Tensor:
    c = in_format(call, torch.channels_last).conv
    x = call.x.contiguous(memory_format=torch.channels_last)
    y = torch.ops.aten.mkldnn_convolution(x, c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups)
    return reference_tail(y, call)


def reference_tail(y: torch.Tensor, call: ConvBNActCall) -> torch.Tensor:
    c = call.conv
    y = torch.nn.functional.batch_norm(y, c.running_mean, c.running_var, c.bn_weight, c.bn_bias, False, 0.0, c.eps)
    y = y if call.residual is None else y + call.residual
    return torch.relu(y) if call.act == "relu" else y


def conv_bn_act() -> None:
    big = ConvCase(26, 64, 56, 56, 64, residual=True)  # more than one sub-batch
    for case in (*CONV_CASES, big):
        for dtype in DTYPES:
            for channels_last in (True, False):
                if case is big and (dtype != torch.float32 or not channels_last):
                    continue
                call = case.make(dtype, channels_last=channels_last)
                out = api.call_op(call.x, call.conv, call.residual, call.act, "auto")
                other = eager_by_onednn(call) if dtype != torch.float64 else reference.run(call)
                check(out, reference.run(call), reference.run(double(call)), other, f"{case.id()} {dtype}")
    for case in CONV_CASES[::3]:
        call = case.make(torch.float32)
        torch.library.opcheck(api.OP, (call.x, *call.conv, call.residual, call.act, "auto"))
        call.conv.weight.requires_grad_()
        torch.library.opcheck(api.OP, (call.x, *call.conv, call.residual, call.act, "auto"))


def specials() -> None:
    for n in (1, 26):
        call = ConvCase(n, 64, 56, 56, 64, kernel=1, residual=True).make(torch.float32)
        for value in (float("nan"), float("inf"), float("-inf")):
            call.x[-1, 3, 4, 4] = value
            out, eager = api.call_op(call.x, call.conv, call.residual, "relu", "auto"), reference.run(call)
            assert torch.equal(out.isnan(), eager.isnan()) and torch.equal(out.isinf(), eager.isinf())
            assert not torch.isfinite(eager).all()


def conv(c: int, k: int, kernel: int, stride: int, dtype: torch.dtype) -> ConvBN:
    return ConvCase(1, c, 9, 9, k, kernel=kernel, stride=stride, padding=kernel // 2).make(dtype).conv


def blocks() -> None:
    for depth in (2, 3):
        for kind in ("identity", "projection", "ready"):
            for dtype in (torch.float32, *HALVES):
                stride, c = (2, 32) if kind == "projection" else (1, 64)
                convs = (
                    (conv(c, 64, 3, stride, dtype), conv(64, 64, 3, 1, dtype))
                    if depth == 2
                    else (conv(c, 16, 1, 1, dtype), conv(16, 16, 3, stride, dtype), conv(16, 64, 1, 1, dtype))
                )
                shortcut = conv(c, 64, 1, 2, dtype) if kind == "projection" else None
                for n, size, layout in ((3, 9, FORMATS[0]), (3, 9, FORMATS[1]), (26, 56, FORMATS[0])):
                    if n > 3 and (dtype != torch.float32 or depth == 2):
                        continue
                    x = torch.randn(n, c, size, size).to(dtype).contiguous(memory_format=layout)
                    ready = torch.randn(n, 64, size, size).to(dtype) if kind == "ready" else None
                    call = BlockCall(x, convs, shortcut, ready)
                    op = getattr(torch.ops.resnet_fused, "basic_block" if depth == 2 else "bottleneck").default
                    flat = [x, *(v for c in convs for v in c), *(shortcut or block._NO_CONV), ready, "auto"]
                    eager = block.run_chain(call, reference.run)
                    wide = [ConvBN(*[None if t is None else t.double() for t in c[:6]], *c[6:]) for c in convs]
                    short = None
                    if shortcut is not None:
                        short = ConvBN(*[None if t is None else t.double() for t in shortcut[:6]], *shortcut[6:])
                    exact = BlockCall(x.double(), tuple(wide), short, None if ready is None else ready.double())
                    other = block.run_chain(call, eager_by_onednn)
                    check(op(*flat), eager, block.run_chain(exact, reference.run), other, f"{kind} {depth} {dtype} {n}")
                    if n == 3 and dtype == torch.float32:
                        torch.library.opcheck(op, tuple(flat))


def padding_as_wide_as_the_filter() -> None:
    """In the first convolution of a block, and in its projection: oneDNN would write beyond its memory."""
    padded = conv(64, 16, 1, 1, torch.float32)._replace(padding=(1, 1))
    convs = (padded, conv(16, 16, 3, 1, torch.float32), conv(16, 64, 1, 1, torch.float32))
    wide = (conv(64, 16, 3, 1, torch.float32)._replace(padding=(2, 2)), *convs[1:])
    x = torch.randn(3, 64, 9, 9).contiguous(memory_format=FORMATS[0])
    op = torch.ops.resnet_fused.bottleneck.default
    for block_convs, shortcut, ready in (
        (convs, None, torch.randn(3, 64, 11, 11)),
        (wide, conv(64, 64, 1, 1, torch.float32)._replace(padding=(1, 1)), None),
    ):
        call = BlockCall(x, block_convs, shortcut, ready)
        flat = [x, *(v for c in block_convs for v in c), *(shortcut or block._NO_CONV), ready]
        eager = block.run_chain(call, reference.run)
        doubled = [ConvBN(*[None if t is None else t.double() for t in c[:6]], *c[6:]) for c in block_convs]
        short = shortcut and ConvBN(*[None if t is None else t.double() for t in shortcut[:6]], *shortcut[6:])
        exact = BlockCall(x.double(), tuple(doubled), short, None if ready is None else ready.double())
        check(op(*flat, "auto"), eager, block.run_chain(exact, reference.run), eager, "wide padding")
        try:
            op(*flat, "onednn")
        except RuntimeError as error:
            assert "padding is as wide as the filter" in str(error), str(error)
        else:
            raise AssertionError("wide padding: nothing was raised")


def refusals() -> None:
    call = CONV_CASES[0].make(torch.float32)
    bad = [
        ({"x": call.x[0]}, "x: got shape"),
        ({"weight": call.conv.weight[:, :-1]}, "weight: the input has"),
        ({"running_var": call.conv.running_var[1:]}, "running_var: got shape"),
        ({"stride": (0, 1)}, "stride: got"),
        ({"act": "gelu"}, "act: got 'gelu'"),
        ({"backend": "triton"}, "backend='triton' cannot run here"),
    ]
    for change, message in bad:
        arguments = {"x": call.x, **call.conv._asdict(), "residual": None, "act": "relu", "backend": "auto", **change}
        try:
            with torch._C._AutoDispatchBelowAutograd():
                api.OP(**arguments)
        except RuntimeError as error:
            assert message in str(error), (message, str(error))
        else:
            raise AssertionError(f"{message}: nothing was raised")
    a, b = torch.randn(2, 3, 4)
    torch.testing.assert_close(torch.ops.resnet_fused.add_relu(a, b, "auto"), torch.relu(a + b), rtol=0, atol=0)
    assert api.call_op(call.x[:0], call.conv, None, "relu", "auto").shape[0] == 0


assert torch._C._dispatch_has_kernel_for_dispatch_key("resnet_fused::conv_bn_act", "CPU")
for part in (conv_bn_act, specials, blocks, padding_as_wide_as_the_filter, refusals):
    part()
    print(part.__name__)
