"""Convolutions with a norm and an activation, and inverted residuals of them, on the CPU, in channels_last.

In evaluation the norms are folded into the weights (``folded.py``); an inverted residual is one op. In training the convolutions stay PyTorch's, and
each live norm with the activation behind it is one op (:mod:`vitkernels.nn._live`). Frozen norms in training, autocast in evaluation and graphs that
torch.compile makes run the original code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels.integrations._fused import Fused, fell_back, original_name
from vitkernels.integrations.folded import CONV_LAYERS, Folded, Plan, Run, conv_layer, conv_sequence, hooked_inside, no_change, plan_of
from vitkernels.nn import _live
from vitkernels.nn._derived import Derived
from vitkernels.nn._folded import Layer, UnfitError, bottleneck, single
from vitkernels.ops.batch_norm.op import NAME


class Convolutions(Folded):
    """Base of what is convolutions one after the other."""

    _vk_op: ClassVar[str] = NAME
    _vk_in_evaluation: ClassVar[bool] = False

    @classmethod
    def _vk_layers(cls, module: Any) -> list[Layer]:
        """The adapter's one duty.

        Raises:
            UnfitError: it is made of something else.
        """
        raise NotImplementedError

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        layers = [single(layer) for layer in cls._vk_layers(module)]

        def bind(dtype: torch.dtype) -> Run:
            passes = [layer.bind(dtype) for layer in layers]

            def run(x: Tensor) -> Tensor:
                for one in passes:
                    x = one(x)
                return x

            return passes[0] if len(passes) == 1 else run

        return Plan(bind)

    def _vk_trained(self, x: Tensor) -> Tensor | None:
        layers = _trained.entry(self).plan
        reason = layers if isinstance(layers, str) else _live.why_not_now(layers, x)
        if isinstance(layers, str) or reason is not None:
            fell_back(self, str(reason))
            return None
        return _live.run(layers, x)


def _training_plan(module: Any) -> list[Layer] | str:
    if (reason := hooked_inside(module)) is not None:
        return reason
    try:
        layers = module._vk_layers(module)
    except UnfitError as error:
        return str(error)
    return _live.why_not(layers) or layers


_trained: Derived[list[Layer] | str, Any] = Derived(_training_plan, settings=lambda module: None)


class ConvNormAct(Convolutions):
    """timm's ``ConvNormAct``, transformers' ``MobileViTConvLayer`` and ``MobileViTV2ConvLayer``."""

    @classmethod
    def _vk_layers(cls, module: Any) -> list[Layer]:
        return [conv_layer(module)]


class ConvSequence(Convolutions):
    """A ``Sequential`` of convolutions, each with its norm and perhaps an activation, as vit_pytorch writes them."""

    @classmethod
    def _vk_layers(cls, module: Any) -> list[Layer]:
        return conv_sequence(module)


def sequences(*modules: Any) -> dict[nn.Module, type[Fused]]:
    """Those of the modules that are such sequences, with their replacement."""
    return {module: ConvSequence for module in modules if not isinstance(plan_of(ConvSequence, module), str)}


class InvertedResidual(Folded):
    """timm's ``BottleneckBlock`` with a depthwise middle, the ``InvertedResidual`` of transformers' MobileViT and MobileViTV2, and vit_pytorch's
    ``MV2Block``, which may lack the expansion: in evaluation one op, in training its convolutions one by one.
    """

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return module.__dict__.get("use_residual"), module.__dict__.get("use_res_connect")

    @classmethod
    def _vk_parts(cls, module: Any) -> dict[nn.Module, type[Fused]]:
        return sequences(module.conv) if original_name(module) == "vit_pytorch.mobile_vit.MV2Block" else {}

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        if original_name(module) == "timm.models.byobnet.BottleneckBlock":
            layers, residual = [conv_layer(module.conv1_1x1), conv_layer(module.conv2_kxk), conv_layer(module.conv3_1x1)], module.shortcut is not None
            no_change(module.shortcut, module.conv2b_kxk, module.attn, module.attn_last, module.drop_path, module.act)
        elif original_name(module) == "vit_pytorch.mobile_vit.MV2Block":
            layers, residual = conv_sequence(module.conv), module.use_res_connect
        else:
            layers, residual = [conv_layer(module.expand_1x1), conv_layer(module.conv_3x3), conv_layer(module.reduce_1x1)], module.use_residual
        if len(layers) not in (2, 3):
            raise UnfitError(f"it has {len(layers)} convolutions")
        *expand, depthwise, project = layers
        whole = bottleneck(project, expand=expand[0] if expand else None, depthwise=depthwise)

        def bind(dtype: torch.dtype) -> Run:
            run = whole.bind(dtype)
            return (lambda x: run(x, x)) if residual else run

        return Plan(bind)


TABLE: dict[str, type[Fused]] = {
    "timm.layers.conv_bn_act.ConvNormAct": ConvNormAct,
    "timm.models.byobnet.BottleneckBlock": InvertedResidual,
    "vit_pytorch.mobile_vit.MV2Block": InvertedResidual,
    **dict.fromkeys(CONV_LAYERS, ConvNormAct),
    **{name.replace("ConvLayer", "InvertedResidual"): InvertedResidual for name in CONV_LAYERS},
}
