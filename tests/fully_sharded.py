"""A process of test_tools.py: fused and eager, each sharded by FSDP2 over one process, side by side."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_networks import blocks_of, images, network
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import resnet_fused as rf


def main(meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    eager = network("basic")
    models = [rf.fuse(eager), eager]
    for model in models:
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.AdamW(model.parameters(), 0.01) for model in models]
    x, y = images(4, 8), torch.tensor([1, 2, 3, 4])

    def compare() -> None:
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            for _ in range(2):
                with mode():
                    ours, theirs = (model(x) for model in models)
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    compare()
    for _ in range(3):  # norms stay frozen
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(ours.grad.to_local(), theirs.grad.to_local(), rtol=1e-2, atol=1e-4)
            ours.grad = theirs.grad.clone()  # so that the optimizers do the same
        for optimizer in optimizers:
            optimizer.step()
        compare()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
