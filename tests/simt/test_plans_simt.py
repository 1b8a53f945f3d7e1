"""Plans that are kept and launched again (csrc/common/plans.h), on the host runtime: what the ops give, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import bottleneck_calls
import conv_calls
import pytest
import simt_harness
import torch
from simt_harness import Refused
from torch import Tensor

from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.convbn import ConvBNActCall, output_shape
from resnet_fused.testing.cases import ConvCase

pytestmark = pytest.mark.skipif(
    simt_harness.missing_compiler() is not None, reason=str(simt_harness.missing_compiler())
)

CASES = (
    ConvCase(2, 64, 7, 9, 64, kernel=3, padding=1, residual=True),
    ConvCase(1, 64, 7, 5, 40, act="none"),
    ConvCase(1, 32, 9, 9, 32, kernel=3, stride=2, padding=1, groups=4),
)


def laid_out(call: ConvBNActCall) -> ConvBNActCall:
    last = torch.channels_last
    conv = call.conv._replace(weight=call.conv.weight.contiguous(memory_format=last))
    residual = None if call.residual is None else call.residual.contiguous(memory_format=last)
    return call._replace(x=call.x.contiguous(memory_format=last), conv=conv, residual=residual)


def launch(op: str, call: list[object], out: Tensor, workspace: Tensor | None, *inputs: int) -> list[Tensor]:
    """The plan's outputs: once, and again after its inputs, which these places of the call name, were negated."""
    processors = 4 if op == "conv_bn_act" else 2  # as conv_calls and bottleneck_calls have them
    answer = simt_harness.call("plans::launch", op, call, out, workspace, list(inputs), multiprocessors=processors)
    return list(answer.outs)


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=ConvCase.id)
def test_a_convolution_is_launched_again_with_what_its_tensors_hold_then(case, dtype, splits):
    if splits and case.groups > 1:
        splits = 2
    call = laid_out(case.make(dtype))
    expected = [conv_calls.run(c, conv_calls.Options(splits=splits))[1] for c in (call, call._replace(x=-call.x))]
    out = torch.full(output_shape(call.conv, tuple(call.x.shape)), float("nan"), dtype=dtype)
    out = out.contiguous(memory_format=torch.channels_last)
    flat = [call.x, *call.conv, call.residual, call.act == "relu", True, "", splits]
    workspace = torch.full((16 * out.numel() * 4,), 0xFF, dtype=torch.uint8)  # 0 lets the plan split as it likes
    for got, want in zip(launch("conv_bn_act", flat, out, workspace, 0), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("project", [False, True])
def test_a_bottleneck_is_launched_again(project):
    convs = [ConvCase(1, c, 8, 8, k, kernel=r, padding=r // 2).make(torch.float16).conv
             for c, k, r in ((256, 64, 1), (64, 64, 3), (64, 256, 1), (256, 256, 1))]  # fmt: skip
    convs = [conv._replace(weight=conv.weight.contiguous(memory_format=torch.channels_last)) for conv in convs]
    x = torch.randn(1, 256, 8, 8).half().contiguous(memory_format=torch.channels_last)
    call = BlockCall(x, tuple(convs[:3]), convs[3] if project else None, None)
    options = bottleneck_calls.Options()
    expected = [bottleneck_calls.run(c, options)[1] for c in (call, call._replace(x=-x))]
    shortcut = call.shortcut or bottleneck_calls.NO_CONV
    flat = [x, *[value for conv in (*call.convs, shortcut) for value in conv], None, ""]
    out = torch.full_like(x, float("nan"))
    for got, want in zip(launch("bottleneck", flat, out, None, 0), expected, strict=True):
        assert torch.equal(got, want)


def refusal(**change: object) -> str:
    case = replace(CASES[0], residual=False)
    call = laid_out(case.make(torch.bfloat16))
    out = torch.empty_like(call.x)
    given = {"x": call.x, "weight": call.conv.weight, "out": out, "workspace": None, "splits": 1, **change}
    conv = call.conv._replace(weight=given["weight"])  # type: ignore[arg-type]
    flat = [given["x"], *conv, None, True, True, "", given["splits"]]
    with pytest.raises(Refused) as said:
        launch("conv_bn_act", flat, given["out"], given["workspace"], 0)  # type: ignore[arg-type]
    return str(said.value)


def test_what_would_be_copied_is_refused():
    x = torch.randn(2, 64, 7, 9).bfloat16()
    assert "x: need adjacent channels" in refusal(x=x)
    assert "weight: need channels_last" in refusal(weight=torch.randn(64, 64, 3, 3).bfloat16())
    assert "out: need channels_last" in refusal(out=torch.empty_like(x))
    assert "out: got" in refusal(out=x[:1].contiguous(memory_format=torch.channels_last))


def test_a_split_needs_its_workspace():
    assert "the plan has no workspace" in refusal(splits=2)
    assert "workspace: need" in refusal(splits=2, workspace=torch.empty(16, dtype=torch.uint8))
