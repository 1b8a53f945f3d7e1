"""What each process of test_distributed.py runs: fused and eager networks train, then are compared.

python tests/distributed_worker.py RANK WORLD FILE

It prints "ok CASE" for each case that holds, and a traceback for each that does not.
"""

from __future__ import annotations

import copy
import sys
import traceback
from typing import Any

import optional
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import resnet_fused as rf

tv = optional.torchvision().models.resnet
STEPS = 3
CASES = ("ddp", "ddp+activations", "sync", "sync+last_conv", "fsdp", "fsdp+last_conv")
Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return tv.ResNet(tv.Bottleneck, [2, 1, 1, 1], num_classes=5, width_per_group=8)  # type: ignore[no-any-return]


def batches(rank: int) -> list[Batch]:
    """Other images on each process, and of another spread: the statistics of one are not those of all."""
    generator = torch.Generator().manual_seed(rank)
    images = [torch.randn(4, 3, 32, 32, generator=generator) * (rank + 1) + rank for _ in range(STEPS)]
    return [(x, torch.arange(4) + rank) for x in images]


def train(model: nn.Module, data: list[Batch]) -> dict[str, Tensor]:
    """Gradients of the last step, and all parameters and buffers, by their names in the plain model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    dtype = next(model.parameters()).dtype
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
    found = {f"grad {name}": value.grad for name, value in model.named_parameters()} | model.state_dict()
    return {name.replace("module.", ""): full(value) for name, value in found.items()}


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")


def everyones(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found


def ddp(rank: int, recompute: str | None) -> None:
    """Each process has its own statistics, as eager's."""
    model = network()
    fused = rf.fuse(model, recompute=recompute, memory_format=torch.preserve_format, strict=True)
    ours = train(DistributedDataParallel(fused, broadcast_buffers=False), batches(rank))
    same(ours, train(DistributedDataParallel(copy.deepcopy(model), broadcast_buffers=False), batches(rank)))
    first, second = everyones(ours["layer1.0.bn1.running_mean"])
    assert not torch.equal(first, second)


def sync(rank: int, recompute: str | None) -> None:
    """All processes have the same statistics: those of eager batch norm on all their images in one process."""
    model = network().double()
    fused = DistributedDataParallel(rf.fuse(model, recompute=recompute, strict=True))
    nn.SyncBatchNorm.convert_sync_batchnorm(fused.module)  # only now: DistributedDataParallel takes none on a CPU
    assert type(fused.module.layer1[0].bn1) is nn.SyncBatchNorm and rf.is_fused(fused.module)
    ours = train(fused, batches(rank))
    whole = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(batches(0), batches(1), strict=True)]
    same(ours, train(model, whole))  # type: ignore[arg-type]
    first, second = everyones(ours["layer1.0.bn1.running_mean"])
    assert torch.equal(first, second)


def fsdp(rank: int, recompute: str | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network()
    fused = rf.fuse(model, recompute=recompute, memory_format=torch.preserve_format, strict=True)
    results = []
    for candidate in (fused, copy.deepcopy(model)):
        blocks = [m for m in candidate.modules() if isinstance(m, tv.Bottleneck)]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(candidate, mesh=mesh)
        assert len(blocks) == 5 and isinstance(candidate.layer1[0].conv1.weight, DTensor)
        results.append(train(candidate, batches(rank)))
    same(*results)


def main() -> None:
    rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for case in CASES:
        kind, _, recompute = case.partition("+")
        try:
            {"ddp": ddp, "sync": sync, "fsdp": fsdp}[kind](rank, recompute or None)
            print(f"ok {case}", flush=True)
        except Exception:
            print(f"{case}: {traceback.format_exc()}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
