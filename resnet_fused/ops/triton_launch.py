"""A launch of a Triton kernel as data, and the short way to repeat it.

``kernel[grid](...)`` binds its arguments, specialises on them, looks the compiled kernel up and encodes tensor
descriptors, at each call anew: on the host that takes longer than many kernels take on the device. What it finds
depends on the arguments alone. So a launch whose arguments stay is bound once, by Triton's own code, down to the
arguments of the C function that launches; to repeat it is to call that function.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from resnet_fused import backends

# Launches on the CUDA stream of this handle, on the current device. A plan hands its values to each of its steps.
Bound = Callable[..., Any]


class Launch(NamedTuple):
    """``kernel[grid](*args, **constants)``, which is what calling it does."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants)

    def bind(self) -> Bound:
        """The launch with its tensors' addresses as they are now; it keeps none of the tensors."""
        return _bind(self)

    def tensors(self) -> list[Tensor]:
        """All that it reads and writes."""
        found = [getattr(arg, "base", arg) if type(arg).__name__ == "TensorDescriptor" else arg for arg in self.args]
        return [arg for arg in found if isinstance(arg, Tensor)]


def watched() -> bool:
    """Whether somebody wants to be told of each launch, as Triton's profiler does; a bound launch tells nobody."""
    if "triton" not in sys.modules:
        return False
    hooks = _hooks()
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


def _bind(launch: Launch) -> Bound:
    if backends.interpreting() or launch.kernel.pre_run_hooks:
        return lambda stream, values=None: launch()
    kernel, grid, args, constants = launch
    compiled = kernel.run(*args, grid=grid, warmup=True, **constants)
    values = tuple(_signature(kernel).bind(*args, **_parameters(kernel, constants)).arguments.values())
    x, y, z = (*grid, 1, 1)[:3]
    launcher, base = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
    found = _recorded(launcher, compiled, (x, y, z, 0, *base, *values))
    function, rest = found or (launcher, (*base, *_addresses(values)))
    # compiled: the function is unloaded with it
    return lambda stream, values=None, compiled=compiled: function(x, y, z, stream, *rest)


def _recorded(launcher: Any, compiled: Any, call: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]] | None:
    """The C function that ``launcher(*call)`` ends in, and what it gives it behind grid and stream.

    None where that is not all that it does: it allocates scratch memory, say, or is no launcher of NVIDIA devices.
    """
    from triton.backends.nvidia import driver

    if not isinstance(launcher, driver.CudaLauncher) or getattr(launcher, "gsan_enabled", False):
        return None
    function = _beneath(launcher.launch)
    if function is None or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    recorded: list[tuple[Any, ...]] = []
    signature = dict(compiled.src.signature.items())
    meta = getattr(compiled.metadata, "tensordesc_meta", None)
    double = copy.copy(launcher)
    double.launch = driver.wrap_handle_tensordesc(lambda *args: recorded.append(args), signature, meta)
    double(*call)
    return function, _addresses(recorded[0][4:])


def _beneath(launch: Any) -> Any:
    """The C function under the wrapper that encodes descriptors, or ``launch`` itself where it has none."""
    code = getattr(launch, "__code__", None)
    if code is None:
        return launch
    if "launcher" not in code.co_freevars:
        return None
    return launch.__closure__[code.co_freevars.index("launcher")].cell_contents


def _addresses(values: Any) -> tuple[Any, ...]:
    """``values`` with tensors as addresses, which the launcher takes unasked; lists and tuples in it likewise."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
            value = _addresses(value)
        found.append(value)
    return tuple(found)


@functools.cache
def _hooks() -> Any:
    from triton import knobs

    return knobs.runtime


@functools.cache
def _signature(kernel: Any) -> inspect.Signature:
    return inspect.signature(kernel.fn)


def _parameters(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """What of ``constants`` are the kernel's own parameters, and no options of the compiler."""
    return {name: value for name, value in constants.items() if name in _signature(kernel).parameters}
