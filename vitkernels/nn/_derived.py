"""Values derived from a module's weights: kept outside of the module, and valid only as long as nothing they came from has changed.

A folded or packed weight is worth keeping only if asking whether it is still right costs less than the kernel that uses it, some tens of
microseconds. So what can change is laid out once in flat lists that a few passes in C compare.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Plan = TypeVar("Plan")
Value = TypeVar("Value")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("training", "eps", "track_running_stats"),
    nn.LayerNorm: ("eps",),
    nn.GELU: ("approximate",),
}
_version = attrgetter("_version")


class _Snapshot:
    """What the modules below a module are: their classes, children, tensors, hooks, and the settings of PyTorch's own layers.

    It holds no reference to the module itself, but to everything below: an identity that is compared must not be given to another object meanwhile.
    """

    def __init__(self, module: nn.Module, below: tuple[str, ...] = ()) -> None:
        modules = list(module.modules())
        self._below = modules[1:]
        self._classes = list(map(type, self._below))
        self._own = [m.__dict__ for m in self._below]
        self._hooks = [getattr(m, name) for m in self._below for name in _HOOKS]
        tables: list[dict[str, Any]] = [table for m in modules for table in (m._modules, m._parameters, m._buffers)]
        self._tables = [table for table in tables if table]
        self._empty = [table for table in tables if not table]  # most of them: asked together, in a tenth of the time
        self._contents: list[Any] = list(chain.from_iterable(map(dict.values, self._tables)))
        settings = [(itemgetter(*names), m.__dict__) for m in self._below for kind, names in _SETTINGS.items() if isinstance(m, kind)]
        settings += [(itemgetter(name, "training"), m.__dict__) for m in self._below for name in below if name in m.__dict__]
        self._settings = settings
        self._values = [get(own) for get, own in settings]
        named = chain.from_iterable(map(dict.items, self._tables))
        # A norm's count of batches goes into no value.
        self.tensors: list[Tensor] = [value for name, value in named if isinstance(value, Tensor) and name != "num_batches_tracked"]

    def holds(self) -> bool:
        """Whether all of it is as it was, and nobody's hook waits below."""
        contents = list(chain.from_iterable(map(dict.values, self._tables)))
        return (
            len(contents) == len(self._contents)
            and all(map(is_, contents, self._contents))
            and not any(self._empty)
            and not any(self._hooks)
            and list(map(type, self._below)) == self._classes
            and not any(map(contains, self._own, repeat("forward")))
            and [get(own) for get, own in self._settings] == self._values
        )


@dataclass(frozen=True)
class _State(Generic[Value]):
    """The values made while the tensors bore these marks, and what keeps the tensors' memory from being handed out again."""

    marks: list[int]
    sources: list[Tensor]
    kept: dict[Hashable, Value]


class _Entry(Generic[Plan, Value]):
    """What is known of one module."""

    def __init__(self, module: nn.Module, plan: Plan, settings: Any, below: tuple[str, ...]) -> None:
        self.snapshot = _Snapshot(module, below)
        self.plan, self.settings = plan, settings
        self._state: _State[Value] = _State([], [], {})

    def value(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """``make()`` without gradients, or what it returned for this ``key`` if no tensor was written since."""
        tensors = self.snapshot.tensors
        try:
            marks = [*map(_version, tensors), *map(Tensor.data_ptr, tensors)]
        except RuntimeError:  # inference tensors count no versions
            return _without_gradient(make)
        state = self._state  # read and replaced as one: other threads may be here, too
        if marks != state.marks:
            # `parameter.data = other` (as in module.half()) changes neither identity nor version: only the address tells, as long as
            # the old memory is held and cannot be handed out again.
            state = self._state = _State(marks, [tensor.detach() for tensor in tensors], {})
        if key not in state.kept:
            value = _without_gradient(make)
            if _written_unseen(tensors):
                return value
            state.kept[key] = value
        return state.kept[key]

    def forget(self) -> None:
        """Drop the values: somebody may write the tensors by ways that count no version (``parameter.data.add_()``, some fused optimizers)."""
        self._state = _State([], [], {})


def _without_gradient(make: Callable[[], Value]) -> Value:
    # Ordinary tensors even in inference mode: a later call may want them saved for the gradient of its input.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _written_unseen(tensors: list[Tensor]) -> bool:
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
            entry = self._entries[module] = _Entry(module, self._plan(module), settings, self._below)
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


def gradient_wanted(tensors: list[Tensor]) -> bool:
    """True if autograd has to see what is made of ``tensors``."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
