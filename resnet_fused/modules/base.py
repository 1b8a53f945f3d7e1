"""The base of every fused module, and how an existing module becomes one by a change of class.

A module of a user's class is fused by giving the very same object a class derived from both ours and its own. So its
parameters, buffers, hooks, attributes, methods and identity stay what they were, its original forward is at hand for
whatever cannot be fused at the moment, and giving the class back undoes it.
"""

from __future__ import annotations

import copyreg
import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused.modules.spec import FusedState
from resnet_fused.ops import packed

M = TypeVar("M", bound="FusedModule")


class FusedModule(nn.Module):
    """A module that computes parts of itself with fused ops. It holds the original parameters and buffers only."""

    _rf_state: FusedState

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The user's hook has run for the user's class; a class that fusion derives from it is not the user's."""
        if "_rf_original_class" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles instead: the module with its own classes, sharing all tensors."""
        return _as_written(self, {})

    def _rf_parts(self) -> Iterable[nn.Module]:
        """The submodules whose parameters the fused ops take."""
        return (self,)

    def _rf_refresh(self) -> None:
        """Drop what backends packed from this module's tensors.

        Needed only after writes that neither PyTorch counts nor a look at some elements finds: :func:`refresh`.
        """
        self._rf_state.prepared.drop()
        packed.drop(tuple(t for part in self._rf_parts() for t in (*part.parameters(), *part.buffers())))

    def train(self: M, mode: bool = True) -> M:
        super().train(mode)
        self._rf_refresh()
        return self

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        self._rf_refresh()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._rf_refresh()
        super()._load_from_state_dict(*args, **kwargs)


def refresh(model: nn.Module) -> None:
    """Drop what backends packed from the fused modules in ``model``.

    Needed after two kinds of writes, which may hide for some calls otherwise: single elements written in a way that
    PyTorch does not count (through ``.data``, numpy or another process), and, on a GPU, whole tensors so written.
    """
    for module in model.modules():
        if isinstance(module, FusedModule):
            module._rf_refresh()


_DERIVED: dict[tuple[type, type], type[FusedModule]] = {}
_LOCK = threading.Lock()


def derived_class(fused: type[FusedModule], original: type[nn.Module]) -> type[FusedModule]:
    """The class of an ``original`` that is fused by ``fused``: both of them, made once per pair."""
    with _LOCK:
        derived = _DERIVED.get((fused, original))
        if derived is None:
            derived = _DERIVED[fused, original] = _derive(fused, original)
        return derived


class _Theirs:
    """Stands for a class attribute of ours in a class derived from the user's: it is what their class has, if any."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: Any) -> Any:
        found = inspect.getattr_static(owner._rf_original_class, self.name, self)
        if found is self:
            raise AttributeError(f"no attribute {self.name}")  # nn.Module then looks among its submodules
        return found.__get__(instance, owner) if hasattr(found, "__get__") else found


_PACKAGE = __name__.rpartition(".")[0]
_OVERRIDDEN = ("forward", "train", "_apply", "_load_from_state_dict")


def _derive(fused: type[FusedModule], original: type[nn.Module]) -> type[FusedModule]:
    namespace: dict[str, Any] = {
        "__init__": original.__init__,
        "__doc__": original.__doc__,
        "__module__": fused.__module__,
        "_rf_original_class": original,
        "_rf_original_forward": original.forward,
    }
    ours = [vars(base) for base in fused.__mro__ if base.__module__.startswith(_PACKAGE)]
    for name in dict.fromkeys(name for names in ours for name in names):
        if not name.startswith(("__", "_rf_")) and name not in _OVERRIDDEN:
            namespace[name] = _Theirs(name)

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
    return vars(type(module)).get("_rf_original_class")


def adopt(module: nn.Module, fused: type[FusedModule], state: FusedState) -> None:
    """Fuse ``module`` in place, by a change of its class."""
    derived = derived_class(fused, type(module))
    object.__setattr__(module, "__class__", derived)  # past a __setattr__ of the user's
    module.__dict__["_rf_state"] = state


def release(module: FusedModule) -> None:
    """Undo :func:`adopt`."""
    original = original_class(module)
    assert original is not None
    module._rf_refresh()
    object.__setattr__(module, "__class__", original)
    del module.__dict__["_rf_state"]


def _as_written(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """``module`` with every fused part in it as its own class has it: other objects, with the same tensors and hooks.

    Raises:
        RuntimeError: a part is ours by birth, whose forward is not in TorchScript.
    """
    if id(module) in done or not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return done.get(id(module), module)
    cls = original_class(module) or type(module)
    if issubclass(cls, FusedModule):
        raise RuntimeError(
            f"torch.jit.script: a {cls.__name__} of this package has no TorchScript form; use torch.jit.trace, or "
            "script a model of another package, such as torchvision's, which fuse() takes"
        )
    twin = done[id(module)] = cls.__new__(cls)
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name != "_rf_state"})
    twin.__dict__["_modules"] = {name: _as_written(m, done) for name, m in module._modules.items()}  # type: ignore[arg-type]
    return twin


def _blank(fused: type[FusedModule], original: type[nn.Module]) -> FusedModule:
    cls = derived_class(fused, original)
    return cls.__new__(cls)
