"""What simt_harness starts under the sanitizers: reads requests from stdin and writes answers to stdout, pickled."""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import tempfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
Request = tuple[str, tuple[Any, ...], dict[int, int], dict[str, int], bool]
DEFAULTS = {
    "seed": 0,
    "multiprocessors": 2,
    "shared_block": 227 << 10,
    "shared_multiprocessor": 228 << 10,
    "shifted": 0,
}


def main(library: str) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    printed = tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(printed.fileno(), 1)
    torch.ops.load_library(library)
    while True:
        try:
            request: Request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = apart(request, printed) if request[4] else respond(request, printed)
        pickle.dump(answer, answers)
        answers.flush()


def respond(request: Request, printed: BinaryIO) -> tuple[Any, ...]:
    name, arguments, shift, settings, _ = request
    printed.seek(0)
    printed.truncate()
    host = torch.ops.resnet_fused_host
    host.set(*(DEFAULTS | settings).values())
    placed = tuple(
        place(a, shift.get(i, 0)) if isinstance(a, Tensor) else [place(t, 0) for t in a] if tensors(a) else a
        for i, a in enumerate(arguments)
    )
    namespace, _, op = name.partition("::")
    if namespace == "plans":
        try:
            outs = launch_plan(*placed)
        except RuntimeError as error:
            return "refused", str(error).partition("\n")[0]
        host.flush()
        printed.seek(0)
        return "done", printed.read().decode(), outs, ()
    overload = getattr(getattr(torch.ops, namespace), op).default
    try:
        outs = overload.redispatch(CUDA, *placed) if namespace == "resnet_fused_cuda" else overload(*placed)
    except RuntimeError as error:
        return "refused", str(error).partition("\n")[0]
    host.flush()
    printed.seek(0)
    return "done", printed.read().decode(), outs if isinstance(outs, tuple) else (outs,), placed


def launch_plan(
    op: str, call: list[Any], out: Tensor, workspace: Tensor | None, inputs: list[int]
) -> tuple[Tensor, ...]:
    """What a plan of ``op`` writes to ``out``, and what it writes once its inputs were negated where they lie."""
    placed = [place(value, 0) if isinstance(value, Tensor) else value for value in call]
    plan = torch.zeros(1024, dtype=torch.uint8)
    told = (out, plan) if op == "bottleneck" else (out, workspace, plan)
    getattr(torch.ops.resnet_fused_cuda, f"{op}_plan").default.redispatch(CUDA, *placed, *told)
    launch = getattr(ctypes.CDLL(sys.argv[1]), f"resnet_fused_launch_{op}")
    launch.argtypes, launch.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_char_p
    found = []
    for _ in range(2):
        error = launch(plan.data_ptr(), None)
        if error is not None:
            raise RuntimeError(error.decode())
        found.append(out.clone())
        for at in inputs:
            placed[at].neg_()
        out.fill_(float("nan"))
    return tuple(found)


def tensors(argument: object) -> bool:
    return isinstance(argument, list) and all(isinstance(item, Tensor) for item in argument)


def place(tensor: Tensor, shift: int) -> Tensor:
    """A copy in a block of its own of exactly its extent, ``shift`` bytes behind where the block begins."""
    if tensor.numel() == 0:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    block = torch.empty(shift + extent * tensor.element_size(), dtype=torch.uint8)
    flat = torch.frombuffer(block.numpy(), dtype=tensor.dtype, offset=shift)
    flat.copy_(tensor.as_strided((extent,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride(), 0)


def apart(request: Request, printed: BinaryIO) -> tuple[Any, ...]:
    """The answer of a child, or what it said as it stopped."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            pickle.dump(respond(request, printed), answer)
            answer.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        if status:
            return "fault", os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")
        answer.seek(0)
        found: tuple[Any, ...] = pickle.load(answer)
        return found


if __name__ == "__main__":
    main(sys.argv[1])
