"""How kernels are launched, as far as it can be seen without a GPU: on the device of their tensors, on the current
stream, by one config, with no atomic additions. The tests at the end see it on GPUs."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import resnet_fused as rf
from resnet_fused.ops.add_relu.call import AddReLUCall
from resnet_fused.ops.batch_norm_act.call import BatchNormCall, GradientCall
from resnet_fused.ops.block import BlockCall
from resnet_fused.testing.cases import ConvCase

triton = pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[1]
MODULES = (
    "add_relu.triton", "batch_norm_act.triton", "bottleneck.triton", "bottleneck.triton_kernel",
    "conv_bn_act.triton", "conv_bn_act.triton_kernels",
)  # fmt: skip


def kernels():
    """(module, name, kernel) of every Triton kernel that a launch is written for."""
    from triton.runtime.interpreter import InterpretedFunction

    for name in MODULES:
        module = importlib.import_module(f"resnet_fused.ops.{name}")
        for attribute, value in vars(module).items():
            jitted = isinstance(value, (triton.JITFunction, InterpretedFunction))
            if jitted or type(value).__module__.startswith("triton.runtime"):
                yield module, attribute, value


class OnCuda(Tensor):
    """A tensor of the CPU that says of itself that it is on a GPU."""

    @property
    def is_cuda(self):
        return True


class Launches:
    """In the place of a kernel: where each launch would have gone."""

    guarded: "list[object]" = []  # noqa: RUF012
    seen: "list[bool]" = []  # noqa: RUF012

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.seen.append(bool(self.guarded))


class Guard:
    def __init__(self, device):
        self.device = device

    def __enter__(self):
        Launches.guarded.append(self.device)

    def __exit__(self, *exc):
        Launches.guarded.pop()


@pytest.fixture
def launches(monkeypatch):
    """Every kernel replaced by ``Launches``, torch.cuda by what it would say of one H100."""
    from resnet_fused.ops.conv_bn_act import triton_config

    for module, name, kernel in list(kernels()):
        if name.endswith("kernel") or name in ("bottleneck", "conv_pointer", "conv_reduce", "conv_descriptor"):
            assert hasattr(kernel, "fn")
            monkeypatch.setattr(module, name, Launches())
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_config, "architecture", lambda index: triton_config.INTERPRETER)
    properties = type("Properties", (), {"multi_processor_count": 4, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(Launches, "seen", [])
    return Launches


def on_cuda(call):
    return call._replace(**{
        field: value.as_subclass(OnCuda) for field, value in call._asdict().items() if type(value) is Tensor
    })  # fmt: skip


def conv_calls():
    for case in (ConvCase(1, 16, 8, 8, 16, kernel=3, padding=1), ConvCase(1, 256, 5, 5, 32, kernel=3, padding=1)):
        yield "conv_bn_act", "run", case.make(torch.float16)


def norm_calls():
    x, vector = torch.randn(2, 4, 5, 5), torch.ones(4)
    made = dict.fromkeys(BatchNormCall._fields)
    made |= {"x": x, "weight": vector, "bias": vector, "running_mean": vector, "running_var": vector}
    made |= {"momentum": 0.1, "eps": 1e-5, "act": "relu"}
    for training in (True, False):
        yield "batch_norm_act", "run", BatchNormCall(**{**made, "training": training})
    grad = dict.fromkeys(GradientCall._fields)
    grad |= {"grad": x, "x": x, "mean": vector, "rstd": vector, "weight": vector, "output": x, "training": True}
    grad |= {"need_x": True, "need_residual": True, "eps": 1e-5}
    yield "batch_norm_act", "backward", GradientCall(**grad)


def block_calls():
    convs = [ConvCase(1, c, 8, 8, k, kernel=r, padding=r // 2).make(torch.float16).conv
             for c, k, r in ((256, 64, 1), (64, 64, 3), (64, 256, 1))]  # fmt: skip
    yield "bottleneck", "run", BlockCall(torch.randn(1, 256, 8, 8).half(), tuple(convs), None, None)


def sum_calls():
    yield "add_relu", "run", AddReLUCall(torch.randn(2, 3), torch.randn(2, 3))


CALLS = [*conv_calls(), *norm_calls(), *block_calls(), *sum_calls()]


@pytest.mark.parametrize(("op", "function", "call"), CALLS, ids=[f"{op}-{f}-{i}" for i, (op, f, _) in enumerate(CALLS)])
def test_triton_launches_on_the_device_of_its_tensors(op, function, call, launches):
    module = importlib.import_module(f"resnet_fused.ops.{op}.triton")
    getattr(module, function)(on_cuda(call))
    assert launches.seen and all(launches.seen)


BINDINGS = sorted(path for path in (ROOT / "csrc").glob("*/cuda.cpp"))


@pytest.mark.parametrize("path", BINDINGS, ids=lambda path: path.parent.name)
def test_compiled_kernels_are_launched_on_the_device_and_stream_of_their_tensors(path):
    text = path.read_text()
    places = [match.start() for match in re.finditer(r"(?<!void )\blaunch(?!ed)\w*\(", text)]
    assert places
    for place in places:
        before = text[:place].rpartition("\n}\n")[2]  # from the end of the function before
        call = text[place : text.index(";", place)]
        if re.search(r"void\* stream\) \{", before):
            assert re.search(r"\bstream\b", call), call
            continue  # it is told the stream, and is called on the device: by what is below, or by a plan
        within = "void launch(" in before  # a method, which is itself launched under a guard
        assert within or re.search(r"DeviceGuard guard\((device|x\.get_device_index\(\))\);", before), call
        if not text[:place].endswith("."):
            own = re.search(r"\bstream\b", call) and "stream = current_stream(device)" in before
            assert own or "current_stream(device)" in call, call


def test_nothing_is_measured_at_a_call():
    """So nothing is measured while a graph is captured, and no kernel that updates statistics runs more than once."""
    found = list(kernels())
    assert len(found) > 10
    for module, name, kernel in found:
        assert not hasattr(kernel, "configs"), f"{module.__name__}.{name} tries configs when it is called"


def test_no_kernel_adds_atomically():
    """Atomic additions come in another order each time, and so do their rounding errors."""
    sources = [inspect.getsource(importlib.import_module(f"resnet_fused.ops.{name}")) for name in MODULES]
    sources += [path.read_text() for kind in ("cuh", "cu", "h", "cpp") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    assert len(sources) > 40
    for text in sources:
        assert not re.search(r"tl\.atomic|\batomic(Add|Max|Min|CAS|Exch)\b|\bred\.(global|shared)", text)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a CUDA GPU: a second one")
@pytest.mark.parametrize("backend", ["triton", "cudnn", "cuda", "auto"])
def test_the_second_gpu_computes_what_lies_there(backend):
    call = ConvCase(2, 16, 8, 8, 16, kernel=3, padding=1).make(torch.float16, "cuda:1")
    conv = call.conv
    with torch.cuda.device(0):
        out = rf.conv_bn_act(call.x, conv.weight, *conv[2:6], padding=1, backend=backend)
        assert out.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    expected = rf.conv_bn_act(call.x, conv.weight, *conv[2:6], padding=1, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn", "cuda", "auto"])
def test_a_side_stream_is_waited_for(backend):
    call = ConvCase(2, 64, 56, 56, 64, kernel=3, padding=1).make(torch.float16, "cuda")
    conv = call.conv
    expected = rf.conv_bn_act(call.x, conv.weight, *conv[2:6], padding=1, backend=backend)
    late, side = torch.zeros_like(call.x), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the zeros
        late.copy_(call.x)
        out = rf.conv_bn_act(late, conv.weight, *conv[2:6], padding=1, backend=backend)
    side.synchronize()
    assert torch.equal(out, expected)
