"""Re-Attention (DeepViT) in models: vit_pytorch's ``deepvit.Attention``, and the authors' ``ReAttention``, which returns its map.

What a call skips (the dropout on the maps, the mix, its norm) must be the plain layers it was. The projections are called like ever, and may be
anything: adapted, quantised, hooked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitkernels import ops
from vitkernels.integrations._fused import Fused, Role, fell_back, published, qualified, restore, swap, why_no_kernel
from vitkernels.integrations._same import why_not_same
from vitkernels.integrations.packed import untraced
from vitkernels.nn import _checks, head_mixing


class Attention(Fused):
    """What both share."""

    _vk_op: ClassVar[str] = "re_attention"

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        """Why the layers whose calls are skipped have to be called."""
        raise NotImplementedError

    @classmethod
    def _vk_small(cls, module: Any) -> tuple[Tensor | None, ...]:
        """The weight of the mix, then whatever else the op takes beside q, k and v."""
        raise NotImplementedError

    @classmethod
    def _vk_dropout(cls, module: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if (reason := cls._vk_why_not_layers(module)) is not None:
            return reason
        reasons = (_checks.why_not_weight("a weight of the mix or its norm", tensor) for tensor in cls._vk_small(module) if tensor is not None)
        return next((reason for reason in reasons if reason is not None), None)

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        weight = cls._vk_small(module)[0]
        assert weight is not None
        return weight

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        return "in training, dropout draws other masks than the original, of the same probability" if cls._vk_dropout(module).p > 0 else ""

    def _vk_takes(self, x: Any) -> bool:
        """Whether this call can be fused; the reason is kept for the handle's report if not."""
        reason = _checks.why_not_tensor(x) or self._vk_why_not_layers(self) or self._vk_why_not_operands(x)
        if reason is not None:
            fell_back(self, reason)
        return reason is None

    def _vk_why_not_operands(self, x: Tensor) -> str | None:
        if x.dim() != 3 or x.layout is not torch.strided:
            return f"the input has {x.dim()} dimensions and layout {x.layout}"
        mix, *others = self._vk_small(self)
        for tensor in (mix, *others):
            if tensor is not None and (type(tensor) not in (Tensor, nn.Parameter) or tensor.device != x.device):
                return f"a weight of the mix or its norm is a {type(tensor).__name__} on {tensor.device}, the input is on {x.device}"
        assert mix is not None
        if mix.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"the input is {x.dtype}, the weight of the mix {mix.dtype}"
        return why_no_kernel(self._vk_op, x)


class VitPytorchAttention(Attention):
    """``deepvit.Attention``: LayerNorm over the heads, and a mix without bias that stores its weight [in, out]."""

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        if (reason := _checks.why_not_bypassed("dropout", module.dropout, nn.Dropout)) is not None:
            return reason
        norm, heads = module.reattn_norm, module.heads
        if type(norm) is not nn.Sequential or len(norm) != 3 or not _is_rearrange(norm[0], _HEADS_LAST) or not _is_rearrange(norm[2], _HEADS_FIRST):
            return "reattn_norm is not a LayerNorm over the heads"
        if (reason := _checks.why_not_bypassed("reattn_norm.1", norm[1], nn.LayerNorm)) is not None:
            return reason
        if any(map(_checks.hooked, (norm, norm[0], norm[2]))):
            return f"reattn_norm {_checks.HOOKED}"
        if norm[1].normalized_shape != (heads,) or tuple(module.reattn_weights.shape) != (heads, heads):
            return f"reattn_norm and reattn_weights are not for {heads} heads"
        return None

    @classmethod
    def _vk_small(cls, module: Any) -> tuple[Tensor | None, ...]:
        norm = module.reattn_norm[1]
        return module.reattn_weights, norm.weight, norm.bias

    @classmethod
    def _vk_dropout(cls, module: Any) -> Any:
        return module.dropout

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        if not self._vk_takes(x):
            return super().forward(x)
        norm = self.reattn_norm[1]
        out = ops.re_attention(
            *head_mixing.split(self.to_qkv(self.norm(x)), self.heads),
            self.reattn_weights.t(),
            norm="layer",
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            scale=self.scale,
            dropout_p=self.dropout.p,
            training=self.dropout.training,
        )
        assert isinstance(out, Tensor)
        return self.to_out(head_mixing.join(out))


_HEADS_LAST, _HEADS_FIRST = "b h i j -> b i j h", "b i j h -> b h i j"


def _is_rearrange(module: Any, pattern: str) -> bool:
    return qualified(type(module)) == "einops.layers.torch.Rearrange" and module.pattern == pattern and not module.axes_lengths


class AuthorsAttention(Attention):
    """The authors' ``ReAttention``, in a model that never reads its map: it returns None in the place of it."""

    _vk_when: ClassVar[str] = ""
    """When no map is returned, for the note."""

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        missing = [name for name in ("apply_transform", "num_heads", "scale", "attn_drop", "qkv", "proj", "proj_drop") if not hasattr(module, name)]
        if missing:
            return f"it has no {missing[0]}"
        if not module.apply_transform:
            return "apply_transform is False: it is plain attention, and has no heads to mix"
        if not isinstance(getattr(module, "reatten_scale", None), (int, float)):
            return "its reatten_scale is not a number"
        norm = module._modules.get("var_norm")
        if not isinstance(norm, nn.BatchNorm2d) or "reatten_matrix" not in module._modules:
            return f"var_norm is a {type(norm).__name__}, not a plain BatchNorm2d"
        return head_mixing.why_not_layers(module.attn_drop, module._modules["reatten_matrix"], norm, module.num_heads)

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return cls._vk_why_not_alone(module) or (
            "it returns its map, and is replaced only with a DeepVisionTransformer around it that reads no map and has no hook on its blocks"
        )

    @classmethod
    def _vk_why_not_alone(cls, module: Any) -> str | None:
        """Why it cannot be replaced whoever reads its map."""
        if (reason := super()._vk_why_not(module, type)) is not None:
            return reason
        if not isinstance(dim := getattr(module.qkv, "in_features", None), int):
            return f"qkv is a {type(module.qkv).__name__}, which does not say how many channels it takes"
        probe = copy.deepcopy(module)
        # No element of the maps is dropped, or all: in between the masks are other ones than the original's. Nearly equal maps have a variance of
        # nearly 0, equal ones of 0: a small eps would enlarge the roundings of their mean beyond what another order of a sum explains.
        for dropped, eps in ((0.0, 1.0), (1.0, 1e8)):
            probe.attn_drop.p, probe.var_norm.eps = dropped, eps
            if (reason := why_not_same("DeepViT's ReAttention", probe, {"": cls}, (32, dim))) is not None:
                return reason
        return None

    @classmethod
    def _vk_small(cls, module: Any) -> tuple[Tensor | None, ...]:
        mix, norm = module.reatten_matrix, module.var_norm
        return mix.weight, mix.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var

    @classmethod
    def _vk_dropout(cls, module: Any) -> Any:
        return module.attn_drop

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        return "; ".join(filter(None, (f"returns None in the place of its map{cls._vk_when}", super()._vk_note(module))))

    def _vk_read(self) -> bool:
        """Whether somebody reads the map of this call."""
        return _checks.watched(self)

    def forward(self, x: Tensor, atten: Any = None) -> tuple[Tensor, Tensor | None]:
        """The original's arguments; its result without the map."""
        if self._vk_read():
            fell_back(self, "its map is read, and has to be formed for that")
            return super().forward(x, atten)
        if not self._vk_takes(x):
            return super().forward(x, atten)
        qkv = head_mixing.split(self.qkv(x), self.num_heads)
        out, _ = head_mixing.attend(*qkv, self.attn_drop, self.reatten_matrix, self.var_norm, scale=self.scale)
        out = head_mixing.join(out)
        if self.reatten_scale != 1.0:
            out = out * self.reatten_scale
        return self.proj_drop(self.proj(out)), None


class AuthorsAttentionRead(AuthorsAttention):
    """The same in a model that reads the maps in training (``cos_reg``): there the original runs."""

    _vk_when: ClassVar[str] = " in evaluation"

    def _vk_read(self) -> bool:
        return self.training or super()._vk_read()


class AuthorsModel(Fused):
    """The authors' ``DeepVisionTransformer``: watches over who reads the maps that its attentions return. What it computes does not change."""

    _vk_op: ClassVar[str] = "re_attention"

    @classmethod
    def _vk_attentions(cls, module: Any) -> Iterator[Any]:
        """The attentions whose map nobody but the model can read."""
        for block in module.blocks:
            attention = block._modules.get("attn")
            known = published(type(attention)).__name__ == "ReAttention" and AuthorsAttention._vk_why_not_alone(attention) is None
            if known and not _checks.watched(attention) and not _checks.watched(block) and _only_hands_on(block):
                yield attention

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if next(cls._vk_attentions(module), None) is None:
            return "none of its attentions can be replaced"
        read = _reads_maps(module)
        return read if isinstance(read, str) else "it reads the maps of its attentions in evaluation" if False in read else None

    @classmethod
    def _vk_parts(cls, module: Any) -> dict[nn.Module, type[Fused]]:
        kind = AuthorsAttentionRead if True in _reads_maps(module) else AuthorsAttention
        return dict.fromkeys(cls._vk_attentions(module), kind)

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.pos_embed

    def forward_features(self, x: Any) -> Any:
        """The original's argument and result. A reader who came later is seen here: a hook on a block, or ``cos_reg``."""
        for block in self.blocks:
            attention = block._modules.get("attn")
            if isinstance(attention, AuthorsAttention):
                if _checks.watched(block):
                    untraced(_hand_back)(self, attention)
                elif self.cos_reg and not isinstance(attention, AuthorsAttentionRead):
                    untraced(_read_in_training)(attention)
        return super().forward_features(x)


def _hand_back(model: AuthorsModel, attention: AuthorsAttention) -> None:
    fell_back(model, "a hook on a block can read the map: its attention is the original again")
    restore(attention)


def _read_in_training(attention: AuthorsAttention) -> None:
    restore(attention)
    swap(attention, AuthorsAttentionRead)


class _Map:
    """Stands for an attention map on its way through a model. Whatever looks at it raises."""


class _Stand(nn.Module):
    """In the place of a layer, when a model or block is run to see what becomes of the maps: returns ``make(argument)``."""

    def __init__(self, make: Callable[[Any], Any] = lambda x: x) -> None:
        super().__init__()
        self._make = make

    def forward(self, x: Any, *_: Any) -> Any:
        return self._make(x)


def _hollow(module: nn.Module, training: bool, **children: nn.Module) -> Any:
    """A copy of ``module`` alone, its own parameters shared, with stand-ins for all its children: ``children``, and for the others the identity."""
    probe = module.__class__.__new__(module.__class__)
    probe.__dict__.update(module.__dict__, training=training, _modules={name: children.get(name) or _Stand() for name in module._modules})
    return probe


def _only_hands_on(block: Any) -> bool:
    """Whether ``block(x, map)`` returns what its attention returns for a map, and looks at neither map."""
    given, formed = _Map(), _Map()
    x = block.attn.reatten_matrix.weight.new_zeros(1, 2, block.attn.qkv.in_features)
    try:
        for training in (False, True):
            found = _hollow(block, training, attn=_Stand(lambda x: (x, formed))).forward(x, given)
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and found[1] is formed):
                return False
    except Exception:  # whatever foreign code may raise
        return False
    return True


def _reads_maps(model: Any) -> str | set[bool]:
    """In which values of ``training`` something of the maps that the blocks return comes out of ``model``; or why that cannot be said."""
    formed, read = _Map(), set()
    tokens = model.pos_embed.detach()
    blocks = nn.ModuleList(_Stand(lambda x: (x, formed)) for _ in model.blocks)
    for training in (False, True):
        probe = _hollow(model, training, patch_embed=_Stand(lambda _: tokens[:, 1:]), blocks=blocks)
        for call in (probe.forward, probe.forward_features):
            try:
                with torch.no_grad():
                    found = call(tokens.new_zeros(1, 3, 8, 8))
            except Exception as error:  # whatever foreign code may raise
                return f"it has the attributes of DeepViT's DeepVisionTransformer, but does not run like it: {error}"
            if any(leaf is formed for leaf in pytree.tree_leaves(found)):
                read.add(training)
    return read


class TalkingHeads(Fused):
    """timm's ``TalkingHeadAttn`` (CaiT), which no kernel here can take over."""

    _vk_op: ClassVar[str] = "re_attention"

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return "it mixes the heads before the softmax too, and then a row's softmax is not that of one head: re_attention mixes only after it"
