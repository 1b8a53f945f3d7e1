"""A network's fused ops as a list of launches for one shape of input: what a GPU runs in unobserved inference.

Who computes each op is asked once. Kernels that can write where they are told (``launches`` of a backend) have their
results in an arena, so that their arguments stay and are bound once; between them nothing is allocated. What allocates
its own result (cuDNN through aten) does so; who reads that is bound once for each address, of which there are few.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import arena, block, cpu_plan, triton_launch
from resnet_fused.ops.arena import Arena, Interval, Place
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.conv_bn_act import api as conv_bn_act
from resnet_fused.ops.convbn import ConvBN, ConvBNActCall, Shape, check_call, output_shape
from resnet_fused.ops.layout import eager_strides, with_strides
from resnet_fused.ops.max_pool.types import PoolCall, pool_size
from resnet_fused.tuning import lookup

_MOST_GRAPHS = 8  # of one thread on one stream
_MOST_ADDRESSES = 32  # of one step that reads or writes outside of the arena


class Conv(NamedTuple):
    """conv_bn_act. x, residual and out are numbers of values; 0 is the input."""

    x: int
    residual: int | None
    out: int
    conv: ConvBN
    act: str

    def call(self, values: Sequence[Any]) -> ConvBNActCall:
        residual = None if self.residual is None else values[self.residual]
        return ConvBNActCall(values[self.x], self.conv, residual, self.act)

    def shape(self, x: Shape) -> Shape:
        return output_shape(self.conv, x)

    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


class Pool(NamedTuple):
    """max_pool2d."""

    x: int
    out: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def call(self, values: Sequence[Any]) -> PoolCall:
        return PoolCall(values[self.x], *self[2:])

    def shape(self, x: Shape) -> Shape:
        return (*x[:2], *pool_size(x[2:], *self[2:]))

    def reads(self) -> tuple[int, ...]:
        return (self.x,)


class Block(NamedTuple):
    """A residual block: one kernel where a backend has it, else its convolutions one by one."""

    x: int
    out: int
    op: str
    convs: tuple[ConvBN, ...]
    shortcut: ConvBN | None

    def call(self, values: Sequence[Any]) -> BlockCall:
        return BlockCall(values[self.x], self.convs, self.shortcut, None)

    def shape(self, x: Shape) -> Shape:
        for conv in self.convs:
            x = output_shape(conv, x)
        return x

    def reads(self) -> tuple[int, ...]:
        return (self.x,)


Node = Conv | Pool | Block


class Step(NamedTuple):
    """A node with who computes it."""

    node: Node
    run: Callable[[Any], Tensor] | None  # gives a tensor of its own
    launches: Callable[..., list[Any]] | None  # (call, out, workspace): writes where it is told
    workspace: int  # bytes

    @property
    def own(self) -> bool:
        """Whether its result is a tensor of its own, outside of the arena."""
        return self.launches is None


class _Bound(NamedTuple):
    """A plan with an arena's addresses."""

    values: list[Any]  # tensors in the arena; None for those outside
    steps: list[Callable[[int, list[Any]], Any]]
    kept: list[Tensor]  # weights as the kernels read them


class DevicePlan:
    """Call it with an input of the shape, strides, dtype and device that it was made for. The result is a new tensor.

    Args:
        nodes: in the order of computation; the last one's result is the plan's.
        x: such an input. It is read where it lies when it is channels_last, else copied into the arena.
        backend: as in ``resnet_fused.functional``.
        head: makes a new tensor from the last node's result.
        strides: without a head, the strides of the result; channels_last unless given.
        graph: capture a CUDA graph at the first call on a stream, and replay it then and later.

    Raises:
        ValueError, TypeError: a node does not take its input.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        x: Tensor,
        backend: str,
        head: Callable[[Tensor], Tensor] | None = None,
        *,
        strides: tuple[int, ...] | None = None,
        graph: bool = False,
    ) -> None:
        self.device, self.dtype = x.device, x.dtype
        self._strides = strides
        self._head, self._captures = head, graph
        copies = graph or not x.is_contiguous(memory_format=torch.channels_last)
        like = torch.empty_like(x, memory_format=torch.channels_last) if copies else x
        with _on(self.device):
            self._steps, self._shapes = _resolved(nodes, like, backend)
        self._last = self._steps[-1].node.out
        outside = {step.node.out for step in self._steps if step.own}
        outside |= (set() if copies else {0}) | ({self._last} if head is None else set())
        self._outside = frozenset(outside)
        self._intervals = self._lifetimes()
        self._offsets, self.bytes = arena.lay_out(list(self._intervals.values()))
        # Values outside are let go once nobody reads them any more.
        let_go = self._outside - {self._last}
        self._ends = [[v for v in let_go if self._last_read(v) == at] for at in range(len(self._steps))]

    def __call__(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return self._run(x, arena.place(self.device, 0).arena(self.device, self.bytes))
        with _on(self.device):
            if torch.cuda.is_current_stream_capturing():
                # What a graph uses belongs to it: another stream may replay it while this one computes.
                return self._run(x, Arena(self.device, self.bytes))
            place = arena.place(self.device, self._stream())
            if self._captures:
                return self._graph(place, x).replay(x)
            return self._run(x, place.arena(self.device, self.bytes))

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index) if self.device.type == "cuda" else 0

    def _run(self, x: Tensor, memory: Arena) -> Tensor:
        bound: _Bound | None = memory.made.get(self)
        if bound is None:
            bound = memory.made[self] = self._bind(memory)
        values = bound.values.copy()
        if values[0] is None:
            values[0] = x
        else:
            values[0].copy_(x)
        return self._launch(bound, values)

    def _launch(self, bound: _Bound, values: list[Any]) -> Tensor:
        """All steps, with the input among the values."""
        if self._head is None:
            values[self._last] = torch.empty(
                self._shapes[self._last], dtype=self.dtype, device=self.device, memory_format=torch.channels_last
            )
        stream = self._stream()
        for step in bound.steps:
            step(stream, values)
        result: Tensor = values[self._last]
        if self._head is not None:
            return self._head(result)
        return result if self._strides is None else with_strides(result, self._strides)

    def _graph(self, place: Place, x: Tensor) -> _Graph:
        graphs = place.graphs
        found: _Graph | None = graphs.pop(self, None)
        if found is None:
            while len(graphs) >= _MOST_GRAPHS:
                graphs.pop(next(iter(graphs)), None)
            found = _Graph(self, x)
        graphs[self] = found  # the latest last
        return found

    def _last_read(self, value: int) -> int:
        if value == self._last:
            return len(self._steps)
        return max((at for at, step in enumerate(self._steps) if value in step.node.reads()), default=0)

    def _lifetimes(self) -> dict[tuple[str, int], Interval]:
        """Of each value in the arena, and of the workspace of each step."""
        found: dict[tuple[str, int], Interval] = {}
        if 0 not in self._outside:
            size = math.prod(self._shapes[0]) * self.dtype.itemsize
            found["value", 0] = Interval(size, 0, self._last_read(0))
        for at, step in enumerate(self._steps):
            out = step.node.out
            if out not in self._outside:
                size = math.prod(self._shapes[out]) * self.dtype.itemsize
                found["value", out] = Interval(size, at, self._last_read(out))
            if step.workspace:
                found["workspace", at] = Interval(step.workspace, at, at)
        return found

    def _bind(self, memory: Arena) -> _Bound:
        values: list[Any] = [None] * len(self._shapes)
        workspaces: dict[int, Tensor] = {}
        for (kind, at), offset in zip(self._intervals, self._offsets, strict=True):
            if kind == "value":
                values[at] = memory.view(offset, self._shapes[at], self.dtype)
            else:
                workspaces[at] = memory.view(offset, (self._intervals[kind, at].size,), torch.uint8)
        steps: list[Callable[[int, list[Any]], Any]] = []
        kept: list[Tensor] = []
        for at, step in enumerate(self._steps):
            used = [*step.node.reads(), step.node.out]
            outside = [value for value in used if value in self._outside]
            if step.launches is None:
                steps.append(_own_step(step))
            elif outside:
                steps.append(_moving_step(step, workspaces.get(at), outside))
            else:
                launches, others = _bound(step, values, workspaces.get(at))
                steps += launches
                kept += others
            if self._ends[at]:
                steps.append(_letting_go(self._ends[at]))
        return _Bound(values, steps, kept)


class _Graph:
    """A plan's launches as a CUDA graph, with an arena of their own: each call copies its input into that, and the
    result out of it. So a graph is for one thread and stream."""

    def __init__(self, plan: DevicePlan, x: Tensor) -> None:
        self._bound = plan._bind(Arena(plan.device, plan.bytes))
        self._bound.values[0].copy_(x)
        plan._launch(self._bound, self._bound.values.copy())  # what cuDNN makes on first use
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do on the device.
        capture = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
        with torch.inference_mode(False), torch.no_grad(), capture:
            self._result = plan._launch(self._bound, self._bound.values.copy())

    def replay(self, x: Tensor) -> Tensor:
        self._bound.values[0].copy_(x)
        self._graph.replay()
        return self._result.clone()


def _bound(step: Step, values: list[Any], workspace: Tensor | None) -> tuple[list[Any], list[Tensor]]:
    """The step's launches at these addresses, and the tensors beside ``values`` that must live as long."""
    assert step.launches is not None
    found = step.launches(step.node.call(values), values[step.node.out], workspace)
    given = {t.untyped_storage().data_ptr() for t in (*values, workspace) if t is not None}
    others = [t for launch in found for t in launch.tensors() if t.untyped_storage().data_ptr() not in given]
    return [launch.bind() for launch in found], others


def _own_step(step: Step) -> Callable[[int, list[Any]], None]:
    node, run = step.node, step.run
    assert run is not None

    def own(stream: int, values: list[Any]) -> None:
        values[node.out] = run(node.call(values))

    return own


def _moving_step(step: Step, workspace: Tensor | None, outside: list[int]) -> Callable[[int, list[Any]], None]:
    """Tensors outside of the arena lie at another address from call to call, as a rule at one of a few."""
    known: dict[Any, tuple[list[Any], list[Tensor]]] = {}

    def moving(stream: int, values: list[Any]) -> None:
        key = tuple([values[value].data_ptr() for value in outside])
        found = known.get(key)
        if found is None:
            if len(known) >= _MOST_ADDRESSES:
                known.clear()
            found = known[key] = _bound(step, values, workspace)
        for launch in found[0]:
            launch(stream, values)

    return moving


def _letting_go(numbers: list[int]) -> Callable[[int, list[Any]], None]:
    def let_go(stream: int, values: list[Any]) -> None:
        for number in numbers:
            values[number] = None

    return let_go


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def serves(x: Tensor, backend: str) -> bool:
    """Whether plans of launches are for such an input, and nobody wants to be told of each launch. Triton's interpreter
    stands in for a GPU where it is asked for by name."""
    if not x.is_cuda and (backend != backends.Backend.TRITON or not backends.interpreting()):
        return False
    return x.dtype in _DTYPES and not triton_launch.watched()


def switches() -> tuple[Any, ...]:
    """What of PyTorch decides who computes an op on a GPU, and how."""
    cudnn: Any = torch.backends.cudnn
    return (
        cudnn.conv.fp32_precision, cudnn.enabled, cudnn.benchmark, cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def make(
    steps: Sequence[cpu_plan.Step], x: Tensor, backend: str, channels_last: bool, *, graph: bool = False
) -> DevicePlan | None:
    """A plan for inputs like ``x``; None where its feature maps would not be channels_last.

    Args:
        backend, channels_last: of the module which the steps are from.
        graph: see :class:`DevicePlan`.

    Raises:
        ValueError, TypeError: a step does not take its input.
    """
    dense = x.is_contiguous(memory_format=torch.channels_last)
    if not dense and not channels_last:
        return None
    nodes: list[Node] = []
    for at, step in enumerate(steps):
        if isinstance(step, cpu_plan.Conv):
            nodes.append(Conv(at, None, at + 1, step.conv, "relu"))
        elif isinstance(step, cpu_plan.MaxPool):
            nodes.append(Pool(at, at + 1, *step))
        elif isinstance(step, cpu_plan.Residual):
            nodes.append(Block(at, at + 1, step.name, step.convs, step.shortcut))
    if isinstance(steps[-1], cpu_plan.Mean):
        return DevicePlan(nodes, x, backend, _mean, graph=graph)
    (step,) = steps  # a block alone, whose result has eager's strides
    assert isinstance(step, cpu_plan.Residual)
    like = x if dense else torch.empty_like(x, memory_format=torch.channels_last)
    strides = eager_strides(block.eager, like, (*step.convs, step.shortcut), None)
    return DevicePlan(nodes, x, backend, strides=strides)


def _mean(y: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)


def _resolved(nodes: Sequence[Node], x: Tensor, backend: str) -> tuple[list[Step], list[Shape]]:
    """Who computes each node, and every value's shape."""
    shapes: dict[int, Shape] = {0: tuple(x.shape)}  # type: ignore[dict-item]
    count = 1 + max(node.out for node in nodes)
    steps: list[Step] = []
    for node in nodes:
        server = None
        if isinstance(node, Block):
            block.check_block(call := node.call(_blank(node, shapes, x)))
            server = block.whole(node.op, call, backend)
        if server is not None or not isinstance(node, Block):
            steps.append(_step(node, shapes, x, backend, server))
            continue
        for conv in _chain(node, count):
            count = max(count, conv.out + 1)
            steps.append(_step(conv, shapes, x, backend, None))
    return steps, [shapes[number] for number in range(count)]


def _step(node: Node, shapes: dict[int, Shape], x: Tensor, backend: str, server: Any) -> Step:
    """The node with who computes it; its result's shape goes to ``shapes``."""
    shape = shapes[node.out] = node.shape(shapes[node.x])
    if min(shape) < 1:
        raise ValueError(f"x: got an image of which a step gives {shape}, need a larger one")
    call: Any = node.call(_blank(node, shapes, x))
    if isinstance(node, Pool):
        if backend in (backends.AUTO, backends.Backend.TRITON) and backends.refusal("max_pool", "triton", call) is None:
            server = backends.implementation("max_pool", "triton")
        else:
            return Step(node, PoolCall.eager, None, 0)
    elif isinstance(node, Conv):
        check_call(call)
        server = conv_bn_act.server(call, backend)
    module, options = server, {}
    if isinstance(server, lookup.Configured):
        module, options = sys.modules[server.compute.__module__], {"config": server.config}
    if hasattr(module, "launches"):
        return Step(node, None, functools.partial(module.launches, **options), module.workspace_bytes(call, **options))
    return Step(node, backends.bind(server, call), None, 0)


def _blank(node: Node, shapes: dict[int, Shape], x: Tensor) -> list[Any]:
    """Values like those that the node will read, to ask about; they hold nothing yet."""
    values: list[Any] = [None] * (1 + max(node.reads()))
    for number in node.reads():
        empty = functools.partial(torch.empty, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        values[number] = x if number == 0 else empty(shapes[number])
    return values


def _chain(node: Block, count: int) -> list[Conv]:
    """The block's convolutions; ``count`` is the first free number of a value."""
    hidden, found = node.x, []
    for conv in node.convs[:-1]:
        found.append(Conv(hidden, None, count, conv, "relu"))
        hidden, count = count, count + 1
    residual = node.x
    if node.shortcut is not None:
        found.append(Conv(node.x, None, count, node.shortcut, "none"))
        residual = count
    return [*found, Conv(hidden, residual, node.out, node.convs[-1], "relu")]


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _AS_IT_IS
    return torch.cuda.device(device)


_AS_IT_IS = contextlib.nullcontext()
