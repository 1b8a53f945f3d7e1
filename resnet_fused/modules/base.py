"""What every fused module has in common, and how an existing module becomes one by a change of class.

A module of somebody's class is fused by giving the very same object a class derived from both ours and its own. So its
parameters, buffers, hooks, attributes, methods and identity stay what they were, its original forward is at hand for
whatever cannot be fused at the moment, and undoing it is giving the class back.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from resnet_fused.modules.spec import FusedState
from resnet_fused.ops import packed

M = TypeVar("M", bound="FusedModule")


class FusedModule(nn.Module):
    """A module that computes parts of itself with fused ops. It holds the original parameters and buffers only."""

    _fused: FusedState

    def fused_parts(self) -> Iterable[nn.Module]:
        """The submodules whose parameters the fused ops take."""
        return (self,)

    def refresh(self) -> None:
        """Drop what backends packed from this module's tensors.

        Needed only after writes that PyTorch does not count: through ``.data``, or into inference tensors' storage.
        """
        packed.drop(tuple(t for part in self.fused_parts() for t in (*part.parameters(), *part.buffers())))

    def train(self: M, mode: bool = True) -> M:
        super().train(mode)
        self.refresh()
        return self

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        self.refresh()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refresh()
        super()._load_from_state_dict(*args, **kwargs)


def refresh(model: nn.Module) -> None:
    """Call :meth:`FusedModule.refresh` on every fused module in ``model``: after writes through ``.data``."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.refresh()


_DERIVED: dict[tuple[type, type], type[FusedModule]] = {}
_LOCK = threading.Lock()


def derived_class(fused: type[FusedModule], original: type[nn.Module]) -> type[FusedModule]:
    """The class of an ``original`` that is fused by ``fused``: both of them, made once per pair."""
    with _LOCK:
        derived = _DERIVED.get((fused, original))
        if derived is None:
            derived = _DERIVED[fused, original] = _derive(fused, original)
        return derived


def _derive(fused: type[FusedModule], original: type[nn.Module]) -> type[FusedModule]:
    namespace: dict[str, Any] = {
        "__init__": original.__init__,
        "__doc__": original.__doc__,
        "__module__": fused.__module__,
        "_original_class": original,
        "_original_forward": original.forward,
    }
    if hasattr(original, "expansion"):
        namespace["expansion"] = original.expansion

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        """Pickle and copy by the two classes: the derived one can be found under no name."""
        reduced: Any = super(derived, self).__reduce_ex__(max(2, int(protocol)))  # type: ignore[misc]
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (fused, original), *reduced[2:])
        return reduced

    namespace["__reduce_ex__"] = reduce_ex
    derived: type[FusedModule] = type(fused.__name__, (fused, original), namespace)
    return derived


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` had before it was fused, or None when it was not (or was born fused)."""
    return vars(type(module)).get("_original_class")


def adopt(module: nn.Module, fused: type[FusedModule], state: FusedState) -> None:
    """Fuse ``module`` in place, by a change of its class."""
    module.__class__ = derived_class(fused, type(module))
    module._fused = state  # type: ignore[assignment]


def release(module: FusedModule) -> None:
    """Undo :func:`adopt`."""
    original = original_class(module)
    assert original is not None
    module.refresh()
    module.__class__ = original  # type: ignore[assignment]
    del module._fused


def _blank(fused: type[FusedModule], original: type[nn.Module]) -> FusedModule:
    cls = derived_class(fused, original)
    return cls.__new__(cls)
