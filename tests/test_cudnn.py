"""cuDNN's fused convolutions by stand-ins for aten's ops: they are tried, checked, and left where they do not serve."""

import pytest
import torch
import torch.nn.functional as F

from resnet_fused import backends
from resnet_fused.ops.conv_bn_act import cudnn, reference
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase

CASE = ConvCase(2, 16, 8, 8, 16, kernel=3, padding=1, residual=True)


@pytest.fixture
def aten(monkeypatch):
    """aten's two fused convolutions, computed on the CPU; ``add_relu`` is what the tests exchange."""

    class Ops:
        calls = 0

        @staticmethod
        def add_relu(x, weight, z, alpha, bias, *geometry):
            return F.relu(F.conv2d(x, weight, bias, *geometry) + alpha * z)

        @classmethod
        def called(cls, *args):
            cls.calls += 1
            return cls.add_relu(*args)

    suitable = cudnn._unsuitable

    def unsuitable(call):
        reason = suitable(call)
        return None if reason and "runs on CUDA devices" in reason else reason

    monkeypatch.setattr(cudnn, "_unsuitable", unsuitable)
    monkeypatch.setattr(cudnn, "_TRIED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", Ops.called)
    return Ops


def chosen(call, requested="auto"):
    return backends.choose("conv_bn_act", call, requested, ("cudnn", "reference"))


@pytest.mark.minimum
def test_it_is_tried_once_for_each_problem_and_then_serves(aten):
    call, other = CASE.make(torch.float32), ConvCase(1, 16, 6, 6, 16, kernel=3, padding=1, residual=True)
    assert [chosen(call) for _ in range(3)] == [cudnn] * 3 and aten.calls == 1
    assert chosen(other.make(torch.float32)) is cudnn and aten.calls == 2
    exact = CASE.make(torch.float64)
    assert_within_budget(cudnn.run(call), reference.run(call), reference.run(exact))


def test_shapes_that_it_refuses_go_to_the_next(aten):
    def refuse(*args):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED\nand more lines")

    aten.add_relu = refuse
    call = CASE.make(torch.float32)
    assert chosen(call) is reference
    with pytest.raises(backends.BackendError, match="refuses these shapes: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"):
        chosen(call, "cudnn")
    assert aten.calls == 1


def test_a_result_in_the_residuals_memory_is_not_taken(aten):
    aten.add_relu = lambda x, w, z, alpha, bias, *geometry: z.add_(F.conv2d(x, w, bias, *geometry)).relu_()
    call = CASE.make(torch.float32)
    before = call.residual.clone()
    assert chosen(call) is reference and torch.equal(call.residual, before)
    with pytest.raises(backends.BackendError, match="into the residual"):
        chosen(call, "cudnn")


def test_no_memory_is_no_refusal(aten):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    aten.add_relu = full
    with pytest.raises(torch.OutOfMemoryError):
        chosen(CASE.make(torch.float32))


def test_nothing_is_tried_while_a_graph_is_captured(aten, monkeypatch):
    tried, untried = CASE.make(torch.float32), ConvCase(1, 16, 6, 6, 16, residual=True).make(torch.float32)
    chosen(tried)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(untried) is reference and aten.calls == 1
    assert chosen(tried) is cudnn and aten.calls == 1


def test_it_is_not_taken_where_determinism_is_asked_for(aten):
    call = CASE.make(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(call) is reference
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen(call) is cudnn
