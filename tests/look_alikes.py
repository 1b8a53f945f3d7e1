"""Blocks that look like residual blocks and are not quite; ``LOOK_ALIKES`` makes each by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(c_in: int = 8, c_out: int = 8, k: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False)


class Plain(nn.Module):
    """The residual block that every other one here is nearly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: Any = nn.Sequential(conv(k=1), nn.BatchNorm2d(8))

    def forward(self, x):  # type: ignore[no-untyped-def]
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def with_shortcut(make: Callable[[], Any], base: type = Plain) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = base()
        del block.shortcut
        block.shortcut = make()
        return block  # type: ignore[no-any-return]

    return build


class ShortcutFirst(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class NewSum(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class IntoShortcut(Plain):
    """The sum is written into what the shortcut gave: into x, where the shortcut does nothing."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        out = self.shortcut(x)
        out += self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out)


class Asked(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        identity = x
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut:
            identity = self.shortcut(x)
        out += identity
        return F.relu(out)


class Present(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        identity = x
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return F.relu(out)


class Hollow(nn.Sequential):
    """False where Python asks for its truth, and a projection where it is called."""

    def __len__(self) -> int:
        return 0


class Pad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :4], (0, 0, 0, 0, 2, 2))


class WritesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Mean(nn.Module):
    """``[N, C, 1, 1]``, which eager's sum broadcasts."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class OneChannel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class Widens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Evaluates(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        self.bn1.eval()
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Seeds(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        torch.manual_seed(3)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class SetsFlag(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Counts(Plain):
    calls = 0

    def forward(self, x):  # type: ignore[no-untyped-def]
        self.calls += 1
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class ReluTwice(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(F.relu(self.bn2(self.conv2(out))) + x)


class ReluOfInput(Plain):
    def forward(self, x):  # type: ignore[no-untyped-def]
        x = F.relu(x, inplace=True)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class OneNorm(Plain):
    """Its norm is used twice, and its statistics move twice."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn1(self.conv2(out)) + self.shortcut(x))


class SharedWithShortcut(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut[1] = self.bn2


class SharedShortcutFirst(ShortcutFirst):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut[1] = self.bn2


class Keyword(Plain):
    def forward(self, images):  # type: ignore[no-untyped-def]
        out = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(out)) + images)


class OurNames(Plain):
    """Attributes and methods named as ours were, or might be."""

    expansion_of = 3

    def __init__(self) -> None:
        super().__init__()
        self._pairs, self._shortcut, self._extras, self._steps, self._residual = 1, "two", [3], None, 5.0
        self._fused, self._spec, self._op, self.original = True, {}, max, conv(k=1)
        self.refresh, self.fused_parts = nn.Identity(), nn.Identity()

    def uses_given_statistics(self) -> str:
        return "mine"

    def _original_forward(self, x: Tensor) -> Tensor:
        raise AssertionError

    def stem_pairs(self) -> int:
        return 7


class OurNamesAsParts(nn.Module):
    """Parts of the block itself under such names."""

    def __init__(self) -> None:
        super().__init__()
        self.refresh, self._op, self._spec, self.fused_parts = conv(), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8)
        self.expansion, self.from_block = nn.ReLU(), nn.Sequential(conv(k=1), nn.BatchNorm2d(8))

    def forward(self, x):  # type: ignore[no-untyped-def]
        out = self.expansion(self._op(self.refresh(x)))
        return self.expansion(self.fused_parts(self._spec(out)) + self.from_block(x))


class HidesConv(Plain):
    """The class has an attribute of a submodule's name, which Python finds first."""

    conv2 = staticmethod(lambda x: x * 0.5)


class HidesShortcut(Present):
    shortcut = None


class HidesByProperty(Plain):
    @property
    def bn2(self) -> nn.Module:  # type: ignore[override]
        return self._modules["bn1"]  # type: ignore[return-value]


def hidden_in_instance() -> nn.Module:
    block = Plain()
    block.__dict__["bn1"] = nn.Identity()
    return block


def hidden_weight() -> nn.Module:
    block = Plain()
    block.conv1.__dict__["weight"] = torch.ones(8, 8, 3, 3)
    return block


class OwnTrain(Plain):
    def train(self, mode: bool = True) -> OwnTrain:
        super().train(mode)
        self.bn1.eval()
        return self


class OwnGetattr(Plain):
    def __getattr__(self, name: str) -> Any:
        return nn.Identity() if name == "relu" else super().__getattr__(name)


class OwnCall(Plain):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2  # type: ignore[no-any-return]


class OwnSetattr(Plain):
    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_rf") or name == "__class__":
            raise AttributeError(name)
        super().__setattr__(name, value)


class Meta(type):
    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Meta:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace)


class WithMeta(Plain, metaclass=Meta):
    pass


class Registry(Plain):
    made: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, label: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registry.made.append(cls)


class Slotted(Plain):
    __slots__ = ("extra",)


def edited(change: Callable[[Any], object], base: Callable[[], nn.Module] = Plain) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = base()
        change(block)
        return block

    return build


def numpy_geometry(block: Any) -> None:
    block.conv1.stride, block.conv1.padding = np.int64(1), (np.int32(1), np.int64(1))
    block.conv1.dilation, block.conv1.groups = [np.int64(1), 1], np.int64(1)


def same_padding(block: Any) -> None:
    block.conv1.padding, block.conv1.weight = "same", nn.Parameter(torch.ones(8, 8, 1, 1))


def no_channels(block: Any) -> None:
    block.conv1, block.bn1, block.conv2 = conv(8, 0), nn.BatchNorm2d(0), conv(0, 8)


LOOK_ALIKES: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "new sum": NewSum,
    "shortcut first": ShortcutFirst,
    "empty shortcut": with_shortcut(nn.Sequential),
    "identity shortcut": with_shortcut(nn.Identity),
    "pool before the projection": with_shortcut(lambda: nn.Sequential(nn.AvgPool2d(1), conv(k=1), nn.BatchNorm2d(8))),
    "in-place relu first": with_shortcut(lambda: nn.Sequential(nn.ReLU(inplace=True), conv(k=1), nn.BatchNorm2d(8))),
    "in-place relu first, called first": with_shortcut(
        lambda: nn.Sequential(nn.ReLU(inplace=True), conv(k=1), nn.BatchNorm2d(8)), ShortcutFirst
    ),
    "in-place relu alone": with_shortcut(lambda: nn.ReLU(inplace=True)),
    "in-place relu alone, called first": with_shortcut(lambda: nn.ReLU(inplace=True), ShortcutFirst),
    "in-place relu alone, new sum": with_shortcut(lambda: nn.ReLU(inplace=True), NewSum),
    "relu last": with_shortcut(lambda: nn.Sequential(conv(k=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))),
    "relu last, called first": with_shortcut(
        lambda: nn.Sequential(conv(k=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)), ShortcutFirst
    ),
    "writes its input": with_shortcut(WritesInput),
    "writes its input, called first": with_shortcut(WritesInput, ShortcutFirst),
    "into the shortcut": IntoShortcut,
    "into the shortcut, which is x": with_shortcut(nn.Identity, IntoShortcut),
    "into an empty shortcut": with_shortcut(nn.Sequential, IntoShortcut),
    "dropout": with_shortcut(lambda: nn.Sequential(conv(k=1), nn.Dropout(0.5))),
    "dropout, called first": with_shortcut(lambda: nn.Sequential(conv(k=1), nn.Dropout(0.5)), ShortcutFirst),
    "channels padded": with_shortcut(Pad),
    "channels padded, called first": with_shortcut(Pad, ShortcutFirst),
    "broadcast [N, C, 1, 1]": with_shortcut(Mean),
    "broadcast [N, C, 1, 1], new sum": with_shortcut(Mean, NewSum),
    "broadcast [N, C, 1, 1], called first": with_shortcut(Mean, ShortcutFirst),
    "broadcast one channel": with_shortcut(OneChannel, NewSum),
    "broadcast projection": with_shortcut(lambda: nn.Sequential(conv(8, 1, 1), nn.BatchNorm2d(1))),
    "broadcast projection, called first": with_shortcut(
        lambda: nn.Sequential(conv(8, 1, 1), nn.BatchNorm2d(1)), ShortcutFirst
    ),
    "broadcast pooled": with_shortcut(lambda: nn.AdaptiveAvgPool2d(1)),
    "broadcast pooled projection": with_shortcut(
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(k=1), nn.BatchNorm2d(8)), NewSum
    ),
    "wider shortcut, in place": with_shortcut(Widens),
    "wider shortcut, new sum": with_shortcut(Widens, NewSum),
    "wider shortcut, called first": with_shortcut(Widens, ShortcutFirst),
    "main branch of one channel": edited(
        lambda b: (setattr(b, "conv2", conv(8, 1)), setattr(b, "bn2", nn.BatchNorm2d(1))), NewSum
    ),
    "truth of a projection": Asked,
    "truth of an empty sequential": with_shortcut(nn.Sequential, Asked),
    "truth of a hollow module": with_shortcut(lambda: Hollow(conv(k=1), nn.BatchNorm2d(8)), Asked),
    "presence of a hollow module": with_shortcut(lambda: Hollow(conv(k=1), nn.BatchNorm2d(8)), Present),
    "no shortcut": with_shortcut(lambda: None, Present),
    "a function as shortcut": with_shortcut(lambda: torch.neg),
    "evaluates its norm": Evaluates,
    "seeds": Seeds,
    "sets a flag": SetsFlag,
    "counts its calls": Counts,
    "relu twice": ReluTwice,
    "relu of the input": ReluOfInput,
    "one norm": OneNorm,
    "norm shared with the shortcut": SharedWithShortcut,
    "norm shared with the shortcut, called first": SharedShortcutFirst,
    "another argument's name": Keyword,
    "our names": OurNames,
    "our names as parts": OurNamesAsParts,
    "a class attribute hides a convolution": HidesConv,
    "a class attribute hides the shortcut": HidesShortcut,
    "a property hides a norm": HidesByProperty,
    "an instance entry hides a norm": hidden_in_instance,
    "an instance entry hides a weight": hidden_weight,
    "train of its own": OwnTrain,
    "getattr of its own": OwnGetattr,
    "call of its own": OwnCall,
    "setattr of its own": OwnSetattr,
    "a metaclass": WithMeta,
    "a class that is told of subclasses": Registry,
    "slots": Slotted,
    "integers from numpy": edited(numpy_geometry),
    "stride as an int": edited(lambda b: setattr(b.conv1, "stride", 1)),
    "padding as a list": edited(lambda b: setattr(b.conv2, "padding", [1, 1])),
    "padding of one": edited(lambda b: setattr(b.conv2, "padding", (1,))),
    "another filter under padding='same'": edited(same_padding),
    "circular": edited(lambda b: setattr(b, "conv1", nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))),
    "norm without statistics": edited(lambda b: setattr(b, "bn1", nn.BatchNorm2d(8, track_running_stats=False))),
    "norm without an affine part": edited(lambda b: setattr(b, "bn2", nn.BatchNorm2d(8, affine=False))),
    "instance norm": edited(lambda b: setattr(b, "bn1", nn.InstanceNorm2d(8))),
    "no channels between": edited(no_channels),
    "relu6": edited(lambda b: setattr(b, "relu", nn.ReLU6(inplace=True))),
    "a hook": edited(lambda b: b.bn1.register_forward_hook(lambda m, a, out: out * 2)),
}
