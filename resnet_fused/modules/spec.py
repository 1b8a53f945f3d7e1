"""The places of a block's parts, as data: what an adapter knows about a class of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from resnet_fused.modules.matched import Matched

Path = tuple[str, ...]


def path(dotted: str) -> Path:
    """``"layer.0.convolution"`` as the keys to walk."""
    return tuple(dotted.split("."))


def find(module: nn.Module, keys: Path) -> nn.Module | None:
    """The submodule at ``keys``, or None where there is none."""
    found: Any = module
    for key in keys:
        found = found._modules.get(key)
        if found is None:
            return None
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BlockSpec:
    """A block that computes ``relu(norm_n(conv_n(… relu(norm_1(conv_1(x))) …)) + shortcut(x))``.

    pairs are the (convolution, norm) paths in the order of computation. acts are the paths of all ReLU modules that the
    forward uses, none where it calls the functional form. shortcut is the path of the projection, whose absence (None
    or an empty Sequential) means x itself. idle are modules that must be absent, or Identity, for this to hold.
    containers are the Sequentials that hold parts of it and are themselves called, with the number of their children;
    wrappers are such modules of other classes, which call their children and nothing else, with module path and name of
    the class. extras are, for each pair, the modules called on its result (a pool, a squeeze-excitation, a drop path),
    behind the ReLU, or behind the last pair before the sum; where any is there and no Identity, the block is fused
    pair by pair around them.
    optional is how the forward asks whether there is a shortcut: "is not None", "truth" (``if self.downsample:``), or
    "" where it calls it unasked. adds is how the sum is written where the shortcut is called behind the pairs: "+="
    into the last norm's result, or "+"; "" where it is called before them, or where that is not known.

    A stem has pairs alone, each followed by a ReLU, and either as many acts or none.
    """

    pairs: tuple[tuple[Path, Path], ...]
    acts: tuple[Path, ...] = ()
    shortcut: Path | None = None
    idle: tuple[Path, ...] = ()
    containers: tuple[tuple[Path, int], ...] = ()
    wrappers: tuple[tuple[Path, tuple[str, str]], ...] = ()
    extras: tuple[tuple[Path, ...], ...] = ()
    optional: str = "is not None"
    adds: str = ""

    children: tuple[tuple[Path, tuple[str, ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """children: which submodules the forward reads, by the module that it reads them from."""
        found: dict[Path, dict[str, None]] = {}
        paths = [*(keys for both in self.pairs for keys in both), *self.acts, *self.idle]
        paths += [keys for paths in self.extras for keys in paths] + [keys for keys, _ in self.containers]
        for keys in [*paths, *([] if self.shortcut is None else [self.shortcut])]:
            for i, key in enumerate(keys):
                found.setdefault(keys[:i], {})[key] = None
        object.__setattr__(self, "children", tuple((owner, tuple(names)) for owner, names in found.items()))

    @classmethod
    def of(cls, convs: str, norms: str, acts: str = "", shortcut: str | None = None, idle: str = "") -> BlockSpec:
        """From blank-separated dotted paths: ``BlockSpec.of("conv1 conv2", "bn1 bn2", "relu", "downsample")``."""
        pairs = tuple((path(c), path(n)) for c, n in zip(convs.split(), norms.split(), strict=True))
        return cls(
            pairs,
            tuple(map(path, acts.split())),
            None if shortcut is None else path(shortcut),
            tuple(map(path, idle.split())),
        )


def extended(
    spec: BlockSpec,
    *,
    extras: tuple[str, ...] = (),
    containers: tuple[tuple[str, int], ...] = (),
    wrappers: tuple[tuple[str, tuple[str, str]], ...] = (),
    optional: str = "is not None",
    adds: str = "",
) -> BlockSpec:
    """``spec`` with these fields, from dotted paths; an entry of ``extras`` has them blank-separated."""
    return replace(
        spec,
        optional=optional,
        adds=adds,
        extras=tuple(tuple(map(path, entry.split())) for entry in extras),
        containers=tuple((path(dotted), length) for dotted, length in containers),
        wrappers=tuple((path(dotted), name) for dotted, name in wrappers),
    )


BASIC_BLOCK = extended(BlockSpec.of("conv1 conv2", "bn1 bn2", "relu", "downsample"), adds="+=")
BOTTLENECK = extended(BlockSpec.of("conv1 conv2 conv3", "bn1 bn2 bn3", "relu", "downsample"), adds="+=")


class Prepared:
    """What was prepared for one module, filled by ``network_plan``: a copy or a pickle of it is empty."""

    network: Any = None
    failures = 0  # in a row
    wait = 0  # calls until the next attempt

    def drop(self) -> None:
        self.network = None

    def __deepcopy__(self, memo: Any) -> Prepared:
        return Prepared()

    def __reduce__(self) -> Any:
        return Prepared, ()


@dataclass(frozen=True)
class FusedState:
    """The state of a fused module besides its parameters: no tensor, nothing derived from one.

    recompute is what training computes again in the backward pass instead of keeping it: None, "activations" or
    "last_conv". channels_last: whether feature maps become that where norms use given statistics (parts.feature_map).
    matched are the functions of the class that spec was read from, None where the class is ours. cuda_graph: whether
    the plan of a whole network is replayed from a CUDA graph. dropouts are those of the whole model: while one of them
    draws, feature maps keep the model's own format, since random numbers are drawn in the order of memory. prepared is
    what ``network_plan`` made for this module; no copy has it.
    """

    spec: BlockSpec
    backend: str = "auto"
    recompute: str | None = None
    channels_last: bool = True
    matched: Matched | None = None
    cuda_graph: bool = False
    dropouts: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    prepared: Prepared = field(init=False, default_factory=Prepared, repr=False, compare=False)

    def draws(self) -> bool:
        """Whether a dropout of the model is active."""
        return any(module.training for module in self.dropouts)

    def turns(self) -> bool:
        """Whether feature maps become channels_last now."""
        return self.channels_last and not self.draws()
