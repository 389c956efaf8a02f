"""Whole EfficientViTs (MSRA, arXiv 2305.07027) in inference: a stage, the patch embedding, the authors' whole model, each as one chain of layers.

timm's classes and the authors' keep their layers under the same names, so one description of what they are made of serves both. With gradients and
in training, each layer runs by itself and the attention in them as :mod:`vitkernels.integrations.cascaded_group` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.integrations._fused import Fused, Role, fell_back, is_fused, origin, published, qualified
from vitkernels.integrations.cascaded_group import CascadedAttention
from vitkernels.nn import _chain, _checks
from vitkernels.nn._chain import Other, Step, Walk, below, convolution, plain
from vitkernels.ops.chain.reference import FeedForward, SqueezeExcite

_SIGMOIDS = ("torch.nn.modules.activation.Sigmoid", "timm.layers.activations.Sigmoid")


def _class_of(module: nn.Module) -> type:
    return published(origin(module)[0] if is_fused(module) else type(module))


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


def _patch_embedding(walk: Walk, name: str, module: Any) -> list[Step]:
    """Convolutions, each but the last with a ReLU behind it."""
    steps: list[Step] = []
    for child, part in module._modules.items():
        if type(part) is nn.ReLU and steps and not steps[-1].relu:
            plain(below(name, child), part, nn.ReLU)
            steps[-1] = steps[-1]._replace(relu=True)
        else:
            steps.append(convolution(below(name, child), part))
    return steps


_Known = dict[str, Callable[[Walk, str, Any], list[Step]]]
_SE: _Known = {"timm.layers.squeeze_excite.SEModule": _squeeze_excite}
_MSRA = "timm.models.efficientvit_msra"

TIMM = Walk(
    _SE
    | {
        f"{_MSRA}.ConvNorm": _conv_norm,
        f"{_MSRA}.ConvMlp": _feed_forward,
        f"{_MSRA}.ResidualDrop": _residual,
        f"{_MSRA}.CascadedGroupAttention": _attention,
        f"{_MSRA}.LocalWindowAttention": _window_attention,
        f"{_MSRA}.EfficientVitBlock": _block,
        f"{_MSRA}.PatchMerging": _patch_merging,
        f"{_MSRA}.EfficientVitStage": _stage,
        f"{_MSRA}.PatchEmbedding": _patch_embedding,
        "torch.nn.modules.conv.Conv2d": _conv_norm,  # of a model whose norms were folded away
    },
    lambda module: qualified(_class_of(module)),
)


# --- replacements -------------------------------------------------------------------------------------------------------------------------


class Chain(Fused):
    """A module that is a chain of layers: ``EfficientVitStage``, ``PatchEmbedding``."""

    _vk_op: ClassVar[str] = "layer_chain"
    _vk_walk: ClassVar[Walk] = TIMM

    def _vk_steps(self) -> list[Step]:
        return self._vk_walk.steps("", self)

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        for path, part in module.named_modules():
            if _class_of(part).__name__ == "CascadedGroupAttention" and not issubclass(role(part), CascadedAttention):
                return f"its {path} is not replaced"
        try:
            steps = cls._vk_walk.steps("", module)
        except Other as reason:
            return str(reason)
        for tensor in (tensor for step in steps for layer in step.layers for tensor in layer.tensors()):
            if (reason := _checks.why_not_weight("a weight", tensor)) is not None:
                return reason
        return _chain.why_no_kernel(cls._vk_weight(module))

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.parameters())

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        return "in inference; with gradients or in training its layers run one by one"

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        y = _chain.run(self, x)
        if isinstance(y, Tensor):
            return y
        if y:
            fell_back(self, y)
        return super().forward(x)
