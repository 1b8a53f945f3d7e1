"""Forked processes and threads: no lock that a child inherits, no answer from another's weights."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_networks import images, network
from torch import Tensor, nn

import resnet_fused as rf

pytestmark = [
    pytest.mark.waits,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

FORKS = 40
PATIENCE = 30.0  # seconds, for a child that needs milliseconds


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def exit_of(child: int) -> int | None:
    """The child's status; None, and no more child, where it does not end."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def forked(work: Callable[[], bool]) -> int | None:
    """Run ``work`` in a child; 0 where it returned True, None where it hung."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return exit_of(child)


@pytest.fixture
def busy() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Start threads that repeat something until the test is over."""
    stop, threads, raised = threading.Event(), [], []

    def start(step: Callable[[], object]) -> None:
        def repeat() -> None:
            torch.set_num_threads(1)
            try:
                while not stop.is_set():
                    step()
            except BaseException as error:
                raised.append(error)

        threads.append(threading.Thread(target=repeat, daemon=True))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not raised and not any(t.is_alive() for t in threads), raised


def written_and_read(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Keeps whatever is cached on the move: packed, dropped, packed again."""
    parameters = list(model.parameters())

    def step() -> None:
        for p in parameters:
            p.data.neg_()
        for _ in range(3):
            predict(model, x)
        rf.refresh(model)
        predict(model, x)

    return step


def test_a_child_of_a_busy_process_predicts(busy: Callable[[Callable[[], object]], None]) -> None:
    """Another thread is somewhere within the cache when the process forks."""
    model, other, x = rf.fuse(network("basic")), rf.fuse(network("bottleneck")), images(1, 8)
    wanted = [predict(model, x) for _ in range(3)][-1]
    busy(written_and_read(other, x))

    def work() -> bool:
        same = all(torch.allclose(predict(model, x), wanted, atol=1e-5) for _ in range(3))
        rf.refresh(model)
        rf.clear_workspace()
        return same and torch.allclose(predict(model, x), wanted, atol=1e-5)

    for at in range(FORKS):
        assert forked(work) == 0, f"None: hung; 1: another prediction; 2: raised. Child {at} of {FORKS}"


def test_a_child_fuses_and_writes_for_itself(busy: Callable[[Callable[[], object]], None]) -> None:
    """What the child writes does not reach its parent, nor the reverse."""
    eager, x = network("basic"), images(1, 8)
    model = rf.fuse(eager)
    wanted = [predict(model, x) for _ in range(3)][-1]
    busy(written_and_read(rf.fuse(network("bottleneck")), x))

    def work() -> bool:
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            one.data.mul_(0.9)
            other.data.mul_(0.9)
        new = rf.fuse(eager)
        return all(torch.allclose(predict(m, x), predict(eager, x), atol=1e-5) for m in (model, new) for _ in range(3))

    for _ in range(5):
        assert forked(work) == 0
    torch.testing.assert_close(predict(model, x), wanted)


def test_weights_shared_with_a_child() -> None:
    """The child trains what its parent predicts with, in shared memory."""
    eager = network("basic").share_memory()
    model, x = rf.fuse_(network("basic").share_memory()), images(1, 8)
    for _ in range(3):
        before = predict(model, x)

    def learn() -> bool:
        with torch.no_grad():
            for m in (model, eager):
                for p in m.parameters():
                    p.mul_(1.2)
        return True

    assert forked(learn) == 0
    assert not torch.allclose(predict(model, x), before)
    torch.testing.assert_close(predict(model, x), predict(eager, x))


@pytest.mark.parametrize("way", ["counted", "data", "storage"])
def test_many_threads_predict_while_one_writes(way: str) -> None:
    """Between barriers: after each write every thread sees it at its first prediction."""
    eager, x = network("bottleneck"), images(1, 8)
    model = rf.fuse(eager)
    count, rounds = 4, 12
    barrier, wanted = threading.Barrier(count + 1, timeout=PATIENCE), [predict(eager, x)]

    def write() -> None:
        for m in (eager, model):
            for p in m.parameters():
                factor = 0.8 if float(p.abs().max()) > 0.5 else 1.25
                if way == "counted":
                    with torch.no_grad():
                        p.mul_(factor)
                elif way == "data":
                    p.data.mul_(factor)
                else:
                    p.data = p.data * factor
        wanted[0] = predict(eager, x)

    def read() -> list[float]:
        torch.set_num_threads(1)
        found = []
        for _ in range(rounds):
            barrier.wait()
            for at in range(3):
                with torch.no_grad(), torch.inference_mode(at == 2):
                    found.append(float((model(x) - wanted[0]).abs().max()))
            barrier.wait()
        return found

    with ThreadPoolExecutor(count) as pool:
        readers = [pool.submit(read) for _ in range(count)]
        for _ in range(rounds):
            barrier.wait()
            barrier.wait()
            write()
        for reader in readers:
            assert max(reader.result()) < 1e-4


def test_threads_with_models_of_their_own() -> None:
    """Made, run and dropped at once in several threads; garbage is collected meanwhile."""
    x, models = images(1, 8), [network("basic") for _ in range(4)]
    wanted = predict(models[0], x)

    def own(at: int) -> bool:
        torch.set_num_threads(1)
        good = True
        for _ in range(10):
            fused = rf.fuse(models[at])
            good &= all(torch.allclose(predict(fused, x), wanted, atol=1e-5) for _ in range(3))
            gc.collect(0)
        return good

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(own, range(4)))
