"""A fused model against the eager one it came from: block by block and end to end, in float64 budgets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.fusion import FusionEntry, report
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.spec import BlockSpec
from resnet_fused.ops import packed
from resnet_fused.testing.budget import Error, measure


class ComparisonError(ValueError):
    """Eager itself cannot be run as a comparison needs it; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """One comparison. ``error`` is None where there was nothing to measure, and ``problem`` then says why."""

    name: str
    kind: str
    backend: str
    error: Error | None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None and self.error is not None and self.error.ok

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "backend": self.backend,
            "ratio": None if self.error is None else self.error.ratio,
            "error": None if self.error is None else self.error.error,
            "eager_error": None if self.error is None else self.error.eager_error,
            "problem": self.problem,
            "ok": self.ok,
        }


@torch.no_grad()
@packed.at_once()
def check(
    name: str, kind: str, backend: str, eager: nn.Module, fused: Callable[..., Any], inputs: tuple[Any, ...]
) -> Verdict:
    """Compare ``fused(*inputs)`` with ``eager(*inputs)``: values within the budget, and shapes, dtypes, strides alike.

    Eager's error counts in either memory format, as in :func:`resnet_fused.testing.budget.measure`. Nested outputs
    (dictionaries, lists) are compared tensor by tensor; the worst one counts. What ``fused`` raises is a problem of the
    verdict, not an exception.

    Raises:
        ComparisonError: eager fails, in float64 too; or it gives no tensors, or none whose shapes can be relied on.
    """
    wide = _map(inputs, lambda t: t.double() if t.is_floating_point() else t.clone())
    reference = _eager_output(copy.deepcopy(eager).double(), wide, " in float64")
    expected = _eager_output(eager, _map(inputs, Tensor.clone))
    first, second = (_run_in(layout, eager, inputs) for layout in (torch.contiguous_format, torch.channels_last))
    pairs = _in_a_pair(eager, inputs, expected)
    if any(_shapes(other) != _shapes(expected) for other in (reference, first, second)):
        raise ComparisonError("the shapes of eager's outputs change with its rounding, so they cannot be compared")
    try:
        got = flatten(fused(*_map(inputs, Tensor.clone)))
    except Exception as raised:  # the verdict reports it, whatever it is
        return Verdict(name, kind, backend, None, f"raised {type(raised).__name__}: {raised}")
    if got.keys() != expected.keys():
        return Verdict(name, kind, backend, None, f"outputs {sorted(got)}, eager's {sorted(expected)}")
    worst = Error(0.0, 0.0, 0.0)
    for key, want in expected.items():
        out = got[key]
        for attribute in ("shape", "dtype", "device"):
            if getattr(out, attribute) != getattr(want, attribute):
                text = f"{attribute} {_plain(getattr(out, attribute))}, eager's {_plain(getattr(want, attribute))}"
                return Verdict(name, kind, backend, None, text)
        if want.is_floating_point():
            error = measure(out, first[key], reference[key], second[key], *(pair[key] for pair in pairs))
            worst = worst if error.ratio <= worst.ratio else error
        elif not torch.equal(out, want):
            return Verdict(name, kind, backend, None, f"{key or 'the output'} differs")
        if _strides(out) != _strides(want):
            return Verdict(name, kind, backend, worst, f"strides {out.stride()}, eager's {want.stride()}")
    return Verdict(name, kind, backend, worst)


def _run_in(layout: torch.memory_format, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The output of ``model`` with its weights and its images in this memory format."""
    turned = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    return _eager_output(turned, _map(inputs, lambda t: t.clone(memory_format=layout) if t.dim() == 4 else t.clone()))


def _in_a_pair(eager: nn.Module, inputs: tuple[Any, ...], expected: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What ``eager`` gives, in either format, for one image that comes twice in a batch; nothing for other batches.

    For one small image alone eager sums in another order than for two.
    """
    if not all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == 1 for t in inputs):
        return []
    twice = tuple(torch.cat([t, t]) for t in inputs)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        try:
            output = _run_in(layout, eager, twice)
        except ComparisonError:  # made for single images
            return []
        halves = {key: tensor[:1] for key, tensor in output.items() if tensor.dim() and tensor.shape[0] == 2}
        if _shapes(halves) != _shapes(expected):
            return []
        found.append(halves)
    return found


def _eager_output(model: nn.Module, inputs: tuple[Any, ...], how: str = "") -> dict[str, Tensor]:
    try:
        output = flatten(model(*inputs))
    except Exception as raised:  # a user's model may raise anything
        raise ComparisonError(f"eager raised {type(raised).__name__}{how}: {raised}") from raised
    if not output:
        raise ComparisonError("eager gives no tensors to compare")
    return output


def _shapes(output: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in output.items()}


@dataclass(frozen=True)
class Part:
    """A fused part of a model, the eager modules that compute the same, and the input that eager gave them."""

    name: str
    kind: str
    backend: str
    eager: nn.Module
    fused: Callable[..., Any]
    inputs: tuple[Any, ...]


def fused_parts(eager: nn.Module, fused: nn.Module, x: Tensor) -> list[Part]:
    """Every fused block and stem of ``fused`` that runs, with what ``eager(x)`` feeds its counterpart.

    Args:
        eager: the model that ``fused`` was made from, in eval mode.
        fused: ``fuse(eager)``.
        x: the model's input.

    Raises:
        ComparisonError: ``eager(x)`` fails.
    """
    found: list[tuple[FusionEntry, nn.Module, Callable[..., Any], nn.Module]] = []
    for entry in report(fused).fused:
        if entry.kind == "stem":
            owner = entry.name.removesuffix("stem").rstrip(".")
            stem, home = fused.get_submodule(owner), eager.get_submodule(owner)
            assert isinstance(stem, FusedStem)
            layers = _stem_layers(home, stem._rf_state.spec)
            found.append((entry, nn.Sequential(*layers), stem._rf_run_stem, layers[0]))
        else:
            module = fused.get_submodule(entry.name)
            block = eager.get_submodule(entry.name)
            found.append((entry, block, module, block))
    inputs = _capture([first for *_, first in found], eager, x)
    return [
        Part(entry.name or "(model)", entry.kind, entry.backend, before, after, inputs[first])
        for entry, before, after, first in found
        if first in inputs
    ]


def _stem_layers(home: nn.Module, spec: BlockSpec) -> list[nn.Module]:
    """The modules of a stem in the order in which eager calls them."""
    layers: list[nn.Module] = []
    for i, (conv, norm) in enumerate(spec.pairs):
        own_norm = norm[: len(conv)] == conv  # the convolution calls its norm itself
        paths = [conv, *([] if own_norm else [norm]), *spec.acts[i : i + 1]]
        layers += [home.get_submodule(".".join(keys)) for keys in paths]
        layers += [] if spec.acts else [nn.ReLU()]
    return layers


def _capture(modules: Iterable[nn.Module], model: nn.Module, x: Tensor) -> dict[nn.Module, tuple[Any, ...]]:
    """The positional arguments that each of ``modules`` is first called with in ``model(x)``."""
    captured: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.setdefault(module, _map(args, Tensor.clone))  # a later module may write into it

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        with torch.no_grad():
            _eager_output(model, (x,))
    finally:
        for handle in handles:
            handle.remove()
    return captured


def flatten(output: Any) -> dict[str, Tensor]:
    """The tensors in a model's output, by their place in it; a bare tensor stands at ``""``."""
    return dict(_walk(output, ""))


def _walk(value: Any, at: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield at, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{at}.{key}" if at else str(key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _walk(item, f"{at}.{i}" if at else str(i))
    elif value is not None:
        place = f"output {at}" if at else "the output"
        raise TypeError(f"{place} is a {type(value).__name__}, need tensors in tuples, lists or dictionaries")


def _map(inputs: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return fn(inputs)
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_map(item, fn) for item in inputs)
    return inputs


def _strides(tensor: Tensor) -> list[int]:
    """The strides that mean something: PyTorch's own convolutions disagree on those of dimensions of size 1."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value
