"""The processes of one run: a single one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.training.errors import TrainingError


@dataclass(frozen=True)
class World:
    """This process's place among all: every collective below is the identity in a world of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every process, by rank, in every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The picklable ``value`` of the first process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


def launched() -> World:
    """The world that torchrun describes in the environment, of one process where it does not."""
    try:
        rank, size, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    except ValueError:
        raise TrainingError("RANK, WORLD_SIZE and LOCAL_RANK must be integers, as torchrun sets them") from None
    return World(rank, size, local)


@contextmanager
def connected(world: World, device: torch.device) -> Iterator[None]:
    """The process group of ``world`` while the body runs: NCCL between CUDA devices, else gloo."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
