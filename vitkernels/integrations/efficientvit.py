"""Whole EfficientViTs (MSRA, arXiv 2305.07027) in inference: a stage, the patch embedding, a whole model with its head, each as one chain of layers.

timm's classes and the authors' keep their layers under the same names, so one description of what they are made of serves both. With gradients and
in training, each layer runs by itself and the attention in them as :mod:`vitkernels.integrations.cascaded_group` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.integrations._fused import Fused, Role, fell_back, original_class, original_name, qualified
from vitkernels.integrations._same import why_not_same
from vitkernels.integrations.cascaded_group import CascadedAttention
from vitkernels.nn import _chain, _checks
from vitkernels.nn._chain import Head, Other, Step, Walk, below, convolution, plain
from vitkernels.ops.chain.reference import FeedForward, SqueezeExcite

_SIGMOIDS = ("torch.nn.modules.activation.Sigmoid", "timm.layers.activations.Sigmoid")


# --- what the classes are made of -------------------------------------------------------------------------------------------------------


def _conv_norm(walk: Walk, name: str, module: Any) -> list[Step]:
    return [convolution(name, module)]


def _residual(walk: Walk, name: str, module: Any) -> list[Step]:
    if module.training and module.drop > 0:
        raise Other(f"{name} is in training, and drops samples")
    steps = walk.steps(below(name, "m"), module.m)
    if len(steps) != 1 or steps[0].residual:
        raise Other(f"{below(name, 'm')} is more than one layer")
    return [steps[0]._replace(residual=True)]


def _feed_forward(walk: Walk, name: str, module: Any) -> list[Step]:
    plain(below(name, "act"), module.act, nn.ReLU)
    return [_chain.twice(FeedForward, (below(name, "pw1"), below(name, "pw2")), (module.pw1, module.pw2))]


def _window_attention(walk: Walk, name: str, module: Any) -> list[Step]:
    return walk.steps(below(name, "attn"), module.attn)


def _attention(walk: Walk, name: str, module: Any) -> list[Step]:
    return [_chain.attention(module)]


def _block(walk: Walk, name: str, module: Any) -> list[Step]:
    return [step for part in ("dw0", "ffn0", "mixer", "dw1", "ffn1") for step in walk.steps(below(name, part), module._modules[part])]


def _squeeze_excite(walk: Walk, name: str, module: Any) -> list[Step]:
    if module.add_maxpool:
        raise Other(f"{name} takes the maximum, too")
    plain(below(name, "bn"), module.bn, nn.Identity)
    plain(below(name, "act"), module.act, nn.ReLU)
    if qualified(type(module.gate)) not in _SIGMOIDS or _checks.hooked(module.gate):
        raise Other(f"{below(name, 'gate')} is a {type(module.gate).__name__}, not a plain Sigmoid")
    return [_chain.twice(SqueezeExcite, (below(name, "fc1"), below(name, "fc2")), (module.fc1, module.fc2))]


def _patch_merging(walk: Walk, name: str, module: Any) -> list[Step]:
    plain(below(name, "act"), module.act, nn.ReLU)
    first, second = (convolution(below(name, part), module._modules[part], relu=True) for part in ("conv1", "conv2"))
    return [first, second, *walk.steps(below(name, "se"), module.se), convolution(below(name, "conv3"), module.conv3)]


def _stage(walk: Walk, name: str, module: Any) -> list[Step]:
    return [step for part in ("downsample", "blocks") for step in walk.steps(below(name, part), module._modules[part])]


def _sequence(walk: Walk, name: str, module: Any) -> list[Step]:
    return walk.sequence(name, module)


def _model(walk: Walk, name: str, module: Any) -> list[Step]:
    return [step for part in ("patch_embed", "stages") for step in walk.steps(part, module._modules[part])]


def _authors_model(walk: Walk, name: str, module: Any) -> list[Step]:
    return [step for part in ("patch_embed", "blocks1", "blocks2", "blocks3") for step in walk.steps(part, module._modules[part])]


def _head(name: str, module: Any) -> Head:
    """A linear layer, or a norm and a linear layer, with Dropout anywhere."""
    if type(module) is nn.Linear:
        return _chain.head(name, None, module)
    plain(name, module, nn.Sequential)
    parts = []
    for child, part in module._modules.items():
        if type(part) is not nn.Dropout:
            parts.append((child, part))
        elif (part.training and part.p > 0) or _checks.hooked(part):
            raise Other(f"{below(name, child)} has a hook, or drops values")
    if len(parts) != 2:
        raise Other(f"{name} is more than a norm and a linear layer")
    (_, norm), (linear_name, linear) = parts
    return _chain.head(below(name, linear_name), norm, linear)


_MSRA = "timm.models.efficientvit_msra"

TIMM = Walk(
    {
        "timm.layers.squeeze_excite.SEModule": _squeeze_excite,
        f"{_MSRA}.ConvNorm": _conv_norm,
        f"{_MSRA}.ConvMlp": _feed_forward,
        f"{_MSRA}.ResidualDrop": _residual,
        f"{_MSRA}.CascadedGroupAttention": _attention,
        f"{_MSRA}.LocalWindowAttention": _window_attention,
        f"{_MSRA}.EfficientVitBlock": _block,
        f"{_MSRA}.PatchMerging": _patch_merging,
        f"{_MSRA}.EfficientVitStage": _stage,
        f"{_MSRA}.PatchEmbedding": _sequence,
        f"{_MSRA}.EfficientVitMsra": _model,
        "torch.nn.modules.conv.Conv2d": _conv_norm,  # of a model whose norms were folded away
    },
    original_name,
)

# The authors' classes are copied into projects under many module names: known by their own, and checked by running the whole model.
AUTHORS = Walk(
    {
        "SEModule": _squeeze_excite,
        "Conv2d_BN": _conv_norm,
        "FFN": _feed_forward,
        "Residual": _residual,
        "CascadedGroupAttention": _attention,
        "LocalWindowAttention": _window_attention,
        "EfficientViTBlock": _block,
        "PatchMerging": _patch_merging,
        "EfficientViT": _authors_model,
        "Conv2d": _conv_norm,
    },
    lambda module: original_class(module).__name__,
)


# --- replacements -------------------------------------------------------------------------------------------------------------------------


class Chain(Fused):
    """A module that is a chain of layers: ``EfficientVitStage``, ``PatchEmbedding``."""

    _vk_op: ClassVar[str] = "layer_chain"
    _vk_in_evaluation: ClassVar[bool] = True
    _vk_walk: ClassVar[Walk] = TIMM

    def _vk_steps(self) -> list[Step]:
        return self._vk_walk.steps("", self)

    def _vk_head(self) -> Head | None:
        return None

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        for path, part in module.named_modules():
            if original_class(part).__name__ == "CascadedGroupAttention" and not issubclass(role(part), CascadedAttention):
                return f"its {path} is not replaced"
        try:
            steps = cls._vk_walk.steps("", module)
        except Other as other:
            return str(other)
        for tensor in (tensor for step in steps for layer in step.layers for tensor in layer.tensors()):
            if (reason := _checks.why_not_weight("a weight", tensor)) is not None:
                return reason
        return _chain.why_no_kernel(cls._vk_weight(module))

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.parameters())

    def _vk_run(self, x: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """The chain of ``x``, and ``head`` of that if there is one, or ``None`` where this call is not for it."""
        y = _chain.run(self, x, head)
        if isinstance(y, Tensor):
            return y
        if y:
            fell_back(self, y)
        return None

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        y = self._vk_run(x)
        return super().forward(x) if y is None else y


class Model(Chain):
    """``EfficientVitMsra``: patch embedding, stages and head in one call. Where one of the first has a hook, each is a chain by itself."""

    def _vk_head(self) -> Head | None:
        pool = self.global_pool
        if qualified(type(pool)) != "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d" or _checks.hooked(pool):
            raise Other("global_pool has a hook, or is not timm's own")
        plain("global_pool.pool", pool.pool, nn.AdaptiveAvgPool2d)
        plain("global_pool.flatten", pool.flatten, nn.Flatten)
        if pool.pool.output_size not in (1, (1, 1)) or (pool.flatten.start_dim, pool.flatten.end_dim) != (1, -1):
            raise Other("global_pool is more than a mean")
        return _head("head", self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        y = self._vk_run(x)
        return super().forward_features(x) if y is None else y

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        if not self.__dict__.keys().isdisjoint(("forward_features", "forward_head")):
            return super(Chain, self).forward(x)
        y = self._vk_run(x, self.forward_head)
        return self.forward_head(super().forward_features(x)) if y is None else y


class AuthorsModel(Chain):
    """The authors' ``EfficientViT``, made for images of one size."""

    _vk_walk: ClassVar[Walk] = AUTHORS

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if (reason := super()._vk_why_not(module, role)) is not None:
            return reason
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        shape, width = (convolutions[0].in_channels, *_image_size(module)), max(layer.out_channels for layer in convolutions)
        return why_not_same("the authors' EfficientViT", module, {"": cls}, shape, width=width)

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result, and for an image of another size its error."""
        if x.shape[2:] != _image_size(self):
            fell_back(self, "the image is not of the size that the model was made for")
            return super(Chain, self).forward(x)
        y = self._vk_run(x, lambda y: self.head(F.adaptive_avg_pool2d(y, 1).flatten(1)))
        return super(Chain, self).forward(x) if y is None else y

    def _vk_head(self) -> Head | None:
        return _head("head", self.head)


def _image_size(model: Any) -> tuple[int, int]:
    """The map that the first attention was made for, times the strides before it."""
    first = next(module for module in model.blocks1.modules() if hasattr(module, "window_resolution"))
    side = first.resolution * math.prod(module.stride[0] for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d))
    return side, side
