"""How alike the attention maps of a model's layers are, by depth: the measurement behind ``vitkernels inspect``.

Layers are recognised by their class (:data:`KNOWN`); the authors' DeepViT, which is copied into projects under many names, by its attributes.
Queries and keys are taken by forward hooks on what makes them while the model runs: only those of the layer before are kept, and no map is stored.
What a hook cannot see is not guessed at: layers of other classes, layers that are called with a mask, and layers whose projection is not called as a
module are named in :attr:`Similarities.skipped`. Accelerated DeepViTs call their projections and can be inspected, too; of other models take the
original.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import report
from vitkernels.integrations._fused import is_fused, origin, published, qualified
from vitkernels.ops import attention_similarity


@dataclass(frozen=True)
class Source:
    """Where a layer's queries and keys can be seen.

    Attributes:
        layers: the layers whose outputs hold them: one for a packed [..., N, 3 H D], else those of q and of k, [..., N, H D] or, ``split`` into
            heads, [..., H, N, D].
        heads: attribute with the number of heads.
        scale: attribute with the scale of the logits; D ** -0.5 if the module has none.
        split: whether the outputs are split into heads already.
    """

    layers: tuple[str, ...]
    heads: str
    scale: str = "scale"
    split: bool = False

    def read(self, module: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
        """``(q, k, scale)`` with q and k [B, H, N, D]; B is all dimensions in front of the tokens."""
        q, k = outputs if len(outputs) == 2 else outputs[0].chunk(3, dim=-1)[:2]
        if not self.split:
            q, k = (t.unflatten(-1, (getattr(module, self.heads), -1)).transpose(-3, -2) for t in (q, k))
        scale = getattr(module, self.scale, None)
        return q.flatten(0, -4), k.flatten(0, -4), q.shape[-1] ** -0.5 if scale is None else float(scale)


_PACKED = Source(("to_qkv",), "heads")
_SEPARATE = Source(("q_proj", "k_proj"), "num_attention_heads", "scaling")
_QUERY_KEY = Source(("query", "key"), "num_attention_heads", "scaling")
_AUTHORS = Source(("qkv",), "num_heads")
_VIT_PYTORCH = (
    "deepvit",
    "mobile_vit",
    "parallel_vit",
    "simple_vit",
    "simple_vit_with_patch_dropout",
    "simple_vit_with_register_tokens",
    "vit",
    "vit_with_patch_dropout",
)
_TRANSFORMERS = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "ijepa": "IJepa", "vit_msn": "ViTMSN", "mobilevit": "MobileViT"}

KNOWN: dict[str, tuple[Source, ...]] = {
    # The norms of q and k, or the identities in their place, see them last.
    "timm.layers.attention.Attention": (Source(("q_norm", "k_norm"), "num_heads", split=True),),
    **{f"vit_pytorch.{module}.Attention": (_PACKED,) for module in _VIT_PYTORCH},
    **{
        f"transformers.models.{module}.modeling_{module}.{name}{kind}": (_SEPARATE, _QUERY_KEY)
        for module, name in _TRANSFORMERS.items()
        for kind in ("Attention", "SelfAttention")  # the class that projects, before transformers 5 and since
    },
}
"""Classes whose maps are softmax(q k^T scale) and nothing else, and where their q and k can be seen: the first source whose layers the module has."""


@dataclass(frozen=True)
class LayerSimilarity:
    """One layer, in the order in which layers run.

    Attributes:
        path: of the module; of its second call ``path (call 2)``.
        heads, tokens, head_dim: of its q and k.
        across_heads: [H, H], the similarity of its heads' maps.
        adjacent: [H], of each head's map with that of the layer before; None where they are not compared.
        note: why they are not.
    """

    path: str
    heads: int
    tokens: int
    head_dim: int
    across_heads: Tensor
    adjacent: Tensor | None
    note: str

    @property
    def with_others(self) -> Tensor:
        """[H]: of each head, the mean similarity with the layer's other heads; NaN if it is the only one."""
        return (self.across_heads.sum(1) - self.across_heads.diagonal()) / (self.heads - 1) if self.heads > 1 else torch.full((1,), torch.nan)


@dataclass(frozen=True)
class Similarities:
    """What :func:`layer_similarities` found.

    Attributes:
        layers: those measured, in the order in which they ran.
        skipped: path and reason of what looks like attention and was not measured.
    """

    layers: tuple[LayerSimilarity, ...]
    skipped: tuple[tuple[str, str], ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer and head, as :func:`write` puts them into a CSV."""
        return [
            {
                "layer": number,
                "path": layer.path,
                "heads": layer.heads,
                "tokens": layer.tokens,
                "head_dim": layer.head_dim,
                "head": head,
                "adjacent": None if layer.adjacent is None else float(layer.adjacent[head]),
                "across_heads": float(layer.with_others[head]) if layer.heads > 1 else None,
                "note": layer.note,
            }
            for number, layer in enumerate(self.layers, 1)
            for head in range(layer.heads)
        ]


COLUMNS = ("layer", "path", "heads", "tokens", "head_dim", "head", "adjacent", "across_heads", "note")


def layer_similarities(model: nn.Module, inputs: Any, *, dim: int = -2, **options: Any) -> Similarities:
    """Run a model once and measure how alike the attention maps of its layers are: each with the layer before, and across the heads of each.

    Args:
        model: from timm, transformers or vit_pytorch, or the authors' DeepViT. It runs in eval mode, without gradients, and is left as it was.
        inputs: what it is called with, ``model(inputs, **options)``; the mean is over the batch.
        dim: -2 compares columns of the maps (how much a token gives to the others, the paper's), -1 rows (what it looks at), see
            :func:`vitkernels.ops.attention_similarity`.
        **options: keywords of the call.

    The maps are those of the softmax; a DeepViT's are measured before they are mixed across heads.

    Raises:
        ValueError: no layer was found whose maps can be measured; the message says what was passed by and why.

    Paper: DeepViT, arXiv 2103.11886, section 3.
    """
    found, unknown = _attention(model)
    recorder = _Recorder(dim)
    modes = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_restore, modes)
        for path, module, source in found:
            recorder.watch(path, module, source, cleanup)
        if found:
            with torch.no_grad():
                model.eval()(inputs, **options)
    skipped = recorder.skipped(found) | unknown
    if not recorder.layers:
        reasons = [f"{path or 'the model'}: {reason}" for path, reason in skipped.items()] or ["it has no module that looks like attention"]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise ValueError(f"no attention layer of this model can be measured: {'; '.join(reasons[:3])}{more}")
    return Similarities(tuple(recorder.layers), tuple(skipped.items()))


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _attention(model: nn.Module) -> tuple[list[tuple[str, nn.Module, Source]], dict[str, str]]:
    """The layers that can be measured, and the path and reason of those that only look like it."""
    found: list[tuple[str, nn.Module, Source]] = []
    unknown: dict[str, str] = {}
    for path, module in model.named_modules():
        source = _source(module)
        if source is not None:
            found.append((path, module, source))
        elif isinstance(module, nn.MultiheadAttention) or any(_has(module, names) for names in (("qkv",), ("to_qkv",), *_PAIRS)):
            unknown[path] = f"how {qualified(type(module))} makes its maps is not known"
    return found, unknown


_PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("to_q", "to_k"), ("to_q", "to_kv"), ("to_queries", "to_keys"), ("q", "k"))


def _has(module: nn.Module, names: Sequence[str]) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


def _source(module: nn.Module) -> Source | None:
    cls = origin(module)[0] if is_fused(module) else published(type(module))
    sources = KNOWN.get(qualified(cls), ())
    # The authors' ReAttention and vitkernels.nn's; with apply_transform False the authors' has neither the mix nor the norm.
    if not sources and (_has(module, ("reatten_matrix", "var_norm")) or getattr(module, "apply_transform", None) is False):
        sources = (_AUTHORS,)
    return next((source for source in sources if _has(module, source.layers)), None)


class _Recorder:
    """Takes q and k as the hooks bring them, and keeps those of one layer."""

    def __init__(self, dim: int) -> None:
        self.layers: list[LayerSimilarity] = []
        self._dim = dim
        self._calls: dict[str, int] = {}
        self._masked: dict[str, str] = {}
        self._before: tuple[Tensor, Tensor, float] | None = None

    def watch(self, path: str, module: nn.Module, source: Source, cleanup: contextlib.ExitStack) -> None:
        """Put hooks on ``module`` and on what makes its q and k, until ``cleanup``."""
        outputs: dict[str, Tensor] = {}

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outputs.clear()
            mask = _mask(module, args, kwargs)
            if mask is not None:
                self._masked[path] = f"it was called with {mask}, so its maps are not those of q and k alone"

        def take(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, output: Tensor) -> None:
                outputs[name] = output
                if len(outputs) == len(source.layers) and path not in self._masked:
                    self._add(path, *source.read(module, [outputs[layer] for layer in source.layers]))
                    outputs.clear()

            return hook

        handles = [module.register_forward_pre_hook(begin, with_kwargs=True)]
        handles += [module.get_submodule(name).register_forward_hook(take(name)) for name in source.layers]
        for handle in handles:
            cleanup.callback(handle.remove)

    def _add(self, path: str, q: Tensor, k: Tensor, scale: float) -> None:
        self._calls[path] = self._calls.get(path, 0) + 1
        call = f" (call {self._calls[path]})" if self._calls[path] > 1 else ""
        note, adjacent = "", None
        if self._before is None:
            note = "the first layer"
        elif (note := _why_not_compared(self._before[0], q)) == "":
            q1, k1, scale1 = self._before
            adjacent = attention_similarity(q1, k1, q, k, scale=(scale1, scale), dim=self._dim).cpu()
        across = attention_similarity(q, k, scale=scale, dim=self._dim).cpu()
        self.layers.append(LayerSimilarity(path + call, q.shape[1], q.shape[2], q.shape[3], across, adjacent, note))
        self._before = (q, k, scale)

    def skipped(self, found: Sequence[tuple[str, nn.Module, Source]]) -> dict[str, str]:
        """Path and reason of the layers that were watched and not measured."""
        silent = "its projection was not called as a module: it did not run, or a fused forward passes it by (inspect the original)"
        return {path: self._masked.get(path, silent) for path, _, _ in found if path not in self._calls}


def _mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The name of a mask that ``module`` is called with."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    return next((name for name, value in given.items() if ("mask" in name and value is not None) or (name == "is_causal" and value)), None)


def _why_not_compared(before: Tensor, now: Tensor) -> str:
    """Why the maps of two layers have no cosine; "" if they have."""
    names = ("rows in the batch", "heads", "tokens")
    different = [f"{n} {name}, the layer before has {b}" for name, b, n in zip(names, before.shape, now.shape, strict=False) if b != n]
    if before.dtype is not now.dtype or before.device != now.device:
        different.append(f"{now.dtype} on {now.device}, the layer before is {before.dtype} on {before.device}")
    return "; ".join(different)


def write(folder: Path, found: Mapping[str, Similarities], stem: str = "inspect", *, origin: Mapping[str, Any] | None = None) -> tuple[Path, Path]:
    """Write ``<stem>.csv`` and ``<stem>.png`` for one model or several, by the name that is to stand in both.

    Args:
        folder: where they go; it must exist.
        found: name of the model -> what :func:`layer_similarities` found.
        stem: of the file names.
        origin: columns behind each row; :func:`vitkernels.report.provenance` if not given.
    """
    rows = [{"model": name, **row} for name, similarities in found.items() for row in similarities.rows()]
    csv = report.write_csv(folder / f"{stem}.csv", rows, report.provenance() if origin is None else origin, ("model", *COLUMNS))
    panels = {
        title: {name: [curve(layer) for layer in similarities.layers] for name, similarities in found.items()} for title, curve in _CURVES.items()
    }
    png = report.by_depth(folder / f"{stem}.png", panels, "cosine similarity")
    return csv, png


def _adjacent(layer: LayerSimilarity) -> list[float]:
    return [] if layer.adjacent is None else layer.adjacent.tolist()


def _across(layer: LayerSimilarity) -> list[float]:
    return layer.with_others.tolist()


_CURVES: dict[str, Callable[[LayerSimilarity], list[float]]] = {
    "Maps of each layer and the layer before": _adjacent,
    "Maps of each head and the layer's other heads": _across,
}
