"""Breaks the bottleneck kernels in every place that matters, one at a time, and asks that the host run turns red.

``python tests/simt/mutate.py [NAME ...]`` prints a line for each mutation of mutations.txt and exits with 1 when one
stays green: then a test is missing, or the mutated code is not needed. It takes minutes and is no part of the suite.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).parents[2])]  # this package, wherever the command is called from

import simt_harness  # noqa: E402
from bottleneck_calls import Options  # noqa: E402
from test_bottleneck_simt import KERNELS, check  # noqa: E402

from resnet_fused.ops.block import BlockCall  # noqa: E402

HERE = Path(__file__).parent
STREAMED, RESIDENT = "mid64_c256_small", "mid64_c256_resident"
PROJECTED, STAYING = "mid64_c64_project_small", "mid64_c64_project_resident"
WIDE, STRIDED = "mid128_c512_tight", "mid128_c256_stride2_small"
# One kernel for each way through the source, on a full tile and ragged ones on its right, below it and across.
INPUTS = {
    **dict.fromkeys((STREAMED, PROJECTED), (2, 9, 9)),
    **dict.fromkeys((RESIDENT, STAYING), (2, 9, 17)),
    WIDE: (1, 9, 9),
    STRIDED: (1, 15, 15),
}
GROUPS = {
    "": tuple(INPUTS),
    "ring": (STREAMED, PROJECTED, WIDE, STRIDED),
    "kept": (RESIDENT, STAYING),
    "identity": (STREAMED, RESIDENT, WIDE),
    "projection": (PROJECTED, STAYING, STRIDED),
    "kept projection": (STAYING,),
    "strided": (STRIDED,),
    # The other one has waited for x before it expands, since x under the output pixels comes with it.
    "waits": (STREAMED, RESIDENT, PROJECTED, WIDE, STRIDED),
    "batch": (STREAMED, RESIDENT, PROJECTED, STAYING),
}


@dataclass(frozen=True)
class Mutation:
    """``old``, which stands once in the file, becomes ``new``: each of the kernels must then fail."""

    name: str
    file: str
    old: str
    new: str
    kernels: tuple[str, ...]


def mutations() -> Iterator[Mutation]:
    """Those of mutations.txt: "# file: name [kernels]", the lines that go after "- ", those that come after "+ "."""
    for entry in (HERE / "mutations.txt").read_text().split("\n\n"):
        head, *lines = entry.strip("\n").split("\n")
        file, _, name = head.removeprefix("# ").partition(": ")
        name, _, group = name.partition(" [")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        yield Mutation(name, file, old, new, GROUPS[group.rstrip("]")])


@functools.cache
def _call(name: str) -> BlockCall:
    call = KERNELS[name].make(*INPUTS[name], torch.bfloat16, bias=True)
    shortcut = None if call.shortcut is None else call.shortcut._replace(eps=0.3)
    return call._replace(convs=tuple(conv._replace(eps=0.3) for conv in call.convs), shortcut=shortcut)


def survivors(mutation: Mutation, folder: Path) -> list[str]:
    """The kernels that pass although they are mutated."""
    csrc = folder / "csrc"
    shutil.copytree(simt_harness.CSRC, csrc)
    path = csrc / "bottleneck" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.old!r} stands {text.count(mutation.old)} times in {mutation.file}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))
    _keep(csrc / "bottleneck" / "instances.h", mutation.kernels)
    objects = []
    for source in simt_harness.sources():
        if source.parts[-2:] == ("bottleneck", "cuda.cpp"):
            objects.append(simt_harness.build(csrc / "bottleneck" / "cuda.cpp", csrc, folder))
        elif source.stem == "launch_bottleneck":
            objects.append(simt_harness.build(source, csrc, folder))
        else:
            objects.append(simt_harness.build(source))
    library = simt_harness.link(objects, folder)
    with mock.patch.object(simt_harness, "library", lambda: library):
        found = [name for name in mutation.kernels if passes(name)]
    simt_harness.stop(library)
    return found


def passes(kernel: str) -> bool:
    try:
        check(_call(kernel), Options(f"bf16_{kernel}", multiprocessors=1))
    except (simt_harness.RunnerError, simt_harness.Refused, AssertionError):
        return False
    return True


def _keep(instances: Path, kernels: tuple[str, ...]) -> None:
    """Leave these kernels alone in the list, in bfloat16: the others need not be compiled."""
    lines = instances.read_text().splitlines()
    rows = [line.rstrip("\\ ") for line in lines if any(f"(element##_{name}," in line for name in kernels)]
    text = ["#pragma once", "#define RF_BOTTLENECK_SHAPES(X, element) \\", " \\\n".join(rows),
            "#define RF_BOTTLENECK_KERNELS(X) RF_BOTTLENECK_SHAPES(X, bf16)", ""]  # fmt: skip
    instances.write_text("\n".join(text))


def main() -> int:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutations, or the beginning of their names; all unless given")
    names = tuple(parser.parse_args().names) or ("",)
    assert all(map(passes, INPUTS)), "the kernels as they are"
    green = 0
    for mutation in mutations():
        if mutation.name.startswith(names):
            with tempfile.TemporaryDirectory() as folder:
                found = survivors(mutation, Path(folder))
            green += bool(found)
            print("GREEN" if found else "red  ", mutation.name, *found, flush=True)
    return int(green > 0)


if __name__ == "__main__":
    sys.exit(main())
