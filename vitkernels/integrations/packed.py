"""Packed sequences in models: what the NaViT-like models of the three zoos share.

Each of them builds a mask [B, 1, N, N] for all its attention layers. Here the model itself is replaced. It hands its layers a :class:`PackedLayout`
in the place of the mask, and runs on the real tokens alone, [T, D]: its attention layers, which are replaced with it, know what to do with that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import backends, ops
from vitkernels.integrations._fused import Fused, Role, published, qualified
from vitkernels.nn import _checks
from vitkernels.ops import PackedLayout

_OP = "varlen_attention"


class Part(Fused):
    """Base of the layers that take a layout, from the model that they are replaced with."""

    _vk_op: ClassVar[str] = _OP
    _vk_whole: ClassVar[str]
    """The model's class."""

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return f"it is replaced only with the {cls._vk_whole} around it, which knows where each image lies: from a mask that would be too late"

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        """Why what lies between the layers that are called cannot be taken over; ``None`` if it can."""
        return None

    def _vk_attend(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, dropout: float, **options: Any) -> Tensor:
        """Attention of the layout's rows of q, k and v, [T, H, D] each: [T, H D_v]."""
        out = ops.varlen_attention(q, k, v, layout, dropout_p=dropout if self.training else 0.0, **options)
        assert isinstance(out, Tensor)
        return out.flatten(1)


class Layers:
    """The layers of a model: which are replaced with it, and whether it can run on tokens [T, D] in the place of [B, N, D].

    Args:
        parts: the layers that are replaced, by the qualified name of their class.
        known: qualified names of classes that work on each token by itself, or only call such, and whose children are therefore looked at.
    """

    def __init__(self, parts: dict[str, type[Part]], known: Iterable[str] = ()) -> None:
        self._parts, self._known = parts, frozenset(known) | _TOKENWISE

    def parts_of(self, modules: Iterable[nn.Module]) -> dict[nn.Module, type[Fused]]:
        """The layers to replace in ``modules``."""
        found = {module: _name(module) for root in modules for module in root.modules()}
        return {module: self._parts[name] for module, name in found.items() if name in self._parts}

    def why_not(self, modules: Iterable[nn.Module], *, running: bool) -> str | None:
        """Why ``modules`` cannot be run on tokens; ``running``: the parts are replaced already."""
        stack = list(modules)
        while stack:
            module = stack.pop()
            if _checks.watched(module):
                return f"its {type(module).__name__} {_checks.HOOKED}"
            if isinstance(module, Part) if running else (name := _name(module)) in self._parts:
                if (reason := (module if isinstance(module, Part) else self._parts[name])._vk_why_not_layers(module)) is not None:
                    return reason
            elif _name(module) not in self._known:
                return f"its {type(module).__name__} is not known to work on each token by itself"
            for parameter in module._parameters.values():
                if parameter is not None and (reason := _checks.why_not_weight("a weight inside", parameter)) is not None:
                    return reason
            stack += [child for child in module._modules.values() if child is not None]
        return None


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, or a stand-in that torch.compile calls and does not look into: what is different for every batch would be compiled every time."""
    if not torch.compiler.is_compiling():
        return function
    if function not in _untraced:
        _untraced[function] = torch.compiler.disable(function)
    return _untraced[function]


_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}


def why_not_here(weight: Tensor) -> str | None:
    """On a GPU whose kernels nobody has proved yet: the reference goes from image to image there, and waits for the GPU, which no original does."""
    if weight.device.type == "cpu" or backends.requested() != "auto" or backends.select(_OP, weight) != "reference":
        return None
    return backends.why_not(_OP, "triton", weight.device, weight.dtype, auto=True)


def random_now(modules: Iterable[nn.Module]) -> bool:
    """Whether some layer below draws random numbers in this call, in the order of the elements or one for each image."""
    below = (module for root in modules for module in root.modules() if module.training)
    return any(getattr(module, "p", 0.0) or getattr(module, "drop_prob", 0.0) or 0.0 for module in below)


class RealTokens:
    """Where the real tokens of a padded batch are, and the way there and back. Waits for a GPU, once. Make it with :func:`real_tokens`.

    Args:
        valid: bool [B, N].

    Attributes:
        layout: of the tokens alone, image after image.
    """

    def __init__(self, valid: Tensor) -> None:
        self._shape = valid.shape
        lengths = valid.sum(1).tolist()
        self.layout = PackedLayout.from_lengths(lengths, device=valid.device)
        self._rows = None if self.layout.total_q == valid.numel() else valid.flatten().nonzero()[:, 0]

    def pack(self, x: Tensor) -> Tensor:
        """[B, N, D] to [T, D]."""
        x = x.flatten(0, 1)
        return x if self._rows is None else x.index_select(0, self._rows)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, D] to [B, N, D], padding 0."""
        if self._rows is not None:
            x = x.new_zeros(self._shape.numel(), x.shape[1]).index_copy(0, self._rows, x)
        return x.unflatten(0, self._shape)


def real_tokens(valid: Tensor) -> RealTokens:
    """The real tokens of a batch where ``valid`` [B, N] is true."""
    return untraced(RealTokens)(valid)


def padded_layout(valid: Tensor) -> PackedLayout | None:
    """The layout of the padded batch itself, [B N] rows, in which padding is no one's key; ``None`` if the real tokens are not the first of each row.
    Waits for a GPU.
    """
    return untraced(_padded_layout)(valid)


def _padded_layout(valid: Tensor) -> PackedLayout | None:
    batch, length = valid.shape
    if (valid[:, 1:] > valid[:, :-1]).any():
        return None
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=valid.device) * length
    rows = batch * length
    return PackedLayout.from_cu_seqlens(cu_seqlens, max_seqlen_q=length, max_seqlen_k=length, total_q=rows, total_k=rows, seqused_k=valid.sum(1))


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
