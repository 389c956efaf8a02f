"""Re-Attention as a module, and its layers as arguments of the op."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn import _checks
from vitkernels.ops import _define


class HeadNorm(nn.LayerNorm):
    """LayerNorm over the heads of attention maps, at each pair of tokens. Shape: [B, H, N, N] to the same."""

    def forward(self, maps: Tensor) -> Tensor:
        """[B, H, N, N] to the same."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class ReAttention(nn.Module):
    """Re-Attention of DeepViT (arXiv 2103.11886, section 4.2, equation 3): attention maps mixed across heads and normalised before they are applied.

    Args:
        dim: channels C of the tokens, a multiple of ``num_heads``.
        num_heads: heads H.
        qkv_bias: whether the projection to q, k and v has a bias.
        mix_bias: whether the mix has a bias.
        norm: of the mixed maps: ``"batch"`` as the authors have it (BatchNorm2d), ``"layer"`` over the heads at each pair of tokens as vit-pytorch
            has it (:class:`HeadNorm`), or None.
        attn_drop: probability of dropping an element of the maps before they are mixed, in training.
        proj_drop: probability of dropping an output element in training.
        scale: of the logits; default (C / H) ** -0.5.
        device: as of every module.
        dtype: as of every module.

    Shape: input and output are [B, N, C].

    The maps are formed tile by tile and kept nowhere, in training neither. A hook on the mix, its norm or its dropout, or something else in their
    place, has its say: then, and while the model is exported, the layers run one by one.

    Parameters and buffers are named and shaped as in the authors' ``ReAttention`` (``qkv``, ``reatten_matrix``, ``var_norm``, ``proj``), so
    checkpoints load both ways.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        mix_bias: bool = True,
        norm: Literal["batch", "layer"] | None = "batch",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("dim", dim), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"ReAttention: {argument} is {value}; it must be positive")
        if dim % num_heads:
            raise ValueError(f"ReAttention: dim is {dim}; it must be a multiple of num_heads, {num_heads}")
        if norm not in _NORMS:
            raise ValueError(f"ReAttention: norm is {norm!r}; it must be one of {', '.join(map(repr, _NORMS))}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **where)
        self.attn_drop = nn.Dropout(attn_drop)
        self.reatten_matrix = nn.Conv2d(num_heads, num_heads, kernel_size=1, bias=mix_bias, **where)
        self.var_norm = _NORMS[norm](num_heads, **where)
        self.proj = nn.Linear(dim, dim, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, return_map: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, N, C] to the same. ``return_map`` also returns the maps that were applied, [B, H, N, N], and costs what forming them costs."""
        q, k, v = split(self.qkv(x), self.num_heads)
        layers = (self.attn_drop, self.reatten_matrix, self.var_norm)
        if _checks.why_not_tensor(x) is None and why_not_layers(*layers, self.num_heads) is None:
            out, maps = attend(q, k, v, *layers, scale=self.scale, return_map=return_map)
        else:
            maps = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
            maps = self.var_norm(self.reatten_matrix(self.attn_drop(maps)))
            out = maps @ v
        out = self.proj_drop(self.proj(join(out)))
        return out if maps is None or not return_map else (out, maps)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class."""
        return f"num_heads={self.num_heads}, scale={self.scale:.4g}"


_NORMS: dict[str | None, type[nn.Module]] = {"batch": nn.BatchNorm2d, "layer": HeadNorm, None: nn.Identity}


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, H, N, D] each, as views of one projection [B, N, 3 H D]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def join(out: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H D], as a projection takes it: no copy of what the ops return."""
    return out.transpose(1, 2).flatten(2)


def why_not_layers(dropout: nn.Module, mix: nn.Module, norm: nn.Module, heads: int) -> str | None:
    """Why the layers between the two projections have to be called; ``None`` if the op can do their work."""
    if (
        reason := _checks.why_not_bypassed("attn_drop", dropout, nn.Dropout) or _checks.why_not_conv1x1("reatten_matrix", mix, heads, heads)
    ) is not None:
        return reason
    kind = next((known for known in _NORMS.values() if _checks.behaves_as(type(norm), known)), nn.BatchNorm2d)
    if (reason := _checks.why_not_bypassed("var_norm", norm, kind)) is not None:
        return reason
    size = getattr(norm, "num_features", None) or getattr(norm, "normalized_shape", None)
    if size not in (None, heads, (heads,)):
        return f"var_norm is for {size} channels, not for {heads} heads"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, dropout: Any, mix: Any, norm: Any, *, scale: float, return_map: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Re-Attention of q, k and v by its layers, which :func:`why_not_layers` has passed: [B, H, N, D], and the maps if asked for.

    A live BatchNorm's running statistics are updated as its own forward would.
    """
    weight, bias, options = mix.weight, mix.bias, _norm_options(norm)
    dropout_p = dropout.p if dropout.training else 0.0
    if dropout_p > 0 and not options.get("training", True):
        weight, bias = _folded(weight, bias, norm)  # what is dropped is drawn anew, and the statistics are those of old: no op's one `training`
        options = {}
    if dropout_p > 0:
        options["training"] = True
    found = ops.re_attention(q, k, v, weight, bias, scale=scale, dropout_p=dropout_p, return_map=return_map, **options)
    return found if isinstance(found, tuple) else (found, None)


def _norm_options(norm: Any) -> dict[str, Any]:
    """The op's arguments for a norm. For a BatchNorm ``training`` says whose statistics count, and its batches are counted."""
    if isinstance(norm, HeadNorm):
        return {"norm": "layer", "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    if not isinstance(norm, nn.BatchNorm2d):
        return {}
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    recorded = norm.track_running_stats or not norm.training
    return {
        "norm": "batch",
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "eps": norm.eps,
        "running_mean": norm.running_mean if recorded else None,
        "running_var": norm.running_var if recorded else None,
        "training": norm.training or norm.running_mean is None,
        "momentum": momentum,
    }


def _folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The mix with a frozen norm behind it as one mix."""
    assert norm.running_mean is not None and norm.running_var is not None
    wide = _define.accumulation_dtype(weight.dtype)
    factor = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean.to(wide) if bias is None else bias - norm.running_mean.to(wide)
    shift = shift * factor
    return weight.flatten(1) * factor[:, None], shift if norm.bias is None else shift + norm.bias
