"""A stand-in for Triton's GPU driver: on a machine without a GPU launches take their real path, up to the GPU itself.

What a call would compile on a device of that compute capability is compiled, specialised by the arguments as they are;
the launch then does nothing. So tensors may be on the meta device, and of any size. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Binary:
    """What the compiler made of one kernel. spills counts the instructions that use local memory."""

    name: str
    capability: int
    registers: int
    shared: int
    stack: int
    spills: int
    ptx: str = ""

    def faults(self) -> list[str]:
        """Spills, and more stack than this version of Triton takes without them."""
        found = [f"{self.spills} spills"] if self.spills else []
        if self.stack > stack_budget():
            found.append(f"{self.stack} bytes of stack")
        return found


def stack_budget() -> int:
    """Bytes of stack that this version of Triton takes in some kernels that do not spill."""
    import triton

    return 8 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0


@contextlib.contextmanager
def launches(capability: int, shared_limit: int) -> Iterator[list[Binary]]:
    """A device of this compute capability (90 for 9.0), with so much shared memory to a block; gives what is launched.

    A launch raises what Triton raises: its kernel does not compile, or takes more shared memory than there is.
    """
    import triton
    from triton.runtime.driver import driver

    launched: list[Binary] = []
    before, hooks = driver._active, triton.knobs.runtime.kernel_load_end_hook
    driver.set_active(_Driver(capability, shared_limit, launched))
    hooks.add(_read_ptx)
    try:
        yield launched
    finally:
        hooks.remove(_read_ptx)
        driver._active = before


def _read_ptx(module: Any, binary: Binary, name: str, files: dict[str, str], hash: str) -> None:
    binary.ptx = next(Path(path) for path in files.values() if str(path).endswith(".ptx")).read_text()


class _Driver:
    """The part of Triton's drivers that compiling and launching use.

    The capability is the number of the device too: a kernel keeps what it compiled by device.
    """

    def __init__(self, capability: int, shared_limit: int, launched: list[Binary]) -> None:
        self._capability, self._shared_limit, self._launched = capability, shared_limit, launched
        self.utils = self

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared_limit}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Binary, int, int, int]:
        usage = _resource_usage(cubin)
        spills = _count_spills(cubin) if usage["STACK"] or usage["LOCAL"] else 0
        binary = Binary(name, self._capability, usage["REG"], shared, usage["STACK"], spills)
        return object(), binary, binary.registers, spills, 1024

    def launched(self, binary: Binary) -> None:
        self._launched.append(binary)

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return _launch


def _launch(x: int, y: int, z: int, stream: int, binary: Binary, *rest: Any) -> None:
    """Kernels keep what launches them: it asks for the driver of the moment."""
    from triton.runtime.driver import driver

    driver.active.launched(binary)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the one kernel in a cubin."""
    line = next(line for line in _cuobjdump(cubin, "-res-usage").splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def _count_spills(cubin: bytes) -> int:
    """Instructions that load from local memory or store there."""
    return len(re.findall(r"\b(?:LDL|STL)\b", _cuobjdump(cubin, "-sass")))


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What the cuobjdump in Triton's wheel prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
