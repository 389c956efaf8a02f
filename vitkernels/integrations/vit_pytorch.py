"""vit_pytorch: ViT, SimpleViT, MobileViT, DeepViT (in ``head_mixing.py``), and both NaViTs, ``na_vit`` (rows of several images, a mask) and
``na_vit_nested_tensor``.

What is the same in a NaViT: the images in their order, which tokens are dropped (the same draws from PyTorch's generator), outputs and gradients.
What is not: with dropout the masks are other ones of the same probability, because no [R, S, S] weights and no padding are there to draw them for.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vitkernels.integrations import dense
from vitkernels.integrations._fused import Fused, Role, fell_back, origin, qualified
from vitkernels.integrations._tokenwise import Layers
from vitkernels.integrations.head_mixing import VitPytorchAttention
from vitkernels.integrations.packed import Part, untraced, why_not_here
from vitkernels.nn import _checks
from vitkernels.ops import PackedLayout

_PADDED, _NESTED = "vit_pytorch.na_vit.", "vit_pytorch.na_vit_nested_tensor."


class PlainAttention(dense.Attention):
    """``vit.Attention`` and ``simple_vit.Attention``, whose norm is inside and whose maps are formed."""

    _vk_dims: ClassVar[int] = 3
    _vk_skips: ClassVar[frozenset[str]] = frozenset({"attend"})

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        if type(module.attend) is not nn.Softmax or module.attend.dim != -1:
            return "attend is not a plain Softmax over the keys"
        if _checks.hooked(module.attend):
            return f"attend {_checks.HOOKED}"
        return _checks.why_not_bypassed("dropout", module.dropout, nn.Dropout) if "dropout" in module._modules else None

    @classmethod
    def _vk_dropout(cls, module: Any) -> float:
        dropout = module._modules.get("dropout")
        return 0.0 if dropout is None else dropout.p

    @classmethod
    def _vk_heads(cls, module: Any) -> int:
        return module.heads

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.to_qkv.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result; ``x`` may be a map [B, H/ph, ph, W/pw, pw, C]."""
        if not self._vk_takes(x, dims=self._vk_dims):
            return super().forward(x)
        qkv = self.to_qkv(self.norm(x))
        sequences = qkv.flatten(0, 1) if qkv.dim() == 4 else qkv
        dropout = self._modules.get("dropout")
        drops = dropout is not None and dropout.training
        out = self._vk_attend(*dense.split(sequences, self.heads, 3), dense.patch_of(qkv), dropout.p if drops else 0.0, self.scale)
        return self.to_out(out.unflatten(0, qkv.shape[:2]) if qkv.dim() == 4 else out)


class SequencesAttention(PlainAttention):
    """``mobile_vit.Attention``: of tokens [B, P, N, C], where those of one of P see each other."""

    _vk_dims: ClassVar[int] = 4


class MapBlock(dense.MapBlock):
    """``mobile_vit.MobileViTBlock``."""

    _vk_layers: ClassVar[Layers] = Layers(
        {"vit_pytorch.mobile_vit.Attention": SequencesAttention},
        ("vit_pytorch.mobile_vit.Transformer", "vit_pytorch.mobile_vit.FeedForward"),
    )

    @classmethod
    def _vk_inside(cls, module: Any) -> tuple[nn.Module, ...]:
        return (module.transformer,)

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result."""
        if not self._vk_takes_map(x):
            return super().forward(x)
        y = self.conv2(self.conv1(x))
        if y.shape[2] % self.ph or y.shape[3] % self.pw:
            return super().forward(x)  # raises: here nothing is resized
        return self.conv4(torch.cat((self.conv3(dense.on_map(y, (self.ph, self.pw), self.transformer)), x), 1))


class _Attention(Part):
    """What both ``Attention`` share: tokens [T, D] in, tokens out; in attention pooling one query row that serves for every image."""

    _vk_whole: ClassVar[str] = "NaViT"

    def _vk_project(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, dropout: float, **options: Any) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        if q.shape[0] != layout.total_q:
            q = q.expand(layout.total_q, -1, -1)
        return self.to_out(self._vk_attend(q, k, v, layout, dropout, **options))


class PaddedAttention(_Attention):
    """``na_vit.Attention``."""

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        for name in ("q_norm", "k_norm"):
            norm = getattr(module, name, None)
            if norm is None or qualified(type(norm)) != _PADDED + "RMSNorm" or _checks.hooked(norm):
                return f"{name} is not a plain RMSNorm"
        return None

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.to_q.weight

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, attn_mask: Any = None) -> Tensor:
        """The original's arguments; ``attn_mask`` may be the layout of tokens ``x`` [T, D]."""
        if not isinstance(attn_mask, PackedLayout):
            return super().forward(x, context, mask, attn_mask)
        x = self.norm(x)
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        norms = {"q_norm_weight": self.q_norm.gamma.squeeze(1), "k_norm_weight": self.k_norm.gamma.squeeze(1)}
        return self._vk_project(self.to_q(x), k, v, attn_mask, self.dropout_p, scale=1.0, qk_norm="l2", **norms)


class NestedAttention(_Attention):
    """``na_vit_nested_tensor.Attention``."""

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        norms = [module._modules.get(name) for name in ("query_norm", "key_norm")]
        if {*map(type, norms)} not in ({nn.LayerNorm}, {nn.Identity}) or any(map(_checks.hooked, norms)):
            return "query_norm and key_norm are not two plain LayerNorms, or none"
        return "query_norm and key_norm differ in eps" if len({getattr(norm, "eps", None) for norm in norms}) > 1 else None

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.to_queries.weight

    def forward(self, x: Tensor, context: Tensor | None = None, layout: PackedLayout | None = None) -> Tensor:
        """The original's arguments, and the layout of tokens ``x`` [T, D]."""
        if layout is None:
            return super().forward(x, context)
        x = self.norm(x)
        context = x if context is None else context
        q, k = self.query_norm, self.key_norm
        norms: dict[str, Any] = {}
        if isinstance(q, nn.LayerNorm):
            norms = {"qk_norm": "layer", "norm_eps": q.eps, "q_norm_weight": q.weight, "q_norm_bias": q.bias}
            norms |= {"k_norm_weight": k.weight, "k_norm_bias": k.bias}
        return self._vk_project(self.to_queries(x), self.to_keys(context), self.to_values(context), layout, self.dropout, **norms)


class NestedTransformer(Part):
    """``na_vit_nested_tensor.Transformer``: hands the layout on."""

    _vk_whole: ClassVar[str] = "NaViT"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.norm.weight

    def forward(self, x: Tensor, layout: PackedLayout | None = None) -> Tensor:
        """The original's argument, and the layout of tokens ``x`` [T, D]."""
        if layout is None:
            return super().forward(x)
        for attention, feed_forward in self.layers:
            x = attention(x, layout=layout) + x
            x = feed_forward(x) + x
        return self.norm(x)


class _NaViT(Fused):
    """What both models share: patches and positions of the images, one after the other without padding."""

    _vk_op: ClassVar[str] = "varlen_attention"
    _vk_layers: ClassVar[Layers]

    @classmethod
    def _vk_inside(cls, module: Any) -> tuple[nn.Module, ...]:
        return module.to_patch_embedding, module.dropout, module.transformer, module.attn_pool

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return cls._vk_layers.why_not(cls._vk_inside(module), running=False)

    @classmethod
    def _vk_parts(cls, module: Any) -> dict[nn.Module, type[Fused]]:
        return cls._vk_layers.parts_of((module.transformer, module.attn_pool))

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.pos_embed_height

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        dropping = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules())
        return "in training, dropout draws other masks than the original, of the same probability" if dropping else ""

    def _vk_takes(self, images: Sequence[Any]) -> bool:
        """Whether this call can run on packed tokens; the reason is kept for the handle's report if not. What is no image, the original refuses."""
        reason = why_not_here(self.pos_embed_height) or self._vk_layers.why_not(self._vk_inside(self), running=True)
        size = self.patch_size
        for image in images:
            if reason is None and (reason := _checks.why_not_tensor(image)) is None:
                fits = image.dim() == 3 and image.shape[0] == self.channels and image.shape[1] % size == 0 and image.shape[2] % size == 0
                reason = None if fits else f"an image is not [{self.channels}, H, W] with sides that the patch size divides"
        if reason is not None:
            fell_back(self, reason)
        return reason is None

    def _vk_keep(self, tokens: int, keep: int) -> Tensor:
        """The original's draw of the tokens to keep."""
        return torch.randn((tokens,), device=self.device).topk(keep, dim=-1).indices


Packed = tuple[Tensor, Tensor, Tensor, PackedLayout]


def _pack(images: Sequence[Tensor], kept: list[Tensor] | None, size: int, device: torch.device) -> Packed:
    """The patches [T, C size size] of all images, of each those ``kept``, the row and column of each patch, and the layout."""
    parts = []
    for (_, height, width), same in itertools.groupby(images, key=lambda image: image.shape):
        grid = torch.stack(list(same)).unflatten(3, (width // size, size)).unflatten(2, (height // size, size))  # [n, c, h, p1, w, p2]
        parts.append(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2))
    patches = torch.cat(parts) if len(parts) > 1 else parts[0]
    # On the host: these are small, and as many operations on tensors would cost more than they compute.
    across = np.array([image.shape[2] // size for image in images])
    lengths = across * [image.shape[1] // size for image in images]
    begins = lengths.cumsum() - lengths
    if kept is None:
        index = np.arange(len(patches)) - np.repeat(begins, lengths)
        rows, columns = (torch.from_numpy(part).to(device) for part in np.divmod(index, np.repeat(across, lengths)))
    else:
        lengths = np.array([len(keep) for keep in kept])
        order = torch.cat(kept)
        patches = patches[order + torch.from_numpy(np.repeat(begins, lengths)).to(device)]
        widths = torch.from_numpy(np.repeat(across, lengths)).to(device)
        rows, columns = order // widths, order % widths
    return patches, rows, columns, PackedLayout.from_lengths(lengths, device=device)


class PaddedNaViT(_NaViT):
    """``na_vit.NaViT``: no [R, S, S] mask, no padding, and the pooling query's projection once for all images."""

    _vk_layers: ClassVar[Layers] = Layers(
        {_PADDED + "Attention": PaddedAttention}, (_PADDED + "LayerNorm", _PADDED + "RMSNorm", _PADDED + "Transformer")
    )

    def _vk_pack(self, batched_images: Any, group_images: bool, group_max_seq_len: int) -> Packed | None:
        """The images' patches; ``None`` where this call is the original's business."""
        alone = torch.is_tensor(batched_images[0])
        images = list(batched_images) if alone else [image for row in batched_images for image in row]
        if (group_images and not alone) or not self._vk_takes(images):
            return None
        drop = self.calc_token_dropout if self.training else None
        if group_images:
            # How images share rows changes no result, but the original refuses too large an image, and may ask a random function for the rates.
            zoo = sys.modules[_PADDED.rstrip(".")]
            zoo.group_images_by_max_seq_len(images, patch_size=self.patch_size, calc_token_dropout=drop, max_seq_len=group_max_seq_len)
        kept = None
        if drop is not None:
            kept = []
            for image in images:
                height, width = image.shape[-2:]
                tokens = (height // self.patch_size) * (width // self.patch_size)
                kept.append(self._vk_keep(tokens, max(1, int(tokens * (1 - drop(height, width))))))
        return _pack(images, kept, self.patch_size, self.device)

    def forward(self, batched_images: Any, group_images: bool = False, group_max_seq_len: int = 2048) -> Tensor:
        """The original's arguments and result."""
        packed = untraced(PaddedNaViT._vk_pack)(self, batched_images, group_images, group_max_seq_len)
        if packed is None:
            return super().forward(batched_images, group_images, group_max_seq_len)
        patches, rows, columns, layout = packed
        x = self.to_patch_embedding(patches) + self.pos_embed_height[rows] + self.pos_embed_width[columns]
        x = self.transformer(self.dropout(x), attn_mask=layout)
        query = self.attn_pool_queries[None]
        x = self.attn_pool(query, context=x, attn_mask=layout.cross(1)) + query
        return self.mlp_head(self.to_latent(x))


class NestedNaViT(_NaViT):
    """``na_vit_nested_tensor.NaViT``. ``token_dropout_prob=None``, its default, drops no tokens; in training the original fails with it.

    The original's gradients end at the input of the transformer, because ``torch.nested.nested_tensor`` makes tensors without a history: it never
    trains its patch embedding, positions and pooling query. Nor does this, as long as the original's code is that.
    """

    _vk_layers: ClassVar[Layers] = Layers({_NESTED + "Attention": NestedAttention, _NESTED + "Transformer": NestedTransformer})

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        crash = "trains with token_dropout_prob=None, where the original raises TypeError" if module.token_dropout_prob is None else ""
        cut = "as in the original, the patch embedding, the positions and the pooling query get no gradient" if _cuts(type(module)) else ""
        return "; ".join(filter(None, (crash, cut, super()._vk_note(module))))

    def _vk_pack(self, images: Any) -> tuple[Packed, bool] | None:
        """The images' patches, and whether the gradient ends there; ``None`` where this call is the original's business."""
        if not self._vk_takes(images):
            return None
        kept = None
        if self.training and self.token_dropout_prob is not None and self.token_dropout_prob > 0:
            tokens = torch.tensor([image.shape[1] // self.patch_size * (image.shape[2] // self.patch_size) for image in images])
            keep = ((1.0 - self.token_dropout_prob) * tokens).int().clamp(min=1)  # in float32, as in the original
            kept = [self._vk_keep(*pair) for pair in zip(tokens.tolist(), keep.tolist(), strict=True)]
        return _pack(images, kept, self.patch_size, self.device), _cuts(origin(self)[0])

    def forward(self, images: Any) -> Tensor:
        """The original's argument and result."""
        packed = untraced(NestedNaViT._vk_pack)(self, images)
        if packed is None:
            return super().forward(images)
        (patches, rows, columns, layout), cut = packed
        x = self.to_patch_embedding(patches) + (self.pos_embed_height[rows] + self.pos_embed_width[columns])
        query = self.attn_pool_queries[None]
        if cut:
            x, query = x.detach(), query.detach()
        x = self.transformer(self.dropout(x), layout=layout)
        x = self.attn_pool(query, x, layout=layout.cross(1))
        return self.mlp_head(self.to_latent(x))


def _cuts(original: Any) -> bool:
    """Whether the original calls ``nested_tensor``, and not ``as_nested_tensor``, which would keep the history."""
    return "nested_tensor" in original.forward.__code__.co_names


TABLE: dict[str, type[Fused]] = {
    "vit_pytorch.vit.Attention": PlainAttention,
    "vit_pytorch.simple_vit.Attention": PlainAttention,
    "vit_pytorch.mobile_vit.Attention": SequencesAttention,
    "vit_pytorch.mobile_vit.MobileViTBlock": MapBlock,
    _PADDED + "NaViT": PaddedNaViT,
    _PADDED + "Attention": PaddedAttention,
    _NESTED + "NaViT": NestedNaViT,
    _NESTED + "Attention": NestedAttention,
    "vit_pytorch.deepvit.Attention": VitPytorchAttention,
}
