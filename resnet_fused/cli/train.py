"""``resnet-fused train MODEL DATA``: train a classifier with fused blocks, then test it eager and fused."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import nn

import resnet_fused
from resnet_fused.cli.common import UserError, add_json_option, console, pick_device, positive, print_json, seed, steps
from resnet_fused.ops.residual_block import RECOMPUTE
from resnet_fused.testing import models
from resnet_fused.testing.eager import eager_copy
from resnet_fused.training import Data, DataError, Recipe, Trainer, World, checkpoint, digits, image_folder, transfer
from resnet_fused.training.data import DIGITS
from resnet_fused.training.final import Final, compare
from resnet_fused.training.loop import AMP, logits_of
from resnet_fused.training.switches import determinism
from resnet_fused.training.world import connected, launched

WEIGHTS = "model.safetensors"
KEPT = 2  # checkpoints: should the newest be damaged on the disk, there is the one before


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a classifier with fused blocks; resume, transfer, several processes",
        description="Train MODEL on DATA with SGD, a warm-up and a cosine, its blocks fused; then test it eager and "
        "fused. Checkpoints are written whole or not at all: after a kill at any moment the same command with --resume "
        "goes on, on one device to the very weights that an unbroken run gives. `torchrun --nproc-per-node N -m "
        "resnet_fused.cli train …` trains in N processes. Exit code 1 when a fused prediction differs beyond rounding.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=models.FORMS)
    add("data", metavar="DATA", help=f"a folder of class folders, or of train/ and val/ with such; or '{DIGITS}'")
    add("--out", type=Path, default=Path("out/train"), help="folder for checkpoints and weights (default %(default)s)")
    add("--resume", action="store_true", help="go on from the newest sound checkpoint in --out, if there is one")
    add("--checkpoint-every", type=positive, metavar="STEPS", help="save within epochs too (default: after each epoch)")
    recipe = parser.add_argument_group("recipe")
    add = recipe.add_argument
    default = Recipe()
    add("--epochs", type=positive, default=default.epochs, help="(default %(default)s)")
    add("--batch", type=positive, default=default.batch, help="images per step and process (default %(default)s)")
    add("--size", type=positive, help="height and width of an image (default: the model's own, 16 for digits)")
    add("--lr", type=number(0), default=default.learning_rate, help="highest learning rate (default %(default)s)")
    add("--warmup", type=number(0), default=default.warmup, metavar="EPOCHS", help="(default %(default)s)")
    add("--momentum", type=number(0, 1), default=default.momentum, help="Nesterov's (default %(default)s)")
    add("--weight-decay", type=number(0), default=default.weight_decay, help="(default %(default)s)")
    add("--label-smoothing", type=number(0, 1), default=default.label_smoothing, help="(default %(default)s)")
    add("--amp", choices=("auto", *AMP), default="auto", help="autocast (auto: bf16 on GPUs that have it)")
    add("--val-fraction", type=number(0, 1), default=0.2, help="held out of each class without val/ (%(default)s)")
    add("--no-augment", action="store_true", help="feed the images as they are")
    add("--seed", type=seed, default=0, help="of weights, order, split and augmentation (default %(default)s)")
    start = parser.add_argument_group("transfer of weights")
    add = start.add_argument
    add("--init", type=Path, metavar="FILE", help="begin with these weights: safetensors, or what torch.save wrote")
    add("--freeze-until", metavar="PART", help="leave all that comes before this part as it is: layer3")
    how = parser.add_argument_group("execution")
    add = how.add_argument
    add("--eager", action="store_true", help="train without fused blocks, to compare")
    add("--recompute", choices=RECOMPUTE, help="keep less for the gradient and compute it again")
    add("--sync-batchnorm", action="store_true", help="batch statistics over all processes")
    add("--deterministic", action="store_true", help="deterministic kernels only: the same weights at every run")
    add("--workers", type=int, help="processes that load images (default: 0 for digits, up to 8 for a folder)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: CUDA where there is one)")
    add_json_option(parser)
    parser.set_defaults(run=run)


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to below ``high``."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < high:
            limits = f"from {low:g}" + ("" if high == math.inf else f" to below {high:g}")
            raise argparse.ArgumentTypeError(f"got {text!r}, need a number {limits}")
        return value

    return convert


def run(args: argparse.Namespace) -> int:
    needed = {"safetensors": "safetensors"}
    needed |= {"sklearn": "scikit-learn"} if args.data == DIGITS else {"torchvision": "torchvision", "PIL": "pillow"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"training needs {', '.join(missing)}: pip install 'resnet-fused[train]'")
    world = launched()
    device = pick_device(args.device)
    if device.type == "cuda" and device.index is None:
        device = pick_device(f"cuda:{world.local_rank}")
    recipe = make_recipe(args, device)
    if args.eager and args.recompute:
        raise UserError("--recompute: needs fused blocks; leave out --eager")
    with connected(world, device), determinism(args.deterministic):
        status = train(args, recipe, world, device)
    if world.size > 1:
        leave(status)
    return status


def leave(status: int) -> NoReturn:
    """End a process of several at once: a thread of the process group that still holds a Python object aborts when the
    interpreter is torn down under it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def make_recipe(args: argparse.Namespace, device: torch.device) -> Recipe:
    amp = args.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16: needs a CUDA device; bf16 works on a CPU too")
    return Recipe(
        args.epochs, args.batch, args.lr, args.warmup, args.momentum, args.weight_decay, args.label_smoothing, amp,
        args.seed,
    )  # fmt: skip


def train(args: argparse.Namespace, recipe: Recipe, world: World, device: torch.device) -> int:
    out, begun = console(quiet=args.json or not world.first), time.perf_counter()
    torch.manual_seed(args.seed)
    model = models.load(args.model)
    channels, size = models.input_shape(args.model, model)
    size = args.size or (min(size, 16) if args.data == DIGITS else size)
    data = load_data(args, channels, size)
    head = transfer.fit_head(model, len(data.classes))
    resumed = open_folder(args.out, args.resume, world, transfer.largest_file(model))
    if args.init is not None and resumed is None:
        loaded = transfer.load_weights(model, args.init, head)
        out.print(f"weights of {args.init}" + ("" if loaded else f", but {head}, which is new"), markup=False)
    network = prepare(model, args).to(device)
    shape = (2, channels, size, size)
    probe(network, shape, len(data.classes), device)
    if args.sync_batchnorm and world.size > 1 and device.type == "cpu":
        probe_synchronised(network, shape)
    trainer = Trainer(
        network,
        data,
        recipe,
        device=device,
        frozen=transfer.freeze_until(network, args.freeze_until) if args.freeze_until else (),
        world=world,
        workers=workers(args),
        identity=identity(args, size),
        sync_batchnorm=args.sync_batchnorm,
    )
    out.print(
        f"{args.model} on {len(data.train)} images of {len(data.classes)} classes, {trainer.steps} steps of "
        f"{recipe.batch * world.size}; {describe(network, args)}",
        markup=False,
    )
    if resumed is not None:
        path, saved, problems = resumed
        for problem in problems if world.first else ():
            print(f"resnet-fused: {problem}; going on from {path}", file=sys.stderr)
        trainer.restore(saved, str(path))
        out.print(f"going on from {path}, after step {trainer.step}", markup=False)
    learn(trainer, args, out)
    model.load_state_dict(network.state_dict())
    if world.first:
        kind = DIGITS if args.data == DIGITS else "images"
        facts = json.dumps({"model": args.model, "size": size, "classes": data.classes, "data": kind})
        checkpoint.write(args.out / WEIGHTS, checkpoint.packed(model.state_dict()), {checkpoint.FACTS: facts})
    final = compare(trainer, model.to(device).eval())
    if world.first:
        tell(args, trainer, final, out, time.perf_counter() - begun)
    return 0 if final.verdict.ok else 1


def load_data(args: argparse.Namespace, channels: int, size: int) -> Data:
    """The data that the arguments name."""
    if channels not in (1, 3):
        raise UserError(f"{args.model} takes images of {channels} channels; need 3 or 1")
    options: dict[str, Any] = {"channels": channels, "augment": not args.no_augment}
    if args.data == DIGITS:
        return digits(size, args.seed, **options)
    return image_folder(Path(args.data), size, args.seed, val_fraction=args.val_fraction, **options)


def probe(network: nn.Module, shape: tuple[int, ...], classes: int, device: torch.device) -> None:
    """See that the network takes such images and gives a logit for each class."""
    try:
        with torch.no_grad():
            logits = logits_of(network.eval()(torch.zeros(shape, device=device)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the model does not run on images {shape}: {type(error).__name__}: {error}") from error
    if logits.shape[1] != classes:
        raise UserError(f"the model gives {logits.shape[1]} logits, and its last linear layer has {classes} outputs")


def probe_synchronised(network: nn.Module, shape: tuple[int, ...]) -> None:
    """See that every batch norm can take the statistics of all processes on a CPU: those of fused blocks can."""
    copied = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).train()
    try:
        with torch.no_grad():
            copied(torch.zeros(shape))
    except ValueError as error:
        raise UserError(f"--sync-batchnorm: on a CPU only fused blocks support it: {error}") from error


def open_folder(
    folder: Path, resume: bool, world: World, most: int
) -> tuple[Path, checkpoint.Checkpoint, list[str]] | None:
    """Make ``folder``; the checkpoint to go on from, of at most ``most`` bytes, read by the first process for all.

    Raises:
        UserError: ``folder`` holds a run that was not asked for, or cannot be made.
        CheckpointError: no checkpoint in it is sound.
    """
    result: Any = None
    if world.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = checkpoint.found(folder)
            if there and not resume:
                raise UserError(
                    f"{folder} holds a run, at step {there[0][0]}: go on with --resume, or name another --out"
                )
            result = checkpoint.newest(folder, most)
        except OSError as error:
            result = UserError(f"--out {folder}: {error.strerror}")
        except Exception as error:
            result = error
    result = world.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[no-any-return]


def prepare(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """A copy of the model as it is trained: eager or fused, in channels_last."""
    model = eager_copy(model) if args.eager else resnet_fused.fuse(model, recompute=args.recompute)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def workers(args: argparse.Namespace) -> int:
    if args.workers is not None:
        if args.workers < 0:
            raise UserError(f"--workers {args.workers}: need 0 or more")
        return int(args.workers)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if args.data == DIGITS else min(8, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def identity(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """What else determines the resulting weights."""
    return {
        "model": args.model,
        "size": size,
        "augment": not args.no_augment,
        "init": None if args.init is None else str(args.init),
        "freeze_until": args.freeze_until,
        "sync_batchnorm": args.sync_batchnorm,
    }


def learn(trainer: Trainer, args: argparse.Namespace, out: Console) -> None:
    """Train to the end, with a bar on a terminal and a line per epoch, and save."""

    def save() -> None:
        state = trainer.checkpoint()
        if trainer.world.first:
            checkpoint.save(checkpoint.path_of(args.out, trainer.step), state)
            checkpoint.prune(args.out, trainer.step, KEPT)

    def tell_epoch(row: dict[str, float]) -> None:
        out.print(
            f"epoch {row['epoch']}/{trainer.recipe.epochs}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2%}; "
            f"test loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2%}"
        )

    bar: Any = steps(out, "training", trainer.steps - trainer.step) if out.is_terminal else contextlib.nullcontext()
    try:
        with bar as advance:
            trainer.run(save=save, save_every=args.checkpoint_every or 0, on_step=advance, on_epoch=tell_epoch)
    except DataError as error:
        saved = checkpoint.found(args.out)
        kept = f"; saved after step {saved[0][0]}: put the image right and --resume" if saved else ""
        raise DataError(f"{error}{kept}") from error


def describe(network: nn.Module, args: argparse.Namespace) -> str:
    if args.eager:
        return "eager"
    report = resnet_fused.report(network)
    return f"{len(report.fused)} parts fused, {len(report.skipped)} left alone"


def tell(args: argparse.Namespace, trainer: Trainer, final: Final, out: Console, seconds: float) -> None:
    """Print the result."""
    weights = args.out / WEIGHTS
    if args.json:
        print_json(
            {
                "model": args.model,
                "data": args.data,
                "device": str(trainer.device),
                "processes": trainer.world.size,
                "recipe": dataclasses.asdict(trainer.recipe),
                "trained_on": len(trainer.data.train),
                "epochs": trainer.history,
                **{k: v for k, v in vars(final).items() if k != "verdict"},
                "verdict": final.verdict.to_dict(),
                "weights": str(weights),
                "seconds": seconds,
            }
        )
    out.print(
        f"accuracy on {final.tested_on} test images: eager {final.accuracy:.2%}, fused {final.accuracy_fused:.2%}"
    )
    out.print(f"predictions equal to eager's: {final.equal_predictions} of {final.tested_on}", style="bold")
    if not final.verdict.ok:
        out.print(f"FAILED: {final.verdict.to_dict()}", style="bold red", markup=False)
    out.print(f"{weights}: the weights", markup=False)
