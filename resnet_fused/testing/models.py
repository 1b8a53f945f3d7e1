"""Models by name, for the command line, tests and benchmarks: ours, torchvision's, timm's, or any callable's."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

BUILDERS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
)
CIFAR_BUILDERS = BUILDERS[-5:]
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)?")  # timm's names may have one tag behind a dot
FORMS = "a builder (resnet50), torchvision:NAME, timm:NAME or package.module:callable"


class ModelError(ValueError):
    """No model can be made from this specification; the message says why, and what would do."""


def load(spec: str, *, registered: bool = False) -> nn.Module:
    """The model that ``spec`` names, in eval mode, with its builder's own random weights (nothing is downloaded).

    Args:
        spec: one of our builders (``resnet50``), ``torchvision:NAME``, ``timm:NAME``, or
            ``package.module:callable``: a callable without arguments that returns a module, or a module.
        registered: refuse the last form, and whatever is no plain name that its package itself has registered. For
            names that do not come from the user but from a file: nothing is imported or downloaded that it chooses.

    Raises:
        ModelError: the form or the name is unknown, a package is missing, or the callable fails.
    """
    source, separator, name = spec.partition(":")
    if not separator:
        return _ours(spec).eval()
    if not source or not name:
        raise ModelError(f"model {spec!r}: need {FORMS}")
    if registered and (source not in ("torchvision", "timm") or not _PLAIN.fullmatch(name) or "__" in name):
        raise ModelError(f"model {spec[:200]!r}: a file may name one of our builders, torchvision:NAME or timm:NAME")
    if source == "torchvision":
        return _torchvision(name, registered).eval()
    if source == "timm":
        return _timm(name, registered).eval()
    return _imported(source, name).eval()


def input_shape(spec: str, model: nn.Module) -> tuple[int, int]:
    """(channels, image size) that ``model`` is commonly fed: its configuration's, else its first convolution's at 224.

    Our CIFAR-style builders take 32.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        channels, size = config["input_size"][:2]
        return int(channels), int(size)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels, 32 if spec in CIFAR_BUILDERS else 224


def _ours(name: str) -> nn.Module:
    if name not in BUILDERS:
        raise ModelError(f"model {name!r} is unknown{_close(name, BUILDERS)}; need {FORMS}")
    package = importlib.import_module("resnet_fused")
    return getattr(package, name)()  # type: ignore[no-any-return]


def _torchvision(name: str, own: bool) -> nn.Module:
    from resnet_fused.testing.torchvision_compat import import_torchvision

    try:
        import_torchvision()
        models = importlib.import_module("torchvision").models
    except ImportError as error:
        raise ModelError(_missing("torchvision", error)) from error
    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise ModelError(f"torchvision has no model {name!r}{_close(name, models.list_models())}") from error
    if own:
        _check_origin("torchvision", name, builder)
    # Without weights_backbone=None segmentation and detection models download a backbone.
    options = {"weights": None, "weights_backbone": None}
    accepted = inspect.signature(builder).parameters
    try:
        return builder(**{k: v for k, v in options.items() if k in accepted})  # type: ignore[no-any-return]
    except Exception as error:
        raise ModelError(f"torchvision cannot make {name!r}: {error}") from error


def _timm(name: str, own: bool) -> nn.Module:
    try:
        if importlib.util.find_spec("torchvision") is not None:
            from resnet_fused.testing.torchvision_compat import import_torchvision

            import_torchvision()
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(_missing("timm", error)) from error
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}{_close(name, timm.list_models())}")
    if own:
        _check_origin("timm", name, timm.model_entrypoint(name))
    try:
        return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]
    except Exception as error:  # among others for a tag of weights that the architecture does not have
        raise ModelError(f"timm cannot make {name!r}: {error}") from error


def _check_origin(package: str, name: str, builder: Any) -> None:
    """See that ``package`` itself brings this entry of its registry, to which others may add."""
    if builder.__module__.split(".")[0] != package:
        raise ModelError(f"{package}:{name} is registered by {builder.__module__}; need a model of {package} itself")


def _imported(module_name: str, name: str) -> nn.Module:
    spec = f"{module_name}:{name}"
    if os.getcwd() not in sys.path:  # a console script has its own folder there instead
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"model {spec!r}: cannot import {module_name}: {error}") from error
    if not hasattr(module, name):
        raise ModelError(f"model {spec!r}: {module_name} has no {name!r}{_close(name, vars(module))}")
    target: Any = getattr(module, name)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ModelError(f"model {spec!r}: got {type(target).__name__}, need a callable that returns a module")
    try:
        made = target()
    except Exception as error:  # whatever the user's code raises is reported in one line
        raise ModelError(f"model {spec!r}: calling it raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"model {spec!r}: it returned {type(made).__name__}, need a torch.nn.Module")
    return made


def _close(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.6)
    return f" (close: {', '.join(near)})" if near else ""


def _missing(package: str, error: ImportError) -> str:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install 'resnet-fused[models]'"
    return f"{package} does not import here: {error}"
