"""A device as two rates, and the time that it cannot go below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Device:
    """What a device sustains: ``flops_per_s`` by dtype (matrix products), ``bytes_per_s`` of its main memory."""

    name: str
    flops_per_s: Mapping[torch.dtype, float]
    bytes_per_s: float

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s in ``dtype``; ValueError where it is not known."""
        if dtype not in self.flops_per_s:
            known = ", ".join(map(str, self.flops_per_s)) or "none"
            raise ValueError(f"dtype: got {dtype}, need one whose rate on {self.name} is known ({known})")
        return self.flops_per_s[dtype]


# Measured: a large matrix product, a large copy.
H200 = Device("NVIDIA H200", MappingProxyType({torch.bfloat16: 790e12}), 4.3e12)


@dataclass(frozen=True)
class Bound:
    """The least time of some passes on a device.

    memory_s: all bytes at full bandwidth. arithmetic_s: all FLOPs at the full rate. seconds: the passes one after
    another, each taking the greater of its own two times; never below either of the others.
    """

    memory_s: float
    arithmetic_s: float
    seconds: float
    batch: int

    @property
    def images_per_s(self) -> float:
        """Images per second at ``seconds``; infinite where nothing is moved or computed."""
        return self.batch / self.seconds if self.seconds else float("inf")
