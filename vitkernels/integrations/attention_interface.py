"""transformers' choice of attention by name: ``attn_implementation="vitkernels"`` for every model that has it, without any swap."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.integrations import dense
from vitkernels.integrations._fused import why_no_kernel
from vitkernels.nn import _checks

NAME = "vitkernels"
# What may come beside q, k, v and the mask and does not change what is computed, as long as it is None or False.
_UNSUPPORTED = ("output_attentions", "softcap", "cache")


def register_transformers() -> str:
    """Make ``attn_implementation="vitkernels"`` known to transformers, for all its models that choose their attention by name.

    ``AutoModel.from_pretrained(name, attn_implementation="vitkernels")``, or ``model.set_attn_implementation("vitkernels")`` for a model there is.
    Queries, keys and values then go to :func:`vitkernels.ops.attention`, grouped heads, masks and position biases included; masks are built as for
    ``"sdpa"``. What that op has not (causal attention, a paged cache, a capped softmax), tracing, export and places without a kernel are sdpa's, as
    is everything where it is faster. Dropout draws other masks than sdpa, of the same probability. Harmless when called twice.

    Returns:
        The name, ``"vitkernels"``.

    Raises:
        ImportError: transformers is not installed, or older than its attention interface (4.48).
    """
    try:
        transformers = importlib.import_module("transformers")
        masks = importlib.import_module("transformers.masking_utils")
        transformers.AttentionInterface.register(NAME, attention_forward)
        masks.AttentionMaskInterface.register(NAME, masks.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    except (ImportError, AttributeError) as error:
        raise ImportError(f"register_transformers: no transformers with an attention interface is installed here: {error}") from error
    return NAME


def why_not(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None = None, **kwargs: Any) -> str | None:
    """Why a call that transformers describes so cannot go to :func:`vitkernels.ops.attention`; ``None`` if it can."""
    if mask is not None and (reason := _checks.why_not_tensor(mask)) is not None:
        return reason
    given = [name for name in _UNSUPPORTED if kwargs.get(name) not in (None, False)]
    if given:
        return f"{given[0]} was given"
    if query.shape[0] != key.shape[0]:
        return "the queries of all images are one"
    # As sdpa_attention_forward has it: a mask says it all.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return "it is causal" if causal and mask is None and query.shape[-2] > 1 else None


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of ``sdpa_attention_forward``: the same arguments and result.

    Args:
        module: the attention layer.
        query: [B, H, N, D].
        key: [B, H_k, M, D].
        value: [B, H_k, M, D_v].
        attention_mask: broadcasts to [B, H, N, M]: bool, True where a key takes part, or floating, added to the logits.
        dropout: probability of dropping an attention weight.
        scaling: of the logits; default D ** -0.5.
        is_causal: whether a query sees only the keys up to its own; default the layer's own ``is_causal``.
        position_bias: floating, added to the logits; differentiable.
        kwargs: whatever else the model hands on.

    Returns:
        [B, N, H, D_v], and None in the place of the weights.
    """
    reason = _checks.why_not_tensor(query) or why_not(module, query, key, attention_mask, is_causal, **kwargs) or why_no_kernel("attention", query)
    if reason is not None:
        sdpa = importlib.import_module("transformers").AttentionInterface()["sdpa"]
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
    bias, key_padding = as_structure(attention_mask, query.shape[0])
    if position_bias is not None:
        if attention_mask is None:
            bias = position_bias
        elif attention_mask.dtype is torch.bool:
            # The smallest number, as sdpa's own, and not -inf: a query that sees no key then sees all alike.
            bias, key_padding = torch.where(attention_mask, position_bias, torch.finfo(key.dtype).min), None
        else:
            bias = position_bias + attention_mask
    out = ops.attention(query, key, value, bias=bias, key_padding=key_padding, scale=scaling, dropout_p=dropout)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def as_structure(mask: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """``(bias, key_padding)`` of a mask: one of keys alone, bool [B, 1, 1, M], is their padding [B, M]."""
    if mask is None or mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return mask, None
    return None, mask[:, 0, 0].expand(batch, -1)


class Attention(dense.Attention):
    """Base of the replacements of layers that choose their attention by name, where the choice is SDPA."""

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        chosen = module.config._attn_implementation
        if chosen == NAME:
            return f"its attention implementation is {chosen!r} already"
        return None if chosen == "sdpa" else f"its attention implementation is {chosen!r}, not 'sdpa'"

    @classmethod
    def _vk_dropout(cls, module: Any) -> float:
        return either(module.__dict__, "attention_dropout", "dropout")

    @classmethod
    def _vk_projection(cls, module: Any) -> nn.Module:
        return module.q_proj

    def _vk_attend_chosen(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Project [B, N, C] each, attend, project: [B, N, C]."""
        inputs = ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection, x in inputs)
        dropout = self._vk_dropout(self) if self.training else 0.0
        return projection_of(self)(self._vk_attend(q, k, v, None, dropout, scale_of(self), *as_structure(mask, q.shape[0])))


def either(own: dict[str, Any], *names: str) -> Any:
    """What a module of transformers has under one of these names."""
    return next(own[name] for name in names if name in own)


def scale_of(module: Any) -> float:
    """Of the logits of an attention."""
    return either(module.__dict__, "scaling", "scale")


def projection_of(module: Any) -> Any:
    """Its last layer."""
    return either(module._modules, "o_proj", "out_proj")
