"""Cascaded group attention (EfficientViT) in models: what timm's and the authors' classes share.

Both keep their layers under the same names (``qkvs``, ``dws``, ``proj``, ``attention_biases``), so one replacement serves both.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vitkernels.integrations._fused import Fused, Role, fell_back
from vitkernels.nn import _checks
from vitkernels.nn._cascade import attend, find


class CascadedAttention(Fused):
    """``CascadedGroupAttention``: all heads, their norms and the projection in one op."""

    _vk_op: ClassVar[str] = "cascaded_group_attention"

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        cascade = find(module)
        if isinstance(cascade, str):
            return cascade
        for tensor in cascade.tensors():
            if (reason := _checks.why_not_weight("a weight", tensor)) is not None:
                return reason
        return None

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.attention_biases

    def _vk_attend(self, x: Tensor, *, partition: bool) -> Tensor | None:
        """The fused forward of a window or, with ``partition``, of a map; ``None`` where this call is not for it."""
        y = attend(self, x, partition=partition)
        if isinstance(y, str):
            fell_back(self, y)
            return None
        return y

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        y = self._vk_attend(x, partition=False)
        return super().forward(x) if y is None else y


class WindowAttention(Fused):
    """``LocalWindowAttention``: its attention takes the whole map and cuts it into windows by addresses, so nothing is padded, copied or put back."""

    _vk_op: ClassVar[str] = "cascaded_group_attention"

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return None if issubclass(role(module.attn), CascadedAttention) else "its attn is not replaced"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.attn.attention_biases

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        attn = self.attn
        y = None
        if not isinstance(attn, CascadedAttention):
            fell_back(self, "its attn is not replaced")
        elif _checks.hooked(attn):
            fell_back(self, f"its attn {_checks.HOOKED}")
        else:
            y = attn._vk_attend(x, partition=True)
        return super().forward(x) if y is None else y
