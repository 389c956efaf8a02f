"""Classifiers in evaluation whose head reads the class token: their last block makes it alone, from the keys and values of all tokens.

timm's ``VisionTransformer`` that pools ``"token"``, vit_pytorch's ``ViT`` and ``DeepViT`` that pool ``"cls"``, and transformers' ViT and DeiT that
classify images. Their forward is the original's: while it runs, the replacement of their blocks knows how many tokens are read behind it.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from vitkernels.integrations import blocks
from vitkernels.integrations._fused import Fused, Role, original_name
from vitkernels.integrations.folded import is_token_norm
from vitkernels.nn import _checks
from vitkernels.ops.blocks import op


class Reading(NamedTuple):
    """Whose tokens are read, how many of the first, and what else sees all of them on their way to the head."""

    blocks: nn.Module
    first: int
    behind: tuple[nn.Module, ...] = ()


class Classifier(Fused):
    """Base: an adapter says what its class reads."""

    _vk_op: ClassVar[str] = op.NAME
    _vk_in_evaluation: ClassVar[bool] = True
    # A model is saved under the name of its class.
    _vk_same_name: ClassVar[bool] = True
    _vk_methods: ClassVar[frozenset[str]] = frozenset()
    """Those between the blocks and the head; on an instance they may be anything."""

    @classmethod
    def _vk_reads(cls, module: Any) -> Reading | None:
        """What ``module`` reads, or None if that may be more than some first tokens."""
        raise NotImplementedError

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        reading = cls._vk_reads(module)
        if reading is None:
            return "its head may read all tokens"
        if not issubclass(role(reading.blocks), blocks.OfTokens):
            return "its blocks are not replaced"
        if any(map(_checks.hooked, (reading.blocks, *reading.behind))):
            return f"a module behind its blocks {_checks.HOOKED}"
        return "folding is for the CPU" if next(module.parameters()).is_cuda else None

    @classmethod
    def _vk_backend(cls, module: Any) -> str:
        found = cls._vk_reads(module)
        return "reference" if found is None else blocks.OfTokens._vk_backend(found.blocks)

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        return "of the last block's tokens only those that the head reads are made, unless a hook looks at them"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        forward = super().forward
        if torch.compiler.is_compiling() or self.training or not self._vk_methods.isdisjoint(self.__dict__):
            return forward(*args, **kwargs)
        reading = self._vk_reads(self)
        if reading is None or any(map(_checks.hooked, (reading.blocks, *reading.behind))):
            return forward(*args, **kwargs)
        with blocks.only_first(reading.blocks, reading.first):
            return forward(*args, **kwargs)


class TimmClassifier(Classifier):
    """``VisionTransformer``."""

    _vk_methods: ClassVar[frozenset[str]] = frozenset({"forward_features", "forward_head", "pool"})

    @classmethod
    def _vk_reads(cls, module: Any) -> Reading | None:
        alone = module.global_pool == "token" and module._modules.get("attn_pool") is None
        return Reading(module.blocks, 1, (module.norm,)) if alone and is_token_norm(module.norm) else None


class VitPytorchClassifier(Classifier):
    """``ViT`` and ``DeepViT``."""

    @classmethod
    def _vk_reads(cls, module: Any) -> Reading | None:
        return Reading(module.transformer, 1) if module.pool == "cls" and module.mlp_head is not None else None


class TransformersClassifier(Classifier):
    """``ViTForImageClassification`` and DeiT's, of which one has a second head, for the distillation token."""

    @classmethod
    def _vk_reads(cls, module: Any) -> Reading | None:
        model = module.base_model
        both = "distillation_classifier" in module._modules
        return Reading(model, 2 if both else 1, (model.layernorm,)) if is_token_norm(model.layernorm) else None


_TABLE: dict[str, type[Classifier]] = {
    "timm.models.vision_transformer.VisionTransformer": TimmClassifier,
    "vit_pytorch.vit.ViT": VitPytorchClassifier,
    "vit_pytorch.deepvit.DeepViT": VitPytorchClassifier,
    "transformers.models.vit.modeling_vit.ViTForImageClassification": TransformersClassifier,
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": TransformersClassifier,
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher": TransformersClassifier,
}


def match(module: nn.Module) -> type[Fused] | None:
    """The replacement of a classifier that reads its first tokens alone."""
    cls = _TABLE.get(original_name(module))
    return None if cls is None or cls._vk_reads(module) is None else cls
