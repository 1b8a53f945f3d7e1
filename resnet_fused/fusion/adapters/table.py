"""The rows of the adapters' tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from resnet_fused.modules.block import FusedBlock
from resnet_fused.modules.blocks import FusedBasicBlock, FusedBottleneck
from resnet_fused.modules.conv_bn_relu import FusedStem
from resnet_fused.modules.matched import Global
from resnet_fused.modules.spec import BlockSpec

KINDS: dict[str, type[FusedBlock]] = {"basic_block": FusedBasicBlock, "bottleneck": FusedBottleneck}


def _always(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class BlockAdapter:
    """A class of blocks: which kind it is (a key of ``KINDS``), where its parts are, and why one cannot be fused.

    names are functions that the forward has by global names, and methods those of the class that it relies on. Where
    blocks of a class have several shapes, its table names a function from the block to its adapter.
    """

    kind: str
    spec: BlockSpec
    refusal: Callable[[nn.Module], str | None] = _always
    methods: tuple[str, ...] = ("forward",)
    names: tuple[Global, ...] = ()


@dataclass(frozen=True)
class StemAdapter:
    """A class of models with a stem.

    fused overrides the method that runs the stem; methods are those of the class that it relies on; refusal says why a
    given model's stem cannot be fused, or None. Where a class has stems of several shapes, its table names a function
    from the model to its adapter.
    """

    spec: BlockSpec
    fused: type[FusedStem]
    methods: tuple[str, ...]
    refusal: Callable[[nn.Module], str | None] = _always
