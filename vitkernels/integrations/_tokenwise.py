"""Which layers of a model work on each token by itself: what lets a whole model or block run on its tokens in another arrangement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vitkernels.integrations._fused import Fused, original_name, published, qualified
from vitkernels.nn import _checks


class Inner(Fused):
    """Base of the layers between which tokens are exchanged, attention: they are replaced with what is around them, and know its arrangement."""

    _vk_skips: ClassVar[frozenset[str]] = frozenset()
    """Names of children that are not called; what may stand there is for :meth:`_vk_why_not_layers` to say."""

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        """Why what lies between the layers that are called cannot be taken over; ``None`` if it can."""
        return None


class Layers:
    """The layers of a model: which are replaced with it, and whether it can run on its tokens in another arrangement than [B, N, D].

    Args:
        parts: the layers that are replaced, by the qualified name of their class.
        known: qualified names of classes that work on each token by itself, or only call such, and whose children are therefore looked at.
    """

    def __init__(self, parts: Mapping[str, type[Inner]], known: Iterable[str] = ()) -> None:
        self._parts, self._kinds = parts, tuple(parts.values())
        self._known = frozenset(known) | _TOKENWISE
        self._seen: set[type] = set()  # classes whose names were found there: a look-up by class is quicker

    def parts_of(self, modules: Iterable[nn.Module]) -> dict[nn.Module, type[Fused]]:
        """The layers to replace in ``modules``."""
        found = {module: _name(module) for root in modules for module in root.modules()}
        return {module: self._parts[name] for module, name in found.items() if name in self._parts}

    def why_not(self, modules: Iterable[nn.Module], *, running: bool, calm: bool = False) -> str | None:
        """Why ``modules`` cannot be run so; ``running``: the parts are replaced already; ``calm``: nor may any draw random numbers in this call.

        Beside a small block this walk is no small matter: attributes are read where PyTorch keeps them, and nothing empty is looped over.
        """
        stack: list[nn.Module | None] = list(modules)
        # A graph that torch.compile makes would be guarded by it, and made anew with every class that another model brings.
        seen: set[type] = set() if torch.compiler.is_compiling() else self._seen
        while stack:
            if (module := stack.pop()) is None:
                continue
            own, cls = module.__dict__, type(module)
            if _checks.hooked(module) and _checks.watched(module):
                return f"its {cls.__name__} {_checks.HOOKED}"
            children = own["_modules"]
            if cls not in seen:
                kind = cls if issubclass(cls, self._kinds) else None if running else self._parts.get(_name(module))
                if kind is not None:
                    if (reason := kind._vk_why_not_layers(module)) is not None:
                        return reason
                    children = {name: child for name, child in children.items() if name not in kind._vk_skips}
                elif original_name(module) in self._known:
                    seen.add(cls)
                else:
                    return f"its {cls.__name__} is not known to work on each token by itself"
            if calm and own["training"] and _draws(own):
                return "its layers draw random numbers in this call"
            if parameters := own["_parameters"]:
                for parameter in parameters.values():
                    if type(parameter) is nn.Parameter or parameter is None:
                        continue
                    if (reason := _checks.why_not_weight("a weight inside", parameter)) is not None:
                        return reason
            if children:
                stack += children.values()
        return None


def random_in(modules: Iterable[nn.Module], *, now: bool = False) -> bool:
    """Whether some layer below draws random numbers in training (``now``: in this call), in the order of the elements or one for each image."""
    return any(_draws(module.__dict__) for root in modules for module in root.modules() if module.training or not now)


def _draws(own: Mapping[str, Any]) -> bool:
    return bool(own.get("p") or own.get("drop_prob"))


def _name(module: nn.Module) -> str:
    return qualified(published(type(module)))


_TOKENWISE = frozenset(
    {
        *(f"torch.nn.modules.container.{name}" for name in ("Sequential", "ModuleList")),
        *(f"torch.nn.modules.activation.{name}" for name in ("GELU", "SiLU", "ReLU", "Tanh", "Sigmoid")),
        *(f"torch.nn.modules.normalization.{name}" for name in ("LayerNorm", "RMSNorm")),
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.dropout.Dropout",
    }
)
