"""Run by test_stand_in.py, with TRITON_INTERPRET unset: what plans launch, beside what the ordinary path launches."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["RESNET_FUSED_TUNING"] = "0"

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from stand_in_cuda import StandIn, on_gpu

import resnet_fused as rf
from resnet_fused.modules import network_plan
from resnet_fused.ops import arena, packed, triton_launch
from resnet_fused.ops.device_plan import DevicePlan
from resnet_fused.ops.triton_launch import Launch


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def plain(launch: Launch) -> tuple[Any, ...]:
    """A launch without its addresses: what they are relative to the first tensor of the same storage is left."""
    firsts: dict[int, int] = {}

    def described(value: Any) -> Any:
        if type(value).__name__ == "TensorDescriptor":
            return ("descriptor", value.shape, value.strides, value.block_shape, described(value.base))
        if isinstance(value, Tensor):
            address = value.data_ptr()
            # Within one tensor: the arena's storage holds many.
            near = [a for a in firsts if 0 <= address - a < firsts[a]]
            offset = address - near[0] if near else 0
            if not near:
                firsts[address] = value.element_size() * (
                    1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                )
            return (tuple(value.shape), value.stride(), value.dtype, offset, address % 16)
        return value

    return launch.kernel.fn.__name__, launch.grid, [described(value) for value in launch.args], launch.constants


def check(stand_in: StandIn, name: str, model: nn.Module, x: Tensor) -> None:
    bound: list[tuple[Launch, Any]] = []  # in the order in which they run
    called: list[Launch] = []
    bind, call = Launch.bind, Launch.__call__

    def noting(launch: Launch) -> Any:
        made = bind(launch)

        def run(stream: int, values: Any = None) -> None:
            bound.append((launch, made))
            made(stream)

        return run

    fused = rf.fuse(model)
    patches = (
        mock.patch.object(Launch, "bind", noting),
        mock.patch.object(Launch, "__call__", lambda self: called.append(self) or call(self)),
    )
    with on_gpu(), packed.at_once(), torch.inference_mode():
        with patches[0]:
            fused(x)
        launches = list(bound)
        (plan,) = fused._rf_state.prepared.network.guard.kept.values()
        assert isinstance(plan, DevicePlan), f"{name} has no plan"
        # Each bound launch gives the driver the very bytes that kernel[grid](...) gives it.
        for launch, again in launches:
            ordinary = stand_in.record(launch)
            assert ordinary and ordinary == stand_in.record(lambda again=again: again(0)), plain(launch)
        # A forward launches these, in this order, and does nothing else until the head.
        before, one = stand_in.launches(), stand_in.record(lambda: fused(x))
        assert stand_in.launches() - before == len(launches), name
        assert one == b"".join(stand_in.record(lambda again=again: again(0)) for _, again in launches)
        with Operations() as operations:
            plan(x)
        head = ["aten.adaptive_avg_pool2d.default", "aten.flatten.using_ints", "aten.mean.dim", "aten.view.default",
                "aten.copy_.default"]  # fmt: skip
        assert set(operations.seen) <= set(head) and len(operations.seen) <= 4, operations.seen
        # The ordinary path launches the same, but for the pool.
        without = mock.patch.object(network_plan, "run", lambda *_: None)
        with without, patches[1]:
            fused(x)
        ours = [plain(launch) for launch, _ in launches if launch.kernel.fn.__name__ != "max_pool_kernel"]
        theirs = [plain(launch) for launch in called]
        assert len(ours) == len(theirs), (name, len(ours), len(theirs))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == other, f"{name}\n{mine}\n{other}"
    print(f"{name}: {len(launches)} launches")


def watched(stand_in: StandIn, model: nn.Module, x: Tensor) -> None:
    """Triton's own hooks see every launch: no plan is run past them."""
    import triton

    fused, seen = rf.fuse(model), []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    with on_gpu(), packed.at_once(), torch.inference_mode():
        fused(x)
        triton.knobs.runtime.launch_enter_hook.add(hook)
        try:
            assert triton_launch.watched()
            fused(x)
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) > 10, seen
    print(f"watched: {len(seen)} launches")


def streams(stand_in: StandIn, model: nn.Module, x: Tensor) -> None:
    """What is launched goes to the stream that is current at the call, with the memory of that stream."""
    fused = rf.fuse(model)
    current = [0]
    of_now = mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: current[0], create=True)
    with on_gpu(), of_now, packed.at_once(), torch.inference_mode():
        fused(x)
        on = []
        for current[0] in (0, 77, 0):
            log = stand_in.record(lambda: fused(x))
            on.append(int.from_bytes(log[256 + 6 * 8 : 256 + 7 * 8], "little"))
        assert on == [0, 77, 0]
        assert len({place._arena.memory.data_ptr() for place in arena._local.places.values()}) == 2
    print("streams: 2")


def main() -> None:
    from resnet_fused.testing.torchvision_compat import import_torchvision

    stand_in = StandIn()
    models = import_torchvision().models
    torch.manual_seed(0)
    if "--small" in sys.argv:
        cases = [("resnet18", 1, (65, 47))]
    else:
        cases = [("resnet18", 2, (97, 131)), ("resnet50", 1, (224, 224)), ("resnet50", 3, (65, 97))]
    for name, batch, size in cases:
        model = getattr(models, name)(weights=None).eval().half()
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.zeros(batch, 3, *size, dtype=torch.half).contiguous(memory_format=layout)
            check(stand_in, f"{name}-N{batch}-{size[0]}x{size[1]}-{layout}", model, x)
    watched(stand_in, model, x)
    streams(stand_in, model, x)


if __name__ == "__main__":
    main()
