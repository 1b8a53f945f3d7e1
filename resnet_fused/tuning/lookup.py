"""Find the table's entry for a call: the hook of ``backends.choose``."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops import packed
from resnet_fused.tuning import environment, table
from resnet_fused.tuning.table import Entry

OPS = ("conv_bn_act", "add_relu", "basic_block", "bottleneck")
CHAIN = "chain"  # a block, convolution by convolution
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
_ALIGNMENT = 16  # bytes: tensors that are measured start at a multiple of it

Recorder = Callable[[str, Any], None]


@dataclass(eq=False)
class Found:
    """A table's entry for calls that are alike, and the server made of it once a call was seen."""

    entry: Entry
    server: Any = None
    resolved: bool = False


_tables: dict[tuple[torch.device, int], dict[str, Entry]] = {}
_found: dict[tuple[Any, ...], Found | None] = {}
_trial: tuple[str, Found] | None = None
_recorder: Recorder | None = None
_read_on = False  # whether tables are read while calls are recorded


class Configured(NamedTuple):
    """A backend with a launch config, in the place of the backend's module."""

    compute: Callable[[Any, Any], Tensor]
    config: Any

    def run(self, call: Any) -> Tensor:
        return self.compute(call, self.config)


def observed() -> bool:
    """Whether somebody wants to see each call, or to decide one: a tuner at work."""
    return _trial is not None or _recorder is not None


def find(op: str, call: Any) -> Found | None:
    """The table's entry for this call on its device; None where there is none."""
    if op not in OPS:
        return None
    if _trial is not None and _trial[0] == op:
        return _trial[1]
    if _recorder is not None:
        _recorder(op, call)
        if not _read_on:
            return None
    device, decided = call[0].device, _found
    known = _table(device)
    if not known:
        return None
    memo = (op, device, torch.get_num_threads(), _flags(device), *_facts(call))
    if memo not in decided:
        if len(decided) >= 4096:
            decided.clear()
        text = key(op, call)
        entry = None if text is None else known.get(text)
        decided[memo] = None if entry is None else Found(entry)
    return decided.get(memo)


def key(op: str, call: Any) -> str | None:
    """The call's place in a table; None for tensors that are neither contiguous nor channels_last: no table has those.

    Tensors of two dimensions or more stand there with dtype, shape and layout, and integers and names as they are.
    The values of vectors, and numbers such as eps, do not decide how fast a call is.
    """
    words = [op, _flags(call[0].device)]
    for fact in _facts(call):
        if isinstance(fact, tuple):
            shape, stride, dtype = fact
            layout = _layout(shape, stride)
            if layout is None:
                return None
            words.append(f"{str(dtype).removeprefix('torch.')}:{'x'.join(map(str, shape))}:{layout}")
        else:
            words.append(str(fact))
    return " ".join(word for word in words if word)


def plain(config: Any) -> Any:
    """A config as JSON gives it back."""
    return [plain(value) for value in config] if isinstance(config, (tuple, list)) else config


def aligned(call: Any) -> bool:
    """Whether all matrices and images of the call start where those that were measured did."""
    for value in call:
        if isinstance(value, Tensor):
            if value.dim() > 1 and value.data_ptr() % _ALIGNMENT:
                return False
        elif isinstance(value, tuple) and not aligned(value):
            return False
    return True


def _facts(call: Any) -> list[Any]:
    facts: list[Any] = []
    for value in call:
        if isinstance(value, Tensor):
            if value.dim() > 1:
                facts.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (tuple, list)):
            facts += _facts(value)
        elif value is None:
            facts.append("-")
        elif not isinstance(value, float):
            facts.append(value)
    return facts


def _layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> str | None:
    """ "nhwc" wins where both fit."""
    like = torch.empty_strided(shape, stride, device="meta")
    if len(shape) == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return "nhwc"
    return "nchw" if like.is_contiguous() else None


def _flags(device: torch.device) -> str:
    """The switches of PyTorch that change what is fastest."""
    if device.type != "cuda":
        return "" if torch._C._get_mkldnn_enabled() else "no-onednn"
    cudnn: Any = torch.backends.cudnn
    return f"{cudnn.conv.fp32_precision}{'+benchmark' * cudnn.benchmark}{'+deterministic' * cudnn.deterministic}"


def _table(device: torch.device) -> dict[str, Entry]:
    """Shipped entries, and over them the user's own; read once."""
    at, tables = (device, 0 if device.type == "cuda" else torch.get_num_threads()), _tables
    if at not in tables:
        entries: dict[str, Entry] = {}
        if os.environ.get("RESNET_FUSED_TUNING", "1") != "0":
            facts = environment.describe(device)
            for path in sorted(environment.SHIPPED.glob("*.json")):
                with contextlib.suppress(table.TableError, OSError):  # another device's, or not to be read
                    entries |= table.read(path, facts)
            try:
                entries |= table.load(environment.path_for(facts), facts)
            except OSError as error:
                table.warn_once(f"the user's tuning table is not read: {error}")
        tables[at] = entries
    return tables[at]


def summary(device: torch.device) -> str:
    """How many entries decide on this device, and a digest of what they say; empty where there are none."""
    entries = _table(device)
    said = repr(sorted((key, entry.backend, entry.config) for key, entry in entries.items()))
    return f"{len(entries)} entries {hashlib.sha256(said.encode()).hexdigest()[:8]}" if entries else ""


def alike(op: str, call: Any) -> list[Entry]:
    """The entries for calls with the same weights and geometry as this one, whatever the batch and the size of the
    images and their layout, in the order of their keys."""
    wanted = key(op, call) if op in OPS else None
    if wanted is None:
        return []
    pattern = _of_weights(wanted)
    return [entry for text, entry in sorted(_table(call[0].device).items()) if _of_weights(text) == pattern]


def _of_weights(text: str) -> list[str]:
    """The words of a key without what its images decide: of the first tensor dtype and channels are left, and what
    follows the weights (a residual and the activation, or an identity) is not."""
    op, *words = text.split(" ")
    at = next((i for i, word in enumerate(words) if ":" in word), None)
    if at is None:
        return [text]
    dtype, _, shape = words[at].partition(":")
    if op == "add_relu":
        return [op, *words[:at], dtype]
    return [op, *words[:at], dtype, *shape.split("x")[1:2], *words[at + 1 : {"conv_bn_act": -2}.get(op, -1)]]


def forget() -> None:
    """Read the tables anew at the next call, and choose anew for every call."""
    global _tables, _found
    _tables, _found = {}, {}  # not emptied: another thread may still be writing what it read in the old ones
    packed.clear()  # among others, what was chosen for each block


@contextlib.contextmanager
def trial(op: str, found: Found) -> Iterator[None]:
    """Every call of ``op`` runs as ``found`` says."""
    global _trial
    before, _trial = _trial, (op, found)
    try:
        with packed.at_once():
            yield
    finally:
        _trial = before


@contextlib.contextmanager
def recording(recorder: Recorder, *, read: bool = False) -> Iterator[None]:
    """``recorder`` gets each call that a table could decide, with the op's name. Tables are not read meanwhile
    unless ``read``: the calls are then those that are made once what the tables say is followed."""
    global _recorder, _read_on
    forget()
    before, _recorder, _read_on = (_recorder, _read_on), recorder, read
    try:
        with packed.at_once():
            yield
    finally:
        _recorder, _read_on = before
        forget()
