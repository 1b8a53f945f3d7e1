"""Shared by the commands: common options, models and inputs, printed results."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from resnet_fused import backends, registry
from resnet_fused.testing import models
from resnet_fused.testing.statistics import calibrate

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class UserError(Exception):
    """The request cannot be met; the message is the one line that the user reads."""


def add_model_options(parser: argparse.ArgumentParser, batch: int) -> None:
    """Add MODEL and the options for its input."""
    parser.add_argument("model", metavar="MODEL", help=models.FORMS)
    parser.add_argument("--batch", type=positive, default=batch, help="images per batch (default %(default)s)")
    parser.add_argument("--size", type=positive, help="height and width of an image (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", metavar="DTYPE", help=" | ".join(DTYPES))
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: CUDA where there is one)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and inputs (default %(default)s)")
    add_json_option(parser)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def add_load_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load", action="append", default=[], metavar="FILE.py|MODULE", help="import this first: it registers backends"
    )


def load_plugins(specs: Iterable[str]) -> None:
    """Import what ``--load`` names."""
    for spec in specs:
        try:
            registry.load(spec)
        except Exception as error:  # whatever the user's file raises is reported in one line
            raise UserError(f"--load {spec}: {type(error).__name__}: {error}") from error


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need an integer of at least 1")
    return value


def seed(text: str) -> int:
    """An argparse type: a seed that every generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, need an integer from 0 to 2**63 - 1")
    return int(text)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; need cpu, cuda or cuda:INDEX") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: {f'there are {count}' if count else 'no'} CUDA devices here")
    return device


def check_backend(name: str) -> str:
    """``name`` when that backend can run here."""
    reason = None if name == backends.AUTO else backends.unavailable(name)
    if reason is not None:
        raise UserError(f"--backend {name}: {reason}")
    return name


def prepare(args: argparse.Namespace, *, keep_statistics: bool = False) -> tuple[nn.Module, Tensor]:
    """The model that the options name and a random input in NCHW, on their device and in their dtype.

    The weights are random. By default so are the batch norms' parameters and statistics, around the values that
    the input gives: fresh ones (0 and 1) would hide many errors.
    """
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    model = models.load(args.model).to(device)
    channels, size = models.input_shape(args.model, model)
    size = args.size or size
    shape = (args.batch, channels, size, size)
    try:
        x = torch.randn(shape, device=device)
        if not keep_statistics:
            calibrate(model, x, perturb=True, seed=args.seed)
        else:
            with torch.no_grad():
                model(x)
    except Exception as error:  # whatever the model raises on such an input is reported in one line
        raise UserError(f"{args.model} does not run on an input {shape}: {type(error).__name__}: {error}") from error
    return model.to(dtype), x.to(dtype)


def to_json(value: Any) -> str:
    """Strict JSON: what is not finite becomes a string."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def print_json(value: Any) -> None:
    """Print ``value`` as :func:`to_json` writes it."""
    print(to_json(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def console(*, quiet: bool = False) -> Console:
    """Where tables and progress go: nowhere when ``quiet`` (JSON alone is printed)."""
    width = None if Console().is_terminal else 160  # a file or a pipe has no width of its own
    return Console(quiet=quiet, highlight=False, width=width)


Advance = Callable[..., None]


@contextlib.contextmanager
def steps(out: Console, title: str, total: int) -> Iterator[Advance]:
    """Progress over ``total`` steps: a bar on a terminal, else a plain line now and then.

    Yields a function that is called after each step, with a short note on how things stand if there is one.
    """
    if out.is_terminal and not out.quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=out, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda note="": progress.update(task, advance=1, description=f"{title} {note}".strip())
        return
    done = 0

    def advance(note: str = "") -> None:
        nonlocal done
        done += 1
        if done == total or (note and 4 * done // total != 4 * (done - 1) // total):
            out.print(f"{title}: {done}/{total} {note}".rstrip(), markup=False)

    yield advance
