"""Who is timed: eager PyTorch as users run it, the strongest baselines that they can reach, and ours."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.testing.bench.cases import Case

Call = Callable[[], Any]
Factory = Callable[[Case, nn.Module, tuple[Tensor, ...]], Call]


class Absent(Exception):
    """This contender does not exist here, or cannot take this case; the message says why."""


EAGER = ("eager NCHW", "eager channels_last")


def table(device: torch.device, *, compiled: bool = False) -> tuple[dict[str, Factory], dict[str, str]]:
    """All contenders on ``device``, and for each that cannot exist here the reason.

    Those that ``torch.compile`` makes come only when asked for, as they are slow to build. Ours come with the automatic
    choice of backend, in both memory formats, and with each backend by name.
    """
    present: dict[str, Factory] = {
        "eager NCHW": functools.partial(_eager, layout=torch.contiguous_format),
        "eager channels_last": functools.partial(_eager, layout=torch.channels_last),
        "folded channels_last": _folded,
    }
    absent: dict[str, str] = {}
    if compiled:
        present["compile"] = functools.partial(_compiled, mode="default", freezing=False)
        mode = "max-autotune-no-cudagraphs"  # graphs are a contender of their own
        present["compile max-autotune freezing"] = functools.partial(_compiled, mode=mode, freezing=True)
    else:
        absent["compile"] = "not asked for"
    peers = (
        ("onnxruntime", _onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
        ("openvino", _openvino, ("openvino",)),
    )
    for name, factory, packages in peers:
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if device.type != "cpu":
            absent[name] = "timed on the CPU only"
        elif missing:
            absent[name] = f"{', '.join(missing)} not installed"
        else:
            present[name] = factory
    present["fused"] = functools.partial(_fused, backend=backends.AUTO, layout=torch.channels_last)
    present["fused NCHW"] = functools.partial(_fused, backend=backends.AUTO, layout=torch.contiguous_format)
    for name, reason in backends.available().items():
        if reason is None:
            present[f"fused[{name}]"] = functools.partial(_fused, backend=name, layout=torch.channels_last)
        else:
            absent[f"fused[{name}]"] = reason
    return present, absent


def is_ours(name: str) -> bool:
    """True for what this package computes."""
    return name.startswith("fused")


def laid_out(tree: Any, layout: torch.memory_format) -> Any:
    """Tensors, or a copy of a module, in a memory format."""
    if isinstance(tree, tuple):
        return tuple(x.contiguous(memory_format=layout) for x in tree)
    return copy.deepcopy(tree).to(memory_format=layout)


def fold(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with every batch norm folded into the convolution before it: in float32, then cast."""
    from torch.fx.experimental.optimization import fuse as fold_norms

    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    folded: nn.Module = fold_norms(copy.deepcopy(module).float())
    return folded.to(dtype)


def _eager(case: Case, module: nn.Module, inputs: tuple[Tensor, ...], layout: torch.memory_format) -> Call:
    return functools.partial(laid_out(module, layout), *laid_out(inputs, layout))


def _folded(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    if not any(True for _ in module.parameters()):
        raise Absent("nothing to fold")
    return _eager(case, fold(module), inputs, torch.channels_last)


def _compiled(case: Case, module: nn.Module, inputs: tuple[Tensor, ...], mode: str, freezing: bool) -> Call:
    settings: Any = importlib.import_module("torch._inductor.config")
    last = torch.channels_last
    call: Any = torch.compile(laid_out(module, last), mode=mode, dynamic=False)
    arguments = laid_out(inputs, last)

    def run() -> Any:
        return call(*arguments)

    with settings.patch(freezing=freezing), torch.inference_mode():
        run()
    return run


def _fused(
    case: Case, module: nn.Module, inputs: tuple[Tensor, ...], backend: str, layout: torch.memory_format
) -> Call:
    call = functools.partial(case.fused(laid_out(module, layout), backend), *laid_out(inputs, layout))
    try:
        with torch.inference_mode():
            call()
    except backends.BackendError as error:
        raise Absent(str(error)) from error
    return call


def _numpy(inputs: Sequence[Tensor]) -> list[Any]:
    if any(x.dtype != torch.float32 for x in inputs):
        raise Absent("timed in float32 only")
    return [x.numpy() for x in inputs]


def _onnxruntime(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    arrays = _numpy(inputs)
    runtime: Any = importlib.import_module("onnxruntime")
    program: Any = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads slow whoever comes next
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = dict(zip([item.name for item in session.get_inputs()], arrays, strict=True))

    def run() -> Tensor:
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _openvino(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    arrays = _numpy(inputs)
    openvino: Any = importlib.import_module("openvino")
    converted = openvino.convert_model(copy.deepcopy(module), example_input=inputs)
    for port, array in zip(converted.inputs, arrays, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(array.shape)))
    converted.validate_nodes_and_infer_types()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    request = compiled.create_infer_request()

    def run() -> Tensor:
        return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return run
