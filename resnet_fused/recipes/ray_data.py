"""Classify a folder of images with Ray Data: ``python -m resnet_fused.recipes.ray_data FOLDER --model …``.

Batches of decoded images go to actors, each with one fused model, warmed up once. Where there are GPUs an actor has one
of them, else its share of the CPUs. An image that is broken or too large is named in the result and stops nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from resnet_fused import files
from resnet_fused.cli.common import positive
from resnet_fused.recipes.classifier import Classifier, Predictor, load
from resnet_fused.testing.models import FORMS, ModelError
from resnet_fused.training.errors import DataError, TrainingError
from resnet_fused.training.images import EXTENSIONS


class Decode:
    """From a file's path to its name in the folder, the model's input and, should it be broken, why.

    Paths come as bytes: not all are text.
    """

    def __init__(self, classifier: Classifier, folder: str) -> None:
        self.decode, self.folder, self.blank = classifier.decode, folder, classifier.decode.blank().numpy()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        path = os.fsdecode(row["path"])
        file = os.path.relpath(path, self.folder).encode(errors="surrogateescape").decode(errors="backslashreplace")
        try:
            return {"file": file, "image": self.decode.file(Path(path)).numpy(), "error": ""}
        except ValueError as error:
            return {"file": file, "image": self.blank, "error": str(error)}


class Classify:
    """From such a batch to labels and probabilities."""

    def __init__(self, classifier: Classifier, batch: int) -> None:
        self.predict = Predictor(classifier, batch)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = list(torch.from_numpy(np.array(batch["image"])))
        found = [(None, None) if error else best
                 for error, best in zip(batch["error"], self.predict(images), strict=True)]  # fmt: skip
        labels, probabilities = map(list, zip(*found, strict=True))
        return {"file": batch["file"], "label": labels, "probability": probabilities, "error": batch["error"]}


def classify(folder: str, classifier: Classifier, *, batch: int = 32, actors: int = 1) -> Any:
    """Classify every image under ``folder``.

    Args:
        folder: a path that every machine of the cluster sees.
        classifier: what :func:`resnet_fused.recipes.classifier.load` gives.
        batch: images per call of the model.
        actors: processes that hold a model.

    Returns:
        A pandas DataFrame ordered by ``file`` (the path within the folder), with ``label``, ``probability`` and
        ``error``: empty, or why the image cannot be read.

    Raises:
        DataError: there is no image.
    """
    folder = os.path.abspath(folder)
    found = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    paths = [{"path": os.fsencode(path)} for path in found if path.lower().endswith(EXTENSIONS)]
    if not paths:
        raise DataError(f"{folder}: no image there; need files ending in {', '.join(EXTENSIONS)}")
    there = ray.cluster_resources()
    own: dict[str, Any] = {"num_gpus": 1} if "GPU" in there else {"num_cpus": max(1, there["CPU"] // actors - 1)}
    found = (
        ray.data.from_items(paths)
        .map(  # not Ray's own reading, which has no bounds
            Decode(classifier, folder)
        )
        .map_batches(
            Classify,
            fn_constructor_args=(classifier, batch),
            batch_size=batch,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **own,
        )
    )
    return found.to_pandas().sort_values("file", ignore_index=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Classify and write the table; images that cannot be read are reported on stderr."""
    parser = argparse.ArgumentParser(prog="python -m resnet_fused.recipes.ray_data", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="images, in folders within it too")
    parser.add_argument("--model", required=True, help=f"{FORMS}, or the model.safetensors of `resnet-fused train`")
    parser.add_argument("--weights", help="a file, or the name of weights to download: DEFAULT")
    parser.add_argument("--out", required=True, metavar="FILE", help="the table: .parquet or .csv")
    parser.add_argument("--batch", type=positive, default=32, help="images per batch (default %(default)s)")
    parser.add_argument("--actors", type=positive, default=1, help="models at once (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        files.check_writable(Path(args.out))  # now, not after hours
        classifier = load(args.model, args.weights)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror or error}")
    except (ModelError, TrainingError) as error:
        parser.error(str(error))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(ignore_reinit_error=True, include_dashboard=False)
    try:
        table = classify(args.folder, classifier, batch=args.batch, actors=args.actors)
    except DataError as error:
        parser.error(str(error))
    table.to_csv(args.out, index=False) if args.out.endswith(".csv") else table.to_parquet(args.out)
    broken = table[table["error"] != ""]
    for file, reason in zip(broken["file"], broken["error"], strict=True):
        print(f"{file}: {reason}", file=sys.stderr)
    print(f"{args.out}: {len(table) - len(broken)} images classified, {len(broken)} broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
