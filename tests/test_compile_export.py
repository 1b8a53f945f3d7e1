"""torch.compile and torch.export on fused models."""

import copy

import optional
import pytest
import torch

import resnet_fused as rf
from resnet_fused.testing.networks import randomise_norms

torchvision = optional.torchvision()

pytestmark = pytest.mark.minimum


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fused_resnet18():
    torch.manual_seed(0)
    return rf.fuse(randomise_norms(torchvision.models.resnet18(num_classes=10)).eval())


def test_compiles_whole_for_two_batch_sizes():
    model = fused_resnet18()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n in (2, 3):
            x = torch.randn(n, 3, 40, 40)
            torch.testing.assert_close(compiled(x), model(x))


def test_compiled_training_step():
    eager = torchvision.models.resnet18(num_classes=10).train()
    compiled = rf.fuse(eager, memory_format=torch.preserve_format)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 48, 48)
    step(x).square().mean().backward()
    eager(x).square().mean().backward()
    for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, p), q in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_compiled_frozen_norms_give_gradients():
    block = randomise_norms(rf.FusedBottleneck(16, 4)).eval()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 6, 6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    block(a).square().sum().backward()
    compiled(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(block.conv2.weight.grad, compiled._orig_mod.conv2.weight.grad)


def test_inductor():
    model = randomise_norms(rf.ResNet(rf.FusedBottleneck, [1], num_classes=3, planes=(4,))).eval()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_mode_change_recompiles():
    block = randomise_norms(rf.FusedBasicBlock(8, 8))
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8, 6, 6)
    for mode in (False, True, False):
        block.train(mode), twin.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(block.bn1.running_var, twin.bn1.running_var)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_export(strict):
    model = fused_resnet18()
    x = torch.randn(2, 3, 40, 40)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("resnet_fused.basic_block.default") == 8
    assert targets.count("resnet_fused.conv_bn_act.default") == 1
    assert set(program.state_dict) == set(model.state_dict())
    with torch.no_grad():
        for n in (2, 5):
            y = torch.randn(n, 3, 40, 40)
            torch.testing.assert_close(program.module()(y), model(y))
