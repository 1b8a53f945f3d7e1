"""The contenders: eager PyTorch as users run it, the strongest baselines that they can reach, and this package."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.fusion import FusionError
from resnet_fused.ops.residual_block import RECOMPUTE
from resnet_fused.testing.bench.cases import Call, Case

Factory = Callable[[Case, nn.Module, tuple[Tensor, ...]], Call]


class Absent(Exception):
    """This contender does not exist here, or cannot take this case; the message says why."""


EAGER = ("eager NCHW", "eager channels_last")
PEERS = ("onnxruntime", "openvino")
COMPILED = ("compile", "compile freezing", "compile max-autotune freezing")
GROUPS = {"eager": EAGER, "peers": PEERS, "compiled": COMPILED}


def table(device: torch.device) -> tuple[dict[str, Factory], dict[str, str]]:
    """All contenders on ``device``, and for each that cannot exist here the reason.

    Ours come with the automatic choice of backend, in both memory formats, with each backend by name, and in training
    with each way to recompute.
    """
    tuned = "max-autotune-no-cudagraphs"  # graphs are a contender of their own
    present: dict[str, Factory] = {
        "eager NCHW": functools.partial(_eager, layout=torch.contiguous_format),
        "eager channels_last": functools.partial(_eager, layout=torch.channels_last),
        "folded channels_last": _folded,
        "compile": functools.partial(_compiled, mode="default", freezing=False),
        "compile freezing": functools.partial(_compiled, mode="default", freezing=True),
        "compile max-autotune freezing": functools.partial(_compiled, mode=tuned, freezing=True),
    }
    absent: dict[str, str] = {}
    peers = ((_onnxruntime, ("onnxruntime", "onnx", "onnxscript")), (_openvino, ("openvino",)))
    for name, (factory, packages) in zip(PEERS, peers, strict=True):
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if device.type != "cpu":
            absent[name] = "timed on the CPU only"
        elif missing:
            absent[name] = f"{', '.join(missing)} not installed"
        else:
            present[name] = factory
    present["fused"] = _fused
    present["fused NCHW"] = functools.partial(_fused, layout=torch.contiguous_format)
    for choice in RECOMPUTE:
        present[f"fused recompute={choice}"] = functools.partial(_fused, recompute=choice)
    for name, reason in backends.available().items():
        if reason is None:
            present[f"fused[{name}]"] = functools.partial(_fused, backend=name)
        else:
            absent[f"fused[{name}]"] = reason
    return present, absent


def choose(
    device: torch.device, wanted: Iterable[str] = (), *, compiled: bool = False
) -> tuple[dict[str, Factory], dict[str, str]]:
    """The contenders that ``wanted`` names, by their names or GROUPS; all where it names none.

    Those that ``torch.compile`` makes, which take minutes to build, come when they are named or ``compiled`` is True.

    Raises:
        ValueError: there is none of this name here; the message says why, and which there are.
    """
    present, absent = table(device)
    names = [name for word in wanted for name in GROUPS.get(word, (word,))]
    unknown = [name for name in names if name not in present and name not in absent]
    gone = [name for name in wanted if name in absent]
    if unknown or gone:
        reasons = "; ".join(f"{name}: {absent.get(name, 'unknown')}" for name in (*unknown, *gone))
        raise ValueError(f"{reasons}. Here are: {', '.join((*GROUPS, *present))}")
    if names:
        return {n: f for n, f in present.items() if n in names}, {n: r for n, r in absent.items() if n in names}
    if compiled:
        return present, absent
    left = {name: factory for name, factory in present.items() if name not in COMPILED}
    return left, absent | dict.fromkeys(COMPILED, "not asked for")


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
    model = laid_out(module, layout)
    return case.call(model, laid_out(inputs, layout), model)


def _inference_only(case: Case) -> None:
    if case.training:
        raise Absent("inference only")


def _folded(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    _inference_only(case)
    if not any(True for _ in module.parameters()):
        raise Absent("nothing to fold")
    return _eager(case, fold(module), inputs, torch.channels_last)


def _compiled(case: Case, module: nn.Module, inputs: tuple[Tensor, ...], mode: str, freezing: bool) -> Call:
    if freezing:
        _inference_only(case)
    settings: Any = importlib.import_module("torch._inductor.config")
    model = laid_out(module, torch.channels_last)
    compiled: Any = torch.compile(model, mode=mode, dynamic=False)
    call = case.call(compiled, laid_out(inputs, torch.channels_last), model)
    with settings.patch(freezing=freezing), torch.inference_mode():
        call()
    return call


def _fused(
    case: Case,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    layout: torch.memory_format = torch.channels_last,
    **options: Any,
) -> Call:
    """``options`` are those of ``fuse``."""
    if "recompute" in options and not (case.training and case.name == case.model):
        raise Absent("in training whole models only")
    laid = laid_out(module, layout)
    try:
        run = case.fused(laid, **({"backend": backends.AUTO} | options))
        call = case.call(run, laid_out(inputs, layout), run if isinstance(run, nn.Module) else laid)
        with torch.inference_mode():
            call()
    except (backends.BackendError, FusionError) as error:
        raise Absent(str(error)) from error
    return call


def _outputs(tensors: Sequence[Tensor]) -> Any:
    return tensors[0] if len(tensors) == 1 else list(tensors)


def _onnxruntime(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    _inference_only(case)
    if case.dtype != torch.float32:
        raise Absent(f"unsupported: it has no convolution in {str(case.dtype).removeprefix('torch.')} on the CPU")
    runtime: Any = importlib.import_module("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's, of its own parts
        program: Any = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads slow the next contender
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {item.name: x.numpy() for item, x in zip(session.get_inputs(), inputs, strict=True)}

    def run() -> Any:
        return _outputs([torch.from_numpy(array) for array in session.run(None, feed)])

    return run


_OPENVINO_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _openvino(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """In bfloat16 it gets the same weights in float32, computes in bfloat16, and takes and gives bfloat16 tensors."""
    _inference_only(case)
    if case.dtype not in _OPENVINO_TYPES:
        raise Absent("timed in float32 and bfloat16")
    openvino: Any = importlib.import_module("openvino")
    preprocess: Any = importlib.import_module("openvino.preprocess")
    hint = _OPENVINO_TYPES[case.dtype]
    element = getattr(openvino.Type, hint)
    converted = openvino.convert_model(copy.deepcopy(module).float(), example_input=tuple(x.float() for x in inputs))
    for port, x in zip(converted.inputs, inputs, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(x.shape)))
    converted.validate_nodes_and_infer_types()
    edges = preprocess.PrePostProcessor(converted)
    for i in range(len(converted.inputs)):
        edges.input(i).tensor().set_element_type(element)
    for i in range(len(converted.outputs)):
        edges.output(i).tensor().set_element_type(element)
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(edges.build(), "CPU", settings)
    request = compiled.create_infer_request()

    def shared(x: Tensor) -> Any:
        array = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
        return openvino.Tensor(array, openvino.Shape(list(x.shape)), element)

    given = [x.contiguous() for x in inputs]  # held: their memory is read in place
    out = [torch.empty(tuple(port.shape), dtype=case.dtype) for port in compiled.outputs]
    for i, x in enumerate(given):
        request.set_input_tensor(i, shared(x))
    for i, y in enumerate(out):
        request.set_output_tensor(i, shared(y))

    def run(given: Any = given) -> Any:
        request.infer()
        return _outputs(out)

    return run
