"""Values derived from a module's weights: kept outside of the module, and valid only as long as nothing they came from has changed.

A folded or packed weight is worth keeping only if asking whether it is still right costs less than the kernel that uses it, some tens of
microseconds. So what can change is laid out once in flat tuples. Two functions go through these, :func:`unchanged` and :func:`marks`, and their
twins in C (``csrc/host/watch.cpp``), which take a third of the time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vitkernels import host

Plan = TypeVar("Plan")
Value = TypeVar("Value")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm1d: ("training", "eps", "track_running_stats"),
    nn.BatchNorm2d: ("training", "eps", "track_running_stats"),
    nn.LayerNorm: ("eps",),
    nn.GELU: ("approximate",),
}
_Many = tuple[Any, ...]


def unchanged(
    tables: _Many, contents: _Many, empty: _Many, modules: _Many, classes: _Many, own: _Many, owners: _Many, names: _Many, values: _Many
) -> bool:
    """Whether everything still is as it was.

    The dictionaries ``tables`` hold just ``contents``, nothing is in ``empty``, the modules have these classes, no dictionary of ``own`` holds a
    ``forward``, and ``owners[i][names[i]]`` equals ``values[i]``. All but the last are compared by identity.
    """
    found = list(chain.from_iterable(map(dict.values, tables)))
    return (
        len(found) == len(contents)
        and all(map(is_, found, contents))
        and not any(empty)
        and all(map(is_, map(type, modules), classes))
        and not any(map(contains, own, repeat("forward")))
        and tuple(map(getitem, owners, names)) == values
    )


def marks(tensors: tuple[Tensor, ...], *_asked: Any) -> Hashable:
    """The version and the address of each tensor.

    Raises:
        RuntimeError: a tensor has none, as those made in inference mode have no version.
    """
    return tuple(map(attrgetter("_version"), tensors)), tuple(map(Tensor.data_ptr, tensors))


_ASKED = (Tensor._version, Tensor.data_ptr, (Tensor, nn.Parameter))  # what C would have to look up


class _Snapshot:
    """What the modules below a module are: their classes, children, tensors, hooks, and the settings of PyTorch's own layers.

    It holds no reference to the module itself, but to everything below: an identity that is compared must not be given to another object meanwhile.
    """

    def __init__(self, module: nn.Module, below: tuple[str, ...] = ()) -> None:
        modules = list(module.modules())
        inner = modules[1:]
        hooks = [getattr(m, name) for m in inner for name in _HOOKS]
        tables: list[dict[str, Any]] = [table for m in modules for table in (m._modules, m._parameters, m._buffers)]
        filled, empty = [table for table in tables if table], [table for table in tables if not table]
        settings = [(m.__dict__, name) for m in inner for kind, names in _SETTINGS.items() if isinstance(m, kind) for name in names]
        settings += [(m.__dict__, name) for m in inner for asked in below if asked in m.__dict__ for name in (asked, "training")]
        self._was: tuple[_Many, ...] = (
            tuple(filled),
            tuple(chain.from_iterable(map(dict.values, filled))),
            (*empty, *hooks),  # nobody's hook waits below
            tuple(inner),
            tuple(map(type, inner)),
            tuple(m.__dict__ for m in inner),
            tuple(own for own, _ in settings),
            tuple(name for _, name in settings),
            tuple(own[name] for own, name in settings),
        )
        named = chain.from_iterable(map(dict.items, filled))
        # A norm's count of batches goes into no value.
        self.tensors = tuple(value for name, value in named if isinstance(value, Tensor) and name != "num_batches_tracked")

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return bool((host.compiled("unchanged") or unchanged)(*self._was))

    def marks(self) -> Hashable:
        """What changes with every write to a tensor that is counted, and with its memory; see :func:`marks`."""
        return (host.compiled("marks") or marks)(self.tensors, *_ASKED)


@dataclass(frozen=True)
class _State(Generic[Value]):
    """The values made while the tensors bore these marks, and what keeps the tensors' memory from being handed out again."""

    marks: Hashable
    sources: tuple[Tensor, ...]
    kept: dict[Hashable, Value]


class _Entry(Generic[Plan, Value]):
    """What is known of one module."""

    def __init__(self, module: nn.Module, plan: Plan, settings: Any, below: tuple[str, ...]) -> None:
        self.snapshot = _Snapshot(module, below)
        self.plan, self.settings = plan, settings
        self._state: _State[Value] = _State(None, (), {})

    def value(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """``make()`` without gradients, or what it returned for this ``key`` if no tensor was written since."""
        tensors = self.snapshot.tensors
        try:
            marks = self.snapshot.marks()
        except RuntimeError:  # inference tensors count no versions
            return _without_gradient(make)
        state = self._state  # read and replaced as one: other threads may be here, too
        if marks != state.marks:
            # `parameter.data = other` (as in module.half()) changes neither identity nor version: only the address tells, as long as
            # the old memory is held and cannot be handed out again.
            state = self._state = _State(marks, tuple(tensor.detach() for tensor in tensors), {})
        if key not in state.kept:
            value = _without_gradient(make)
            if _written_unseen(tensors):
                return value
            state.kept[key] = value
        return state.kept[key]

    def forget(self) -> None:
        """Drop the values: somebody may write the tensors by ways that count no version (``parameter.data.add_()``, some fused optimizers)."""
        self._state = _State(None, (), {})


def _without_gradient(make: Callable[[], Value]) -> Value:
    # Ordinary tensors even in inference mode: a later call may want them saved for the gradient of its input.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _written_unseen(tensors: tuple[Tensor, ...]) -> bool:
    """True where writes count no version: in memory shared with other processes, and where FSDP gathers weights into the tensors of the last time."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or any(tensor.device.type == "cpu" and tensor.is_shared() for tensor in tensors)


class Derived(Generic[Plan, Value]):
    """What is derived from modules of one kind: a plan (what stands where, valid while the modules stay the same), and values made of their tensors.

    Not part of any module: not in its ``state_dict``, its pickles or its copies. An entry lives as long as its module.

    Args:
        plan: makes the plan of a module.
        settings: what the plan read of the module's own attributes, beside everything below it.
        below: names of attributes, other than those of convolutions and norms, that the plan read of modules below it.
    """

    def __init__(self, plan: Callable[[Any], Plan], settings: Callable[[Any], Any], below: tuple[str, ...] = ()) -> None:
        self._plan, self._settings, self._below = plan, settings, below
        self._entries: weakref.WeakKeyDictionary[nn.Module, _Entry[Plan, Value]] = weakref.WeakKeyDictionary()
        _all.append(self)

    def entry(self, module: nn.Module) -> _Entry[Plan, Value]:
        """The plan and the values of ``module`` as it is now."""
        entry = self._entries.get(module)
        settings = self._settings(module)
        if entry is None or entry.settings != settings or not entry.snapshot.holds():
            entry = _Entry(module, self._plan(module), settings, self._below)
            if entry.snapshot.holds():
                self._entries[module] = entry
            else:  # a hook waits below, and nothing that is compared would tell when it is gone
                self.drop(module)
        return entry

    def forget(self, module: nn.Module) -> None:
        """Drop the values of ``module``, if there are any; see :meth:`_Entry.forget`."""
        if (entry := self._entries.get(module)) is not None:
            entry.forget()

    def drop(self, module: nn.Module) -> None:
        self._entries.pop(module, None)


_all: list[Derived[Any, Any]] = []


def drop(module: nn.Module) -> None:
    """Free everything derived from ``module``."""
    for derived in _all:
        derived.drop(module)


def gradient_wanted(*groups: Iterable[Tensor]) -> bool:
    """True if autograd has to see what is made of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensors in groups for tensor in tensors)
