"""The ways in which people run, move, save and export a fused model; by adapters and by the generic path alike."""

import copy
import pickle
import threading

import numpy as np
import optional
import pytest
import torch
import torch._dynamo.testing
from torch import nn

import resnet_fused as rf
from resnet_fused.ops.tensor_cache import CACHE
from resnet_fused.testing.budget import measure
from resnet_fused.testing.networks import compare, randomise_norms

torchvision = optional.torchvision()
tv = torchvision.models.resnet


class WithHead(nn.Module):
    """Residual blocks, and a head that only the generic path fuses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.body = nn.Sequential(tv.BasicBlock(8, 8), tv.Bottleneck(8, 4, 2, downsample))
        self.head = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.head(self.body(x)).mean((2, 3)))


def eager_model():
    return randomise_norms(WithHead()).eval()


def fused_model():
    fused = rf.fuse(eager_model(), strict=True, generic=True)
    assert [e.kind for e in rf.report(fused).fused] == ["basic_block", "bottleneck", "conv_bn_act"]
    return fused


def image(n=2, size=12, dtype=torch.float32):
    return torch.randn(n, 8, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_no_recompile_on_a_second_batch_size():
    fused = fused_model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        run(image(2))
        compiled = counter.frame_count
        for n in (5, 7):
            torch.testing.assert_close(run(image(n)), fused(image(n)))
    assert counter.frame_count == compiled > 0


def test_aot_inductor(tmp_path):
    fused = fused_model()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(fused, (image(),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for n in (2, 3):
            torch.testing.assert_close(run(image(n)), fused(image(n)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_warmup_leaves_no_trace(training):
    fused = fused_model().train(training)
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    random = torch.get_rng_state()
    assert rf.warmup(fused, image()) is None
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and fused.training is training
    assert all(p.grad is None for p in fused.parameters())
    with pytest.raises(TypeError, match="model"):
        rf.warmup("resnet50")


def test_warmup_packs_weights():
    model = fused_model()
    rf.clear_workspace()
    rf.warmup(model, image())
    assert len(CACHE) > 0 or not torch.backends.mkldnn.is_available()


@pytest.mark.gpu
def test_cuda_graph_after_warmup():
    fused = fused_model().cuda()
    x = image().cuda()
    rf.warmup(fused, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = fused(x)
    x.copy_(image(2).flip(0))
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(out, fused(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_layouts_and_dtypes_after_fusing(layout, dtype):
    eager, fused = eager_model().to(dtype), fused_model().to(dtype)
    x = image(dtype=dtype).contiguous(memory_format=layout)
    result = compare(fused, eager, x)
    assert result.ok, result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype):
    eager, fused = eager_model(), fused_model()
    x = image()
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            ours, theirs = fused(x), eager(x)
        assert measure(ours, theirs, copy.deepcopy(eager).double()(x.double())).ok


def test_inference_mode():
    fused = fused_model()
    with torch.no_grad():
        expected = fused(image())
    with torch.inference_mode():
        out = fused(image())
        built = rf.fuse(eager_model(), generic=True)  # made, fused and run in inference mode
        assert out.is_inference() and torch.equal(out, expected)
        torch.testing.assert_close(built(image()), expected)
    with torch.no_grad():  # what was packed meanwhile serves here too
        assert torch.equal(fused(image()), expected)


def test_data_parallel_and_replicas():
    fused, x = fused_model(), image(4)
    with torch.no_grad():
        assert torch.equal(nn.DataParallel(fused)(x), fused(x))
        replicas = [_replicate(fused) for _ in range(2)]
        torch.testing.assert_close(torch.cat([r(p) for r, p in zip(replicas, x.chunk(2), strict=True)]), fused(x))
    assert not list(replicas[0].parameters())


def test_replicas_share_nothing_that_was_packed():
    eager, fused = eager_model(), fused_model()
    first, second = _replicate(fused), _replicate(fused)
    with torch.no_grad():
        for model in (second, eager):
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(2)
        fused(image()), first(image())
        result = compare(second, eager, image())
    assert result.ok, result


def _replicate(model):
    """What DataParallel makes on each device: modules whose parameters are plain attributes."""
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, None if value is None else value.detach().clone())
    return replicas[model]


def test_threads_share_one_model():
    fused = fused_model()
    inputs = [image(1 + i % 3, 10 + i % 4) for i in range(16)]
    with torch.inference_mode():
        expected = [fused(x) for x in inputs]
    rf.clear_workspace()  # so that the threads pack the weights, all at once
    results, start = [None] * 16, threading.Barrier(16)

    def work(i):
        start.wait()
        with torch.inference_mode():
            results[i] = fused(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for ours, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copied):
    fused = fused_model()
    other = copied(fused)
    assert rf.report(other).to_dict() == rf.report(fused).to_dict()
    with torch.no_grad():
        expected = fused(image())
        for p in fused.parameters():
            p.zero_()
        assert torch.equal(other(image()), expected)


def test_pickles_are_read_in_another_process(tmp_path):
    """Nothing of the process that fused is needed: not its classes made on the fly, nor its traces."""
    import subprocess
    import sys

    model = rf.fuse(randomise_norms(torchvision.models.shufflenet_v2_x0_5()).eval(), generic=True)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys, torch; from resnet_fused.testing.torchvision_compat import import_torchvision\n"
        "import_torchvision(); m, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "import resnet_fused as rf\n"
        "with torch.no_grad(): torch.testing.assert_close(m(x), y)\n"
        "assert len(rf.report(m).fused) > 50"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_load_state_dict_after_fusing(assign):
    fused, other = fused_model(), eager_model()
    with torch.no_grad():
        fused(image())
        for p in other.parameters():
            p.mul_(1.1)
    assert list(fused.state_dict()) == list(other.state_dict())
    fused.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=assign)
    assert compare(fused, other, image()).ok


@pytest.mark.parametrize("dynamo", [True, False], ids=["exporter", "torchscript"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    optional.needs("onnxscript")
    fused, path = fused_model(), str(tmp_path / "model.onnx")
    batch = {"dynamic_shapes": ({0: torch.export.Dim("n", min=1, max=64)},)} if dynamo else {"dynamic_axes": {"x": [0]}}
    torch.onnx.export(fused, (image(),), path, dynamo=dynamo, verbose=False, input_names=["x"], **batch)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "Conv" in kinds and "Relu" in kinds
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (2, 3):
        (out,) = session.run(None, {"x": image(n).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, fused(image(n)).numpy(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # exporting has left nothing switched off
        program = torch.export.export(fused, (image(),))
    assert any("resnet_fused" in str(node.target) for node in program.graph.nodes)
