"""The class swap: how a module becomes its fused self and back, without touching anything it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import backends
from vitkernels.nn import _derived

Role = Callable[[nn.Module], type]
"""What a module is or, for the ``accelerate`` under way, will be: its class, or the replacement mixin planned for it."""


if TYPE_CHECKING:
    Original: Any
    """Whatever class a replacement is put in front of."""
else:
    Original = object


class Fused(Original):
    """Base of every replacement: a mixin put in front of the original class, overriding ``forward`` (or the method in it that does the work) only.

    A replacement keeps no state of its own: parameters, buffers, hooks and attributes stay where the original class put them, and its
    ``super().forward`` is the original forward, used whenever a call is not one the fused path takes. Names here start with ``_vk_``, so that none
    can hide a layer or a parameter of the original.
    """

    _vk_op: ClassVar[str]
    """The op of :mod:`vitkernels.ops` that does the work."""
    _vk_absorbs: ClassVar[tuple[type[Fused], ...]] = ()
    """Replacements of modules inside that are of no use beside this one, and not made."""
    _vk_in_evaluation: ClassVar[bool] = False
    """Whether it does its work in evaluation without gradients alone."""
    _vk_same_name: ClassVar[bool] = False
    """Whether the class keeps the original's name: for zoos that look classes up by it, or write it into files."""

    @classmethod
    def _vk_why_not(cls, module: nn.Module, role: Role) -> str | None:
        """Why ``module`` cannot be replaced by this class; ``None`` if it can. ``role`` tells what its children are or will be."""
        raise NotImplementedError

    @classmethod
    def _vk_weight(cls, module: nn.Module) -> Tensor:
        """The parameter whose device and dtype decide the backend."""
        raise NotImplementedError

    @classmethod
    def _vk_backend(cls, module: nn.Module) -> str:
        """The backend that ``module`` would run on now."""
        return backends.select(cls._vk_op, cls._vk_weight(module))

    @classmethod
    def _vk_parts(cls, module: nn.Module) -> dict[nn.Module, type[Fused]]:
        """Modules inside of ``module`` that are replaced together with it, because what they do then is of use to it alone."""
        return {}

    @classmethod
    def _vk_note(cls, module: nn.Module) -> str:
        """What a user of the replaced ``module`` has to know, for the report."""
        return ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        pair = _swaps.get(type(self))
        # A class somebody derived from ours (FSDP2's, a parametrization's) pickles or refuses to by its own rules.
        return reduced if pair is None else (_rebuild, pair, *reduced[2:])


_classes: dict[tuple[type, type[Fused]], type] = {}  # (original class, replacement mixin) -> fused class
_swaps: dict[type, tuple[type, type[Fused]]] = {}  # the same, backwards
_restored: dict[type, type] = {}
_fell_back: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def fused_class(original: type, mixin: type[Fused]) -> type:
    """``original`` with ``mixin``'s forward in front; the same class for the same pair."""
    pair = (original, mixin)
    if pair not in _classes:
        body: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
        name = original.__name__ if mixin._vk_same_name else f"Fused{original.__name__}"
        _classes[pair] = type(name, (mixin, original), body)
        _swaps[_classes[pair]] = pair
    return _classes[pair]


def _rebuild(original: type, mixin: type[Fused]) -> Any:
    """Unpickle: an empty instance of the fused class, whose state follows."""
    fused: Any = fused_class(original, mixin)
    return fused.__new__(fused)


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, Fused)


def swap(module: nn.Module, mixin: type[Fused]) -> None:
    module.__class__ = fused_class(type(module), mixin)


def restore(module: nn.Module) -> None:
    """Undo :func:`swap`; a module that is not fused (any more) is left as it is."""
    if is_fused(module):
        module.__class__ = _without(type(module))
    _fell_back.pop(module, None)
    _derived.drop(module)


def _without(cls: type) -> type:
    """``cls`` with our class taken out. FSDP2 and parametrizations put a class of their own in front of ours; theirs is made again without it."""
    if cls in _swaps:
        return _swaps[cls][0]
    if cls not in _restored:
        fused = next(base for base in cls.__mro__ if base in _swaps)
        bases = tuple(_without(base) if issubclass(base, Fused) else base for base in cls.__bases__)
        # A forward that transformers' GradientCheckpointingLayer wrapped around ours is wrapped anew around the original by the call of type().
        body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__") and not hasattr(value, "__wrapped__")}
        _restored[cls] = type(cls.__name__.replace(fused.__name__, _swaps[fused][0].__name__), bases, body)
    return _restored[cls]


def origin(module: nn.Module) -> tuple[type, type[Fused]]:
    """The original class of a fused module, and the mixin in front of it."""
    return next(_swaps[cls] for cls in type(module).__mro__ if cls in _swaps)


def published(cls: type) -> type:
    """The class as its author wrote it: FSDP2 (``fully_shard``) gives each module a dynamic subclass, which is seen past."""
    if len(cls.__bases__) == 2 and cls.__bases__[0].__module__.startswith("torch.distributed."):
        return cls.__bases__[1]
    return cls


def qualified(cls: type) -> str:
    """``package.module.Class``, the name by which a zoo's class is recognised."""
    return f"{cls.__module__}.{cls.__qualname__}"


def original_class(module: nn.Module) -> type:
    """The class its author gave ``module``, replaced or not."""
    return published(origin(module)[0] if is_fused(module) else type(module))


def original_name(module: nn.Module) -> str:
    """The qualified name of :func:`original_class`."""
    return qualified(original_class(module))


def fell_back(module: nn.Module, reason: str) -> None:
    """Remember, for the handle's report, that a call of ``module`` ran the original forward."""
    if not torch.compiler.is_compiling():
        _fell_back[module] = reason


def last_fallback(module: nn.Module) -> str | None:
    return _fell_back.get(module)


def why_no_kernel(op: str, tensor: Tensor) -> str | None:
    """Why a call on such a tensor is better left to the original: nothing but the reference would run it, and nobody asked for that."""
    if backends.requested() == "auto" and backends.select(op, tensor) == "reference":
        return "no kernel runs here, and without one the original code is the best there is"
    return None
