"""A convolution, its batch norm and ReLU as one module; and the same triple inside a model that owns it, the stem."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.modules import depth_first, guards, live, network_plan, parts
from resnet_fused.modules.base import FusedModule
from resnet_fused.modules.spec import BlockSpec, FusedState, find
from resnet_fused.ops.convbn import ACTS

IntOrPair = int | tuple[int, int]


class FusedConvBNReLU(FusedModule):
    """Convolution, batch norm and ReLU, one op in eval mode.

    Equivalent to::

        F.relu(bn(conv(x)))         # act="relu"
        bn(conv(x))                 # act="none"

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in nn.Conv2d.
        eps, momentum: as in nn.BatchNorm2d.
        act: "relu" or "none".

    Its children are ``conv`` and ``bn``. Input ``[N, in_channels, H, W]``, any floating dtype.

    Raises:
        ValueError: ``act`` is neither of the two.
    """

    _rf_state = FusedState(BlockSpec.of("conv", "bn"))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: str = "relu",
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self._set(conv, nn.BatchNorm2d(out_channels, eps, momentum), act)

    @classmethod
    def from_modules(cls, conv: nn.Module, bn: nn.Module, act: str = "relu") -> FusedConvBNReLU:
        """The module around an existing convolution and norm, which it shares.

        Raises:
            ValueError: ``act`` is neither "relu" nor "none".
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set(conv, bn, act)
        module.training = bn.training
        return module

    def _set(self, conv: nn.Module, bn: nn.Module, act: str) -> None:
        if act not in ACTS:
            raise ValueError(f"act: got {act!r}, need one of {ACTS}")
        self.conv, self.bn, self.act = conv, bn, act

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self._modules["conv"], self._modules["bn"]
        assert conv is not None and bn is not None
        free = guards.plain_tensor(x) and guards.watched() is None
        if not free or isinstance(live.read(self, self._rf_state.spec, None), str):
            y: Tensor = bn(conv(x))
            return F.relu(y) if self.act == "relu" else y
        x = _feature_map(x, [(conv, bn)], self._rf_state)  # type: ignore[list-item]
        return parts.step(x, conv, bn, self.act, None, self._rf_state.backend)  # type: ignore[arg-type]


def _feature_map(x: Tensor, pairs: list[live.Pair], state: FusedState) -> Tensor:
    data = [parts.read(conv, norm) for conv, norm in pairs]
    return x if None in data else parts.feature_map(x, data, state.turns())  # type: ignore[arg-type]


class FusedStem(FusedModule):
    """A model whose stem is computed by fused ops: convolution, norm and ReLU, once or (a deep stem) several times.

    The modules stay its own submodules, and its class's own methods run wherever the stem may not be bypassed.
    """

    _rf_whole = False  # whether all of it but the classifier may be one plan

    def _rf_parts(self) -> Iterable[nn.Module]:
        return [m for pair in self._rf_state.spec.pairs for keys in pair if (m := find(self, keys)) is not None]

    def _rf_run_stem(self, x: Tensor) -> Tensor:
        """relu(norm(conv(x))), for each pair of the stem."""
        pairs = self._rf_stem_pairs(x)
        if pairs is None:
            return self._rf_run_modules(x)
        x = _feature_map(x, pairs, self._rf_state)
        for conv, norm in pairs:
            x = parts.step(x, conv, norm, "relu", None, self._rf_state.backend)
        return x

    def _rf_planned(self, x: Any, names: Sequence[str]) -> Tensor | None:
        """The stem and then the modules of these names, flattened to ``[N, features]``, by one plan if any."""
        return network_plan.run(self, x, names)

    def _rf_run_features(self, x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        """The stem and then ``layers``, flattened to ``[N, features]``; large batches on the CPU depth first."""

        def features(part: Tensor) -> Tensor:
            part = self._rf_run_stem(part)
            for layer in layers:
                part = layer(part)
            return torch.flatten(part, 1)

        pairs = self._rf_stem_pairs(x)
        if pairs is None or any(parts.read(*pair) is None for pair in pairs):
            return features(x)
        return depth_first.run(features, x, pairs[0][0], layers)

    def _rf_stem_pairs(self, x: Any) -> list[live.Pair] | None:
        """The stem's convolutions and norms, or None when something of it may not be bypassed at the moment."""
        state = self._rf_state
        if not guards.plain_tensor(x) or guards.watched() is not None or x.dim() != 4:
            return None
        found = live.read(self, state.spec, state.matched)
        return None if isinstance(found, str) or parts.output_shape(x.shape, found.pairs[0][0]) is None else found.pairs

    def _rf_original(self, method: str) -> Callable[..., Any]:
        """That method of the class that the model had before it was fused, as it is now."""
        return functools.partial(getattr(type(self)._rf_original_class, method), self)  # type: ignore[attr-defined]

    def _rf_run_modules(self, x: Tensor) -> Tensor:
        spec = self._rf_state.spec
        for (conv, norm), act in zip(spec.pairs, spec.acts, strict=True):
            for keys in (conv, norm, act):
                x = find(self, keys)(x)  # type: ignore[misc]
        return x


def only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument that a forward was called with, or None where there are others, or it has a name."""
    return args[0] if len(args) == 1 and not kwargs else None
