"""Triton's own launcher on a machine without a GPU, over a driver that writes down what it is asked (stand_in_cuda.c).

Kernels are compiled for compute capability 9.0 and loaded as on a GPU, descriptors encoded, arguments taken apart by
Triton's C code; only what the driver would do is left out. Tensors lie on the CPU: nothing reads or writes them. It is
for a process of its own, since what is loaded as libcuda.so.1 stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

CAPABILITY = 90
GPU = torch.device("cuda", 0)


class StandIn:
    """The stand-in for libcuda.so.1, in this process from now on."""

    def __init__(self) -> None:
        import triton
        from triton.runtime.driver import driver

        folder = Path(tempfile.mkdtemp(prefix="stand-in-cuda-"))
        headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        path = folder / "libcuda.so.1"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(
            [os.environ.get("CC", "gcc"), "-O2", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1",
             str(source), "-o", str(path)],
            check=True,
        )  # fmt: skip
        self._library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        self._library.stand_in_launches.restype = ctypes.c_longlong
        self._library.stand_in_log_size.restype = ctypes.c_size_t
        self._library.stand_in_log_data.restype = ctypes.c_void_p
        triton.knobs.nvidia.libcuda_path = str(folder)
        driver.set_active(self._driver())
        triton.knobs.runtime.kernel_load_end_hook.add(self._loaded)

    def launches(self) -> int:
        """How many launches the driver has taken."""
        return int(self._library.stand_in_launches())

    def record(self, run: Any) -> bytes:
        """All that the driver is given while ``run()`` runs: functions, grids, streams, and every parameter."""
        self._library.stand_in_log(1)
        try:
            run()
        finally:
            size = self._library.stand_in_log_size()
            found = ctypes.string_at(self._library.stand_in_log_data(), size) if size else b""
            self._library.stand_in_log(0)
        return found

    def _driver(self) -> Any:
        from triton.backends.nvidia.driver import CudaDriver

        found = CudaDriver()
        found.get_current_device = lambda: 0
        found.get_current_stream = lambda device: 0
        found.get_device_capability = lambda device: divmod(CAPABILITY, 10)
        return found

    def _loaded(self, module: Any, function: int, name: str, files: dict[str, str], hash: str) -> None:
        """Tell the driver how large the function's parameters are, as its PTX has them."""
        ptx = next(Path(path) for path in files.values() if str(path).endswith(".ptx")).read_text()
        entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
        assert entry is not None
        sizes = []
        for line in entry.group(1).split(","):
            found = re.search(r"\.(?:align \d+ )?\.?b8 \w+\[(\d+)\]|\.param \.[a-z](\d+)", line)
            assert found is not None, line
            sizes.append(int(found.group(1)) if found.group(1) else int(found.group(2)) // 8)
        self._library.stand_in_parameters(ctypes.c_void_p(function), len(sizes), (ctypes.c_size_t * len(sizes))(*sizes))


class _Properties:
    """Of an H100."""

    name, major, minor, multi_processor_count = "a stand-in", *divmod(CAPABILITY, 10), 132


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Every tensor of the CPU says that it is on the stand-in, where Triton is the one backend that fuses."""
    from resnet_fused import backends
    from resnet_fused.ops.conv_bn_act import triton_config

    def here(make: Any) -> Any:
        return lambda *args, device=None, **options: make(*args, device=None if device == GPU else device, **options)

    present = functools.cache(lambda name: None if name in ("reference", "triton") else "it is not on the stand-in")
    told = {
        "current_device": lambda: 0, "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False, "get_device_properties": lambda device: _Properties,
        "get_device_capability": lambda device=None: (_Properties.major, _Properties.minor),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in told.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True))
        for name in ("empty", "empty_strided"):
            stack.enter_context(mock.patch.object(torch, name, here(getattr(torch, name))))
        stack.enter_context(mock.patch.object(backends, "_unavailable", present))
        stack.enter_context(
            mock.patch.object(Tensor, "device", property(lambda self: torch.device("meta") if self.is_meta else GPU))
        )
        stack.enter_context(mock.patch.object(Tensor, "is_cuda", property(lambda self: not self.is_meta)))
        triton_config.architecture.cache_clear()
        stack.callback(triton_config.architecture.cache_clear)
        yield
