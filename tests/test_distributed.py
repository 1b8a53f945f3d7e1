"""Two gloo processes on the CPU: DistributedDataParallel, SyncBatchNorm, FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the two processes printed; all cases in one pair of processes, since starting them is most of the time."""
    meeting = tmp_path_factory.mktemp("gloo") / "meeting"
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[1]), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), "2", meeting],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("case", ["ddp", "ddp+activations", "sync", "sync+last_conv", "fsdp", "fsdp+last_conv"])
def test_two_processes_train_as_eager_does(case: str, said: list[str]) -> None:
    for text in said:
        assert f"ok {case}\n" in text, text
