"""What is derived from tensors: kept while they are what they were, dropped when they are not, and with them."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.ops import fingerprint, packed
from resnet_fused.ops.fingerprint import Fingerprint, Glance, Watch
from resnet_fused.ops.tensor_cache import CACHE, TensorCache

FUNCTIONS = {
    "python": (fingerprint._fingerprint, fingerprint._first_changed, fingerprint._glance),
    "library": fingerprint._functions(),
}


@pytest.fixture(params=FUNCTIONS)
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled library's functions, or those that stand in for it."""
    chosen = FUNCTIONS[request.param]
    monkeypatch.setattr(fingerprint, "_functions", lambda: chosen)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (32, 16, 3, 3))))


def add_through_data(w: Tensor) -> None:
    w.data.add_(1)


def add_through_numpy(w: Tensor) -> None:
    w.detach().numpy()[...] += 1


def copy_into_storage(w: Tensor) -> None:
    w.untyped_storage().copy_((w.detach() + 1).untyped_storage())


def replace_data(w: Tensor) -> None:
    w.data = w.data + 1


def other_strides(w: Tensor) -> None:
    layout = torch.contiguous_format if w.is_contiguous(memory_format=torch.channels_last) else torch.channels_last
    w.data = w.data.as_strided(w.shape, torch.empty_like(w, memory_format=layout).stride())


def fewer_rows(w: Tensor) -> None:
    w.data = w.data[:16]


def fused_step(w: nn.Parameter) -> None:
    w.grad = torch.full_like(w, 1e-30)  # too little to change an element
    torch.optim.SGD([w], 1.0, fused=True).step()


def counted(w: Tensor) -> None:
    with torch.no_grad():
        w.mul_(1)  # the values stay


def counted_alias(w: Tensor) -> None:
    w.detach().mul_(1)


def counted_in_inference_mode(w: Tensor) -> None:
    with torch.inference_mode():
        w.mul_(1)


WRITES = [
    add_through_data, add_through_numpy, copy_into_storage, replace_data, other_strides, fewer_rows, fused_step,
    counted, counted_alias, counted_in_inference_mode,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_every_write_to_a_tensor_is_seen_at_once(write: Callable[[nn.Parameter], None], functions: None) -> None:
    w, vector = weight(), torch.ones(32)
    for kept in (w, nn.Parameter(w.detach().clone().contiguous(memory_format=torch.channels_last))):
        assert CACHE.get("kind", (kept, None, vector), 1, lambda: "old") == "old"
        assert CACHE.get("kind", (kept, None, vector), 1, lambda: "new") == "old"
        write(kept)
        assert CACHE.get("kind", (kept, None, vector), 1, lambda: "new") == "new"
        assert CACHE.get("kind", (kept, None, vector), 1, lambda: "newer") == "new"


def test_what_decides_a_value_beside_the_tensors_is_part_of_its_name() -> None:
    w, v = weight(), torch.ones(4)
    assert CACHE.get("kind", (w, v, None), 1, lambda: "first") == "first"
    for kind, tensors, extra in (("other", (w, v, None), 1), ("kind", (w, None, v), 1), ("kind", (w, v, None), 2)):
        assert CACHE.find(kind, tensors, extra) is None
    assert CACHE.find("kind", (w.detach(), v, None), 1) == "first"  # the same memory, under another name


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 5000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_element_is_found_after_some_calls(size: int, dtype: torch.dtype, functions: None) -> None:
    tensor = torch.zeros(size, dtype=dtype)
    watch = Watch([tensor])
    lines = -(-size * tensor.element_size() // 64)
    assert all(watch.unchanged() for _ in range(lines))
    tensor.view(torch.uint8).numpy()[-1] = 1  # the last byte
    assert not all(watch.unchanged() for _ in range(lines))


@pytest.mark.parametrize("size", [1, 16, 100, 70_000])
def test_both_hashes_are_one(size: int) -> None:
    tensor = torch.randn(size)
    lines = -(-4 * size // 64)
    hashes = [torch.empty(lines, dtype=torch.int32) for _ in FUNCTIONS]
    for (make, *_), out in zip(FUNCTIONS.values(), hashes, strict=True):
        make(tensor.data_ptr(), 4 * size, out.data_ptr())
    assert torch.equal(*hashes)
    line = bytes(tensor[:16].view(torch.uint8).tolist())
    assert fingerprint._hash(line) == int(hashes[0][0]) & 0xFFFFFFFF


def test_fingerprints_are_shared_by_what_is_alike_and_by_nothing_else() -> None:
    w = weight()
    first, second = Watch([w]), Watch([w.detach()])
    assert first._prints[0] is second._prints[0]
    w.data.add_(1)
    third = Watch([w])
    assert third._prints[0] is not first._prints[0]
    assert third.unchanged() and not first.unchanged()
    assert isinstance(third._prints[0], Fingerprint)


def test_weights_settle_when_they_stay(functions: None) -> None:
    cache, w = TensorCache(), weight()
    assert not cache.settled((w,)) and cache.settled((w,)) and cache.settled((w,))
    for write in (add_through_data, counted):
        write(w)
        assert not cache.settled((w,)) and cache.settled((w,))
    assert not any(cache.settled((weight(),)) for _ in range(3))
    assert Glance([w])._look() != Glance([weight()])._look()


def test_inference_tensors_are_looked_at() -> None:
    with torch.inference_mode():
        w = torch.randn(64, 64)
        assert CACHE.get("kind", (w,), None, lambda: "old") == "old"
        assert CACHE.find("kind", (w,)) == "old"
        w.mul_(2)
        assert CACHE.find("kind", (w,)) is None


def test_a_cast_made_in_inference_mode_serves_gradients() -> None:
    w = weight().requires_grad_(False)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    statistics = torch.zeros(32), torch.ones(32)

    def run() -> Tensor:
        return rf.conv_bn_act(x, w, None, None, *statistics, padding=1)

    for _ in range(2):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            run()
        with torch.autocast("cpu", torch.bfloat16):
            run().float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_tensors_of_other_classes_are_not_kept() -> None:
    class Other(Tensor):
        pass

    other = torch.randn(4).as_subclass(Other)
    assert CACHE.get("kind", (other,), None, lambda: 1) == 1 and CACHE.find("kind", (other,)) is None
    assert not CACHE.settled((other,)) and not CACHE.settled((other,))


def test_an_optimizer_drops_what_comes_from_its_parameters_alone() -> None:
    mine, theirs = weight(), weight()
    for w in (mine, theirs):
        CACHE.get("kind", (w,), None, lambda: "old")
    fused_step(mine)
    assert CACHE.find("kind", (mine,)) is None and CACHE.find("kind", (theirs,)) == "old"


def test_entries_die_with_their_storages_and_hold_nothing() -> None:
    cache, w = TensorCache(), weight()
    storage, parameter = weakref.ref(w.untyped_storage()), weakref.ref(w)
    cache.get("kind", (w, torch.ones(2)), None, lambda: "value")  # the vector dies at once
    assert len(cache) == 0
    vector = torch.ones(2)
    cache.get("kind", (w, vector), None, lambda: "value")
    assert cache.find("kind", (w, vector)) == "value"
    del w
    gc.collect()
    assert storage() is None and parameter() is None
    assert len(cache) == 0 and set(cache._keys) == {id(vector.untyped_storage())}
    del vector
    assert not cache._keys


def test_tensors_can_be_swapped() -> None:
    w, other = weight(), weight()
    CACHE.get("kind", (w,), None, lambda: "old")
    torch.utils.swap_tensors(w, other)
    assert CACHE.find("kind", (w,)) is None and CACHE.find("kind", (other,)) == "old"


def test_length_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused.ops import tensor_cache

    monkeypatch.setattr(tensor_cache, "MOST_ENTRIES", 10)
    cache, w = TensorCache(), weight()
    for i in range(100):
        cache.get("kind", (w,), i, lambda i=i: i)  # type: ignore[misc]
    assert len(cache) == 10 and cache.find("kind", (w,), 99) == 99 and cache.find("kind", (w,), 0) is None
    assert len(cache._keys[id(w.untyped_storage())][1]) == 10


def test_nothing_waits_for_a_lock_in_a_forked_child() -> None:
    """Threads use the cache all the time; a child forked at any moment can too."""
    cache, w, stop = TensorCache(), weight(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            cache.get("kind", (w,), None, lambda: 1)
            cache.drop((w,))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                cache.get("kind", (w,), None, lambda: 1)
                cache.clear()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for t in threads:
            t.join()


def test_threads_fill_and_empty_it_together() -> None:
    cache = TensorCache()
    tensors = [torch.empty(1) for _ in range(1000)]
    failed: list[BaseException] = []

    def attempt(work: Callable[[], object]) -> None:
        try:
            for _ in range(8):
                work()
        except BaseException as error:
            failed.append(error)

    def fill() -> None:
        for t in tensors:
            cache.get("kind", (t,), None, lambda: 1)
        cache.clear()

    def drop() -> None:
        for t in tensors[:40]:
            cache.drop((t,))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=attempt, args=(work,)) for work in (fill, fill, drop, drop)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed, failed


@pytest.mark.waits
def test_packing_waits_for_the_second_look_unless_told_otherwise() -> None:
    w = weight()
    with packed.at_once():
        assert packed.settled((w,))
    assert not packed.settled((w,)) and packed.settled((w,))
