# ruff: noqa: E402
"""Run in a process of its own: the properties of tests/test_properties.py on the compiled library's own CPU ops."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
torch.ops.load_library(sys.argv[1])

import conftest  # noqa: F401  the profiles of hypothesis
import hypothesis
from hypothesis import strategies as st
from test_properties import check_conv, problems

assert torch._C._dispatch_has_kernel_for_dispatch_key("resnet_fused::conv_bn_act", "CPU")


@hypothesis.settings(max_examples=4 * hypothesis.settings.default.max_examples)
@hypothesis.given(data=st.data())
def conv_bn_act(data: st.DataObject) -> None:
    check_conv(data.draw(problems((torch.float32, torch.bfloat16, torch.float16, torch.float64))), "auto")


conv_bn_act()
print("conv_bn_act")
