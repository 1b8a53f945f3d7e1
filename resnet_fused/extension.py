"""The compiled library beside this package: found and loaded on first use, never by ``import resnet_fused``.

There are two files. ``libresnet_fused.so`` holds the kernels and needs libtorch alone; ``_C`` is the Python module that
loads it and describes its contents.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_LIBRARY = Path(__file__).parent / "libresnet_fused.so"
_BUILD = "build it with 'make ext' in a checkout, or with 'pip install --no-build-isolation' beside torch"


def library_path() -> str:
    """The path of ``libresnet_fused.so``, which a C++ program loads to run exported fused models.

    Once loaded (``dlopen``, or linking to it) ``resnet_fused::conv_bn_act``, ``add_relu``, ``basic_block`` and
    ``bottleneck`` are registered with the dispatcher, without Python. In Python the package has registered these
    ops already, and they stay; the function loads the library too, so that loading it later is no error.

    Raises:
        FileNotFoundError: the library has not been built; the message says how to.
    """
    if not _LIBRARY.exists():
        raise FileNotFoundError(f"no compiled library at {_LIBRARY}: {_BUILD}")
    _load()
    return str(_LIBRARY)


@functools.cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    if not _LIBRARY.exists():
        return f"the compiled library is not built; {_BUILD}"
    if importlib.util.find_spec("resnet_fused._C") is None:
        return f"the compiled library was built for another Python; {_BUILD}"
    try:
        return importlib.import_module("resnet_fused._C")
    except ImportError as error:
        return (
            f"the compiled library does not load beside torch {torch.__version__} ({error}); it needs torch 2.11 or "
            f"newer of the same C++ ABI: {_BUILD}"
        )


def missing(cuda: bool = False) -> str | None:
    """Why the compiled library, or its CUDA kernels, are missing; None when they are present."""
    module = _load()
    if isinstance(module, str):
        return module
    facts = module.build_info()
    if cuda and not facts["cuda"]:
        return f"the compiled library was built without {facts['left_out']}; {_BUILD}"
    return None


def module() -> Any:
    """The Python module of the compiled library.

    Raises:
        RuntimeError: it is missing; the message says why and what to do.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded
