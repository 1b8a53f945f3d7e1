"""Training data: images with their classes. Augmentation is a function of the seed, the epoch and the image alone.

So nothing about the data needs to be kept in a checkpoint but how far the run has come, whatever loads the images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from resnet_fused.training import images
from resnet_fused.training.errors import DataError

# What ImageNet models are fed: means and deviations of red, green and blue.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
DIGITS = "digits"  # the name of the data set that needs no files
SMALL = 64  # pixels up to which an image is too small to be cut to a part of it

Transform = Callable[[Any], Tensor]


class Images(Dataset[tuple[Tensor, int]]):
    """Images ``[C, S, S]`` in float32, with the index of their class."""

    def __len__(self) -> int:
        raise NotImplementedError


class TensorImages(Images):
    """Images that lie in one tensor ``[N, C, S, S]``, their classes in ``[N]``."""

    def __init__(self, x: Tensor, y: Tensor, transform: Transform | None = None) -> None:
        self.x, self.y, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.x[index]
        return image if self.transform is None else self.transform(image), int(self.y[index])


class ImageFiles(Images):
    """Images in files. One that is broken, or beyond the bounds of ``images``, raises DataError, naming the file."""

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            image = images.read(Path(path))
        except images.ImageError as error:
            raise DataError(f"{path}: {error}") from error
        return self.transform(image), label


@dataclass(frozen=True)
class Data:
    """Images to learn from and to be tested on, the names of their classes, and a digest that tells data sets apart."""

    train: Images
    val: Images
    classes: tuple[str, ...]
    digest: str


class Keyed(Dataset[Any]):
    """``images`` by (epoch, index): every draw in an image's augmentation follows from these two and the seed.

    A broken image comes as the DataError itself, so that it reaches the run unchanged from the process that read it.
    """

    def __init__(self, images: Images, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | DataError:
        text = f"{self.seed} {key[0]} {key[1]}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                return self.images[key[1]]
            except DataError as error:
                return error


def collate(items: list[Any]) -> Any:
    """A batch (images, classes), or the first DataError among its items."""
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)


class Shift:
    """An image moved by up to ``reach`` pixels; what leaves on one side comes in on the other."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, image: Tensor) -> Tensor:
        dy, dx = torch.randint(-self.reach, self.reach + 1, (2,)).tolist()
        return torch.roll(image, (dy, dx), (-2, -1))


def digits(size: int, seed: int, *, channels: int = 3, augment: bool = True) -> Data:
    """scikit-learn's 1797 handwritten digits, scaled up from 8×8 to ``size``; a fifth of each digit for testing.

    Mean 0 and deviation 1 over the training images, which are moved by up to an eighth of their size: the border is
    background.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, val, train_y, val_y = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed % 2**32
    )  # fmt: skip

    def upscaled(flat: Any) -> Tensor:
        x = torch.from_numpy(flat).float().view(-1, 1, 8, 8)
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    train_x, val_x = upscaled(train), upscaled(val)
    mean, deviation = train_x.mean(), train_x.std()

    def dataset(x: Tensor, y: Any, transform: Transform | None = None) -> TensorImages:
        return TensorImages(((x - mean) / deviation).repeat(1, channels, 1, 1), torch.from_numpy(y), transform)

    moved = Shift(size // 8) if augment else None
    return Data(
        dataset(train_x, train_y, moved), dataset(val_x, val_y), tuple("0123456789"), f"digits {size} {seed}"
    )  # fmt: skip


def image_folder(
    folder: Path, size: int, seed: int, *, channels: int = 3, augment: bool = True, val_fraction: float = 0.2
) -> Data:
    """Images in one folder per class: those in ``folder/train`` and ``folder/val``, or a split of ``folder`` itself.

    Training images are cropped and flipped at random: above 64 pixels by torchvision's RandomResizedCrop, below by a
    RandomCrop of the image with an eighth of padding. Images for testing are scaled and cut at the centre.

    Args:
        folder: class folders, or ``train`` and ``val`` with the same class folders.
        size: height and width of an image.
        seed: of the split.
        channels: 3 or 1, in which case images are made grey.
        augment: whether to crop and flip at random.
        val_fraction: of each class, where there are no ``train`` and ``val``.

    Raises:
        DataError: a folder is missing, holds no class, a class holds no image or too few to split, or ``train`` and
            ``val`` hold other classes; the message names the folder.
    """
    from resnet_fused.testing.torchvision_compat import import_torchvision

    import_torchvision()
    parts = [folder / "train", folder / "val"]
    if all(part.is_dir() for part in parts):
        (classes, train), (val_classes, val) = (_samples(part) for part in parts)
        if val_classes != classes:
            odd = min(set(classes) ^ set(val_classes))
            raise DataError(f"{parts[odd in classes] / odd}: no such folder; train and val need the same classes")
    else:
        classes, samples = _samples(folder)
        train, val = _split(folder, classes, samples, val_fraction, seed)
    digest = hashlib.sha256()
    for path, label in (*train, ("", -1), *val):
        digest.update(f"{path[len(str(folder)) :]}\0{label}\n".encode(errors="surrogateescape"))
    testing = evaluation_transform(size, channels)
    training = _train_transform(size, channels) if augment else testing
    return Data(ImageFiles(train, training), ImageFiles(val, testing), tuple(classes), digest.hexdigest())


def _samples(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (path, class) of every image, both sorted."""
    from torchvision.datasets import folder as torchvision_folder

    try:
        classes, indices = torchvision_folder.find_classes(folder)
    except FileNotFoundError:
        reason = "holds no class folders" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {reason}") from None
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    extensions = torchvision_folder.IMG_EXTENSIONS
    samples = [(path, indices[name]) for name in classes for path in _images_in(os.path.join(folder, name), extensions)]
    present = {label for _, label in samples}
    for name in classes:
        if indices[name] not in present:
            raise DataError(f"{folder / name}: no image in this class folder; need {', '.join(extensions)}")
    return classes, samples


def _images_in(folder: str, extensions: tuple[str, ...]) -> list[str]:
    """Paths of the images in a folder and those within it, in torchvision's order. Links are followed, but no folder is
    read twice: a link to a folder above would not end."""
    found: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found.append((parent, sorted(name for name in names if name.lower().endswith(extensions))))
    return [os.path.join(parent, name) for parent, names in sorted(found) for name in names]


def _split(
    folder: Path, classes: Iterable[str], samples: list[tuple[str, int]], fraction: float, seed: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Each class apart; both sides get at least one of its images."""
    generator = torch.Generator().manual_seed(seed)
    by_class: dict[int, list[tuple[str, int]]] = {}
    for sample in samples:
        by_class.setdefault(sample[1], []).append(sample)
    train: list[tuple[str, int]] = []
    val: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        own = by_class[label]
        if len(own) < 2:
            raise DataError(f"{folder / name}: one image cannot be split into training and testing; add more")
        order = torch.randperm(len(own), generator=generator).tolist()
        held_out = set(order[: min(max(1, round(fraction * len(own))), len(own) - 1)])
        for i, sample in enumerate(own):
            (val if i in held_out else train).append(sample)
    return train, val


def evaluation_transform(size: int, channels: int = 3) -> Transform:
    """What makes ``[channels, size, size]`` of a PIL image for testing: scaled, cut at the centre, normalised."""
    from torchvision.transforms import v2

    return v2.Compose(  # type: ignore[no-any-return]
        [v2.Resize(size if size <= SMALL else round(size * 256 / 224)), v2.CenterCrop(size), *_last(channels)]
    )


def _last(channels: int) -> list[Transform]:
    from torchvision.transforms import v2

    mean, deviation = (MEAN, DEVIATION) if channels == 3 else ((sum(MEAN) / 3,), (sum(DEVIATION) / 3,))
    grey = [v2.Grayscale()] if channels == 1 else []
    return [*grey, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation)]


def _train_transform(size: int, channels: int) -> Transform:
    from torchvision.transforms import v2

    if size <= SMALL:
        cut = [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, padding=size // 8)]
    else:
        cut = [v2.RandomResizedCrop(size)]
    return v2.Compose([*cut, v2.RandomHorizontalFlip(), *_last(channels)])  # type: ignore[no-any-return]
