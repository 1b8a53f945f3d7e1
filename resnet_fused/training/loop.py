"""The loop: SGD with momentum, a warm-up and a cosine. What it does next follows from its recipe and its position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from resnet_fused.training.checkpoint import Checkpoint
from resnet_fused.training.data import Data, Images, Keyed, collate
from resnet_fused.training.errors import CheckpointError, DataError, TrainingError
from resnet_fused.training.weights import MODEL
from resnet_fused.training.world import World

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZER = "optimizer."
RNG = "rng."
_ROW = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    ``batch`` is the images of one process and step; the last of an epoch that do not fill one wait for another epoch.
    The learning rate rises in a line over ``warmup`` epochs and falls by a cosine to zero. ``amp`` is "none", "bf16" or
    "fp16": autocast, with a GradScaler for fp16.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 0.1
    warmup: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    amp: str = "none"
    seed: int = 0


class Trainer:
    """One run: a model, its data, a recipe, and how far it has come.

    Args:
        model: on ``device``; trained in place.
        data: what it learns from and is tested on after each epoch.
        recipe: how.
        device: where it computes.
        frozen: modules that stay in eval mode.
        world: this process among all; with more than one the model is wrapped in DistributedDataParallel.
        workers: processes that load images; 0 loads them in this one. It changes no result.
        identity: further facts that a checkpoint must share with this run.
        sync_batchnorm: whether batch norms take the statistics of all processes, as nn.SyncBatchNorm.

    ``step`` counts the optimiser's steps; ``history`` has a row for each epoch that is complete.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        device: torch.device,
        frozen: Sequence[nn.Module] = (),
        world: World | None = None,
        workers: int = 0,
        identity: dict[str, Any] | None = None,
        sync_batchnorm: bool = False,
    ) -> None:
        self.model, self.data, self.recipe, self.device = model, data, recipe, device
        self.frozen, self.world, self.workers = frozen, world or World(), workers
        self.identity = {
            **asdict(recipe), **(identity or {}), "data": data.digest, "processes": self.world.size
        }  # fmt: skip
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            data.train, self.world.size, self.world.rank, shuffle=True, seed=recipe.seed
        )
        self.steps_per_epoch = max(1, len(self.sampler) // recipe.batch)
        self.steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._totals = torch.zeros(3, device=device, dtype=torch.float64)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained,
            recipe.learning_rate,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
        )
        warmup = min(round(recipe.warmup * self.steps_per_epoch), self.steps - 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, Cosine(warmup, self.steps))
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.network: nn.Module = model
        if self.world.size > 1:
            devices = [device.index] if device.type == "cuda" else None
            self.network = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
        if sync_batchnorm:  # only now: DistributedDataParallel takes none on a CPU; parameters and buffers stay
            names = [name for name, module in model.named_modules() if any(module is f for f in frozen)]
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
            self.frozen = [model.get_submodule(name) for name in names]
        torch.manual_seed((recipe.seed + self.world.rank) % 2**63)  # for dropout and the like

    def run(
        self,
        *,
        save: Callable[[], None] | None = None,
        save_every: int = 0,
        on_step: Callable[[], None] | None = None,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Train from ``step`` to the end.

        Args:
            save: called after each epoch and after every ``save_every`` steps; with a single process also before a
                broken image ends the run.
            on_step: called after each step.
            on_epoch: called with each new row of ``history``.

        Raises:
            DataError: an image is broken.
            TrainingError: the loss is no longer finite; nothing is saved then.
        """
        try:
            self._end_epoch_if_due(on_epoch)
            self._train_mode()
            for batch in self._loader(self.data.train, _Batches(self.sampler, self)):
                if isinstance(batch, DataError):
                    raise batch
                self._learn(*batch)
                self.step += 1
                if on_step is not None:
                    on_step()
                ended = self._end_epoch_if_due(on_epoch)
                if save is not None and (ended or (save_every and self.step % save_every == 0)):
                    self._check_finite()
                    save()
        except DataError:
            if save is not None and self.world.size == 1:
                self._check_finite()
                save()
            raise

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss and accuracy of ``model`` on the test images, with the recipe's autocast. All processes call it."""
        totals = torch.zeros(3, device=self.device, dtype=torch.float64)
        with torch.inference_mode(), self._autocast():
            for x, y in self.test_batches():
                totals += self._scores(model(x), y)[1]
        loss, correct, count = self.world.sum(totals).tolist()
        return loss / count, correct / count

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test images, on the device.

        Raises:
            DataError: an image is broken.
        """
        keys = [(0, i) for i in range(self.world.rank, len(self.data.val), self.world.size)]
        batch = self.recipe.batch
        for item in self._loader(self.data.val, [keys[i : i + batch] for i in range(0, len(keys), batch)]):
            if isinstance(item, DataError):
                raise item
            yield self._placed(*item)

    def checkpoint(self) -> Checkpoint:
        """All that :meth:`restore` needs. All processes call it."""
        tensors = {f"{MODEL}{name}": value for name, value in self.model.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for index, values in optimizer["state"].items():
            tensors.update({f"{OPTIMIZER}{index}.{key}": v for key, v in values.items() if isinstance(v, Tensor)})
        for rank, states in enumerate(self.world.gather(self._rng())):
            tensors.update({f"{RNG}{rank}.{kind}": state for kind, state in states.items()})
        tensors["totals"] = self.world.sum(self._totals.clone())
        state = {
            "identity": self.identity,
            "step": self.step,
            "history": self.history,
            "groups": optimizer["param_groups"],
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return Checkpoint(tensors, state)

    def restore(self, checkpoint: Checkpoint, source: str) -> None:
        """Go on where the run that made ``checkpoint`` was.

        Raises:
            CheckpointError: that run had another recipe, data or model; the message names what differs, and ``source``.
        """
        theirs = checkpoint.state.get("identity")
        theirs = theirs if isinstance(theirs, dict) else {}
        for key in (*self.identity, *theirs):
            was, now = theirs.get(key), self.identity.get(key)
            if was != now:
                raise CheckpointError(
                    f"{source}: was written by a run with {key} {was!r}, this one has {now!r}; go on with what it had, "
                    f"or begin another run elsewhere (its weights alone: --init {source})"
                )
        try:
            self._restore(checkpoint)
        except Exception as error:  # a checkpoint that was made to look sound may hold anything
            raise CheckpointError(f"{source}: does not fit the run: {type(error).__name__}: {error}") from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        step, history = state["step"], state["history"]
        if type(step) is not int or not 0 <= step <= self.steps:
            raise ValueError(f"step is {step!r}, need one from 0 to {self.steps}")
        numbers = all(isinstance(row[key], (int, float)) for row in history for key in _ROW)
        if not isinstance(history, list) or not numbers or len(history) > step // self.steps_per_epoch:
            raise ValueError("its history does not fit its number of steps")
        self.model.load_state_dict({n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)})
        parameters = self.optimizer.param_groups[0]["params"]
        momenta: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(OPTIMIZER):
                index, _, key = name.removeprefix(OPTIMIZER).partition(".")
                like = parameters[int(index)]  # its strides too
                if value.shape != like.shape:
                    raise ValueError(f"{name} has another shape than its parameter")
                momenta.setdefault(int(index), {})[key] = torch.empty_like(like).copy_(value)
        own = self.optimizer.state_dict()["param_groups"]
        if not _alike(state["groups"], own) or not _alike(state["schedule"], self.schedule.state_dict()):
            raise ValueError("the optimizer's settings are of another kind")
        self.optimizer.load_state_dict({"state": momenta, "param_groups": state["groups"]})
        if self.optimizer.param_groups[0].keys() < own[0].keys():
            raise ValueError("some of the optimizer's settings are missing")
        totals = tensors["totals"]
        if totals.shape != self._totals.shape or totals.dtype != self._totals.dtype:
            raise ValueError(f"totals is {totals.dtype} {tuple(totals.shape)}")
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = step, list(history)
        self._totals.copy_(totals if self.world.first else torch.zeros(3))
        self._set_rng({kind: tensors.get(f"{RNG}{self.world.rank}.{kind}") for kind in ("cpu", "cuda")})

    def _learn(self, x: Tensor, y: Tensor) -> None:
        x, y = self._placed(x, y)
        with self._autocast():
            loss, scores = self._scores(self.network(x), y, self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self._totals += scores

    def _scores(self, output: Any, y: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The loss, and (summed loss, right answers, images)."""
        logits = logits_of(output)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
        right = (logits.argmax(1) == y).sum()
        count = torch.full_like(right, len(y))
        return loss, torch.stack([loss.detach().double() * count, right.double(), count.double()])

    def _end_epoch_if_due(self, on_epoch: Callable[[dict[str, float]], None] | None) -> bool:
        """Test, and add to ``history``, when the last step was the last of an epoch that is not there yet."""
        if self.step // self.steps_per_epoch == len(self.history):
            return False
        self._check_finite()
        loss, right, count = self.world.sum(self._totals.clone()).tolist()
        self.model.eval()
        val_loss, val_accuracy = self.test(self.model)
        self._train_mode()
        self._totals.zero_()
        row = {"epoch": len(self.history) + 1, "loss": loss / count, "accuracy": right / count}
        self.history.append({**row, "val_loss": val_loss, "val_accuracy": val_accuracy})
        if on_epoch is not None:
            on_epoch(self.history[-1])
        return True

    def _check_finite(self) -> None:
        parameters = self.optimizer.param_groups[0]["params"]
        with torch.no_grad():
            sums = torch.stack([self._totals.sum(), *(p.sum().double() for p in parameters)])
        if not bool(torch.isfinite(sums).all()):
            raise TrainingError(
                f"the loss or the weights are no longer finite in epoch {len(self.history) + 1}, by step "
                f"{self.step} of {self.steps}; try a lower learning rate or a longer warm-up"
            )

    def _train_mode(self) -> None:
        self.network.train()
        for module in self.frozen:
            module.eval()

    def _autocast(self) -> torch.autocast:
        dtype = AMP[self.recipe.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _placed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return x, y.to(self.device, non_blocking=True)

    def _loader(self, images: Images, batches: Any) -> DataLoader[Any]:
        return DataLoader(
            Keyed(images, self.recipe.seed),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, as it would draw from the one that dropout uses
        )

    def _rng(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_rng(self, states: dict[str, Tensor | None]) -> None:
        if (cpu := states["cpu"]) is not None:
            torch.set_rng_state(cpu)
        if self.device.type == "cuda" and (cuda := states["cuda"]) is not None:
            torch.cuda.set_rng_state(cuda, self.device)


@dataclass(frozen=True)
class Cosine:
    """The factor of the learning rate at a step: a line up over ``warmup`` steps, then a cosine down to zero."""

    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class _Batches(Sampler[list[tuple[int, int]]]):
    """The batches of (epoch, index) from where the run is to its end: one loader serves all epochs."""

    def __init__(self, sampler: DistributedSampler[Any], run: Trainer) -> None:
        self.sampler, self.first, self.last = sampler, run.step, run.steps
        self.batch, self.per_epoch = run.recipe.batch, run.steps_per_epoch

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.first, self.last):
            epoch, position = divmod(step, self.per_epoch)
            if not order or position == 0:
                self.sampler.set_epoch(epoch)
                order = list(self.sampler)
            yield [(epoch, i) for i in order[position * self.batch : (position + 1) * self.batch]]


def _alike(value: Any, own: Any) -> bool:
    """Whether ``value``, out of a file, is built as ``own`` is: numbers where that has numbers, and so on."""
    if isinstance(own, dict):
        return isinstance(value, dict) and all(key not in own or _alike(item, own[key]) for key, item in value.items())
    if isinstance(own, (list, tuple)):
        return isinstance(value, list) and len(value) == len(own) and all(map(_alike, value, own))
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or own is None or type(value) is type(own)


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: a tensor, or an object that has them as ``logits``."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TrainingError(f"the model gives {got}, need logits [N, classes]")
    return logits
