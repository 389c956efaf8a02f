"""Separable self-attention (MobileViTv2) in models: what the three zoos' classes share.

An adapter (``timm.py``, ``transformers.py``, ``official.py``) says where the layers live and keeps its forward's own signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.integrations._fused import Fused, Role, fell_back, original_name, qualified
from vitkernels.nn import _checks
from vitkernels.ops.separable.reference import fold, unfold

Patch = tuple[int, int]


class Layers(NamedTuple):
    """Where an attention class keeps its layers."""

    qkv: nn.Conv2d
    out: nn.Conv2d
    attn_dropout: nn.Dropout
    out_dropout: nn.Module | None


class Attention(Fused):
    """Base of the attention replacements: both projections and what lies between them in one op."""

    _vk_op: ClassVar[str] = "separable_self_attention"

    @classmethod
    def _vk_layers(cls, module: Any) -> Layers:
        """The adapter's one duty. Whatever stands where a layer should is returned as it is, for the checks to judge."""
        raise NotImplementedError

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        layers = cls._vk_layers(module)
        return (
            cls._vk_why_not_layers(module, layers)
            or _checks.why_not_weight("the weight of qkv_proj", layers.qkv.weight)
            or _checks.why_not_weight("the weight of out_proj", layers.out.weight)
        )

    @classmethod
    def _vk_why_not_layers(cls, module: Any, layers: Layers) -> str | None:
        """Why the modules whose calls are skipped have to be called."""
        dim = layers.out.in_channels if isinstance(layers.out, nn.Conv2d) else 0
        return (
            _checks.why_not_conv1x1("out_proj", layers.out, dim, dim)
            or _checks.why_not_conv1x1("qkv_proj", layers.qkv, dim, 1 + 2 * dim)
            or _checks.why_not_bypassed("attention dropout", layers.attn_dropout, nn.Dropout)
        )

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return cls._vk_layers(module).qkv.weight

    def _vk_attend(self, x: Tensor, patch_size: Patch | None, original: Callable[[Tensor], Tensor]) -> Tensor:
        """The fused forward of ``x`` ([B, d, P, N], or the map [B, d, H, W] with ``patch_size``), or where this call is not for it ``original``,
        the original forward, which takes [B, d, P, N].
        """
        layers = self._vk_layers(self)
        qkv, out = layers.qkv, layers.out
        reason = (
            _checks.why_not_tensor(x)
            or self._vk_why_not_layers(self, layers)
            or _checks.why_not_operands(x, qkv.weight, qkv.bias, out.weight, out.bias)
        )
        if reason is not None:
            fell_back(self, reason)
            return on_tokens(original, x, patch_size)
        y = ops.separable_self_attention(
            x,
            qkv.weight,
            qkv.bias,
            out.weight,
            out.bias,
            dropout_p=layers.attn_dropout.p,
            training=layers.attn_dropout.training,
            patch_size=patch_size,
        )
        dropout = layers.out_dropout
        if dropout is None:
            return y
        # An active dropout draws its mask in the order of the elements, so it must see them in the original order.
        return on_tokens(dropout, y, patch_size if dropout.training else None)

    def _vk_cross_attend(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A call with ``x_prev``: the original's business."""
        fell_back(self, "x_prev was given (cross-attention)")
        return original(*args, **kwargs)


def on_tokens(function: Callable[[Tensor], Tensor], x: Tensor, patch_size: Patch | None) -> Tensor:
    """``function`` of [B, d, P, N] applied to a feature map, or to ``x`` itself without ``patch_size``."""
    if patch_size is None:
        return function(x)
    return fold(function(unfold(x, patch_size)), patch_size, (x.shape[2], x.shape[3]))


class Layer(Fused):
    """Base of the transformer layers: alone they change nothing, but they can take a feature map and hand it to their attention."""

    _vk_op: ClassVar[str] = "separable_self_attention"
    _vk_attention: ClassVar[str]
    """The attribute that holds the attention."""

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return None if issubclass(role(getattr(module, cls._vk_attention)), Attention) else f"its {cls._vk_attention} is not replaced"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(getattr(module, cls._vk_attention).parameters())


class Block(Fused):
    """Base of the whole blocks, which then never unfold: all their transformer layers run on the feature map.

    That is the same computation, because GroupNorm's sums run over all pixels in any order, attention reads the map by strides, and the rest works
    pixel by pixel.
    """

    _vk_op: ClassVar[str] = "separable_self_attention"
    _vk_containers: ClassVar[frozenset[str]]
    """Qualified names of the zoo's classes that apply their children one after the other to one tensor."""

    @classmethod
    def _vk_stack(cls, module: Any) -> tuple[nn.Module, Iterable[nn.Module], nn.Module]:
        """The module that holds the layers (its own call is skipped), the layers, and the norm after them."""
        raise NotImplementedError

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return cls._vk_why_not_map(module, role, running=False)

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(cls._vk_stack(module)[0].parameters())

    def _vk_takes_map(self, x: Tensor) -> bool:
        """Whether this call can run on the feature map; the reason is kept for the handle's report if not."""
        reason = _checks.why_not_tensor(x) or self._vk_why_not_map(self, type, running=True)
        if reason is not None:
            fell_back(self, reason)
        return reason is None

    @classmethod
    def _vk_why_not_map(cls, module: Any, role: Role, running: bool) -> str | None:
        holder, layers, norm = cls._vk_stack(module)
        if _checks.hooked(holder) or qualified(type(holder)) not in cls._vk_containers:
            return f"its transformer is of another class or {_checks.HOOKED}"
        for layer in layers:
            if not issubclass(role(layer), Layer):
                return f"a transformer layer ({type(layer).__name__}) is not replaced"
        # Everything between the unfold and the fold, down to the modules that cannot be looked into.
        modules: list[Any] = [*layers, norm]
        while modules:
            module = modules.pop()
            if module is None:
                continue
            if _checks.hooked(module) and _checks.watched(module):
                return f"a hook on a {type(module).__name__} expects [B, d, P, N]"
            kind = role(module)
            if kind in _PIXELWISE or issubclass(kind, Attention):
                continue
            if issubclass(kind, nn.Conv2d):
                plain = kind is nn.Conv2d and module.padding in ((0, 0), "same", "valid")
                if not plain or module.kernel_size != (1, 1) or module.stride != (1, 1):
                    return f"a {type(module).__name__} in its transformer is not a plain 1x1 convolution"
            elif kind is nn.Dropout:
                if running and module.training and module.p > 0:
                    # Its mask is drawn in the order of the elements, which is another one in the map.
                    return "dropout on its activations is active"
            elif issubclass(kind, Layer) or (name := original_name(module)) in cls._vk_containers:
                modules += module._modules.values()
            elif name not in _PIXELWISE_NAMES:
                return f"{type(module).__name__} in its transformer is not known to work pixel by pixel"
        return None


# GroupNorm is no pixelwise function, but its statistics are over all pixels of a group of channels: no order of the pixels changes them.
_PIXELWISE = frozenset(
    {nn.GroupNorm, nn.Identity, nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.ELU, nn.Hardswish, nn.Mish, nn.Tanh}
)
_PIXELWISE_NAMES = frozenset(
    {*map(qualified, _PIXELWISE), *(f"timm.layers.{name}" for name in ("norm.GroupNorm1", "norm.GroupNorm", "drop.DropPath", "activations.Swish"))}
)
