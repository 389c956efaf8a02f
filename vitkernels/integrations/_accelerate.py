"""``vitkernels.accelerate``: find, decide, swap, and report."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from vitkernels.integrations import (
    blocks,
    classifiers,
    convolutions,
    folded,
    learnable_memory,
    mobilevit,
    official,
    patch_embedding,
    timm,
    transformers,
    vit_pytorch,
)
from vitkernels.integrations._fused import Fused, is_fused, last_fallback, origin, published, qualified, restore, swap

_TABLE: dict[str, type[Fused]] = {
    **timm.TABLE,
    **transformers.TABLE,
    **vit_pytorch.TABLE,
    **learnable_memory.TABLE,
    **folded.TABLE,
    **convolutions.TABLE,
    **blocks.TABLE,
    **mobilevit.TABLE,
}

_NAMES = "a string or several strings: ops, class names or path globs"


@dataclass(frozen=True)
class Record:
    """What became of one module.

    Attributes:
        path: its name in ``model.named_modules()``; empty for the model itself.
        original_class: qualified name of the class it had.
        op: the op of :mod:`vitkernels.ops` that does the work, or would.
        backend: the backend this op chooses now for the module's dtype and device; empty for a skipped module.
        reason: why the module was skipped; empty for a replaced one.
        note: what to know of the replaced module, where its results are not the original's in every respect.
    """

    path: str
    original_class: str
    op: str
    backend: str = ""
    reason: str = ""
    note: str = ""


class Handle:
    """What :func:`accelerate` did; printing it gives a table. As a context manager it reverts the model at the end of the block.

    Attributes:
        replaced: a :class:`Record` of each module replaced (or that would be, after a dry run).
        skipped: a :class:`Record` of each module known to vitkernels and left as it is, with the reason.
        notes: remarks about the call, for example a pattern that matched nothing.
    """

    def __init__(self, modules: dict[str, nn.Module], replaced: list[Record], skipped: list[Record], notes: list[str], dry_run: bool) -> None:
        self.replaced, self.skipped, self.notes, self.dry_run = replaced, skipped, notes, dry_run
        self._modules = modules
        self._removed = False

    @property
    def fallbacks(self) -> dict[str, str]:
        """Replaced modules whose latest call that could not be fused ran the original forward instead, with the reason."""
        reasons = {path: last_fallback(module) for path, module in self._modules.items()}
        return {path: reason for path, reason in reasons.items() if reason is not None}

    def remove(self) -> None:
        """Give every replaced module its original class back. Harmless when called twice, and in any order among several handles."""
        for module in self._modules.values():
            restore(module)
        self._modules = {}
        self._removed = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<vitkernels.Handle: {len(self.replaced)} replaced, {len(self.skipped)} skipped>"

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            return "\n".join(["vitkernels.accelerate: nothing to replace: no module of this model is of a class vitkernels knows.", *self.notes])
        done = "would replace" if self.dry_run else "replaced, and since reverted," if self._removed else "replaced"
        known = len(self.replaced) + len(self.skipped)
        lines = [f"vitkernels.accelerate: {done} {len(self.replaced)} of the {known} modules it knows in this model."]
        fallbacks = self.fallbacks
        head = ("module", "class", "op", "backend", "note")
        rows = [(*_cells(r), f"a call ran the original: {fallbacks[r.path]}" if r.path in fallbacks else r.note) for r in self.replaced]
        rows += [(*_cells(r), f"skipped: {r.reason}") for r in self.skipped]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        for row in (head, tuple("-" * width for width in widths), *rows):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join([*lines, *self.notes])


def _cells(record: Record) -> tuple[str, str, str, str]:
    return record.path or "(the model)", record.original_class.rpartition(".")[2], record.op, record.backend or "-"


def accelerate(
    model: nn.Module,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    dry_run: bool = False,
) -> Handle:
    """Replace, in place, every module of ``model`` that vitkernels has a faster equivalent for.

    Each such module gets a class derived from its own that overrides ``forward``; nothing else changes. Parameters, ``state_dict``, hooks,
    optimizers, copies, pickles and ``isinstance`` stay as they are; outputs and gradients are the same up to rounding. Modules are recognised by
    their exact class; a subclass, a hooked or adapted inner layer, and whatever else would make the result differ is left alone and reported.
    What changes later (a hook added, another dtype, an input it does not take) makes that call run the original code.

    Where norms are folded into convolutions (cascaded group attention in evaluation, a whole EfficientViT) and no gradient is wanted, the folded
    weights are kept, outside of the model, until a weight or a statistic changes: by an optimizer, ``load_state_dict``, ``.to()``, in place or by
    another tensor. The one change PyTorch does not count, a write in place through ``parameter.data``, is seen after the next call with gradients or
    in training mode.

    An EfficientViT (timm's, the authors') is one native call in inference on the CPU: where no gradient is wanted, all is in evaluation, no autocast
    is on and nobody's hook waits inside. Otherwise its layers run as they are, with the attention fused.

    On the CPU, the convolutions of MobileViT and MobileViTv2 (timm's, transformers') run with their norms folded in while the model is in evaluation
    and no gradient is wanted (``torch.no_grad`` or ``torch.inference_mode``): inverted residuals in one pass, results in channels_last memory. In
    float32, and in 16 bits unless oneDNN has products in them that the kernels have not (in bfloat16 where the CPU multiplies in it, in float16 where
    it does not), their blocks (vit_pytorch's of MobileViT, too) run as wholes there. Folded weights are kept under the same rule. So are the packed
    weights of MLPs (timm's ``Mlp``, vit_pytorch's ``FeedForward``), which in these dtypes run in one pass there; of whole transformer blocks (timm's
    ``Block`` and a ``Sequential`` of such, vit_pytorch's ``Transformer``, the layers of transformers' ViT, DeiT, DINOv2, CLIP and SigLIP), which are
    one call, however many follow one another, and whose last makes the class token alone where a classifier's head reads no more (timm's
    ``VisionTransformer``, vit_pytorch's ``ViT`` and ``DeepViT``, transformers' ViT and DeiT for image classification); and of patch embeddings (a
    ``Conv2d`` whose stride is its kernel, from 7 pixels on; vit_pytorch's ``Sequential``).

    In training on the CPU, under autocast too, MobileViT's and MobileViTv2's convolutions run in channels_last (those of long sums excepted), and
    each live norm with the activation behind it is one op, which updates the running statistics as the norm would; frozen norms run the original.

    A NaViT-like model (vit_pytorch's two NaViTs, timm's NaFlexVit, transformers' Siglip2 vision model) is replaced as a whole, with its attention
    layers: it packs the tokens of all images without padding and builds no mask. What it does not have in common with the original stands in the
    ``note`` of its record: with dropout other masks of the same probability, and other features of padding, which no pooling reads. Dropout in a
    DeepViT's attention draws other masks, too, and the authors' DeepViT returns None in the place of attention maps that nobody reads.

    A detector of transformers (DETR and its family) is replaced with its attention, and then looks up another loss, which matches and computes all of
    its decoder layers in one pass. The authors' ``HungarianMatcher`` and ``SetCriterion`` are no part of a model: give them to ``accelerate``, too.

    ``torch.export``, ONNX export, ``torch.jit.trace`` and ``torch.fx`` see the original code. ``torch.jit.script`` does not know the
    replacements: call :meth:`Handle.remove` first.

    Args:
        model: any module, alone or inside DDP, FSDP2 or ``torch.compile``.
        only: names to restrict the replacement to: an op (``"separable_self_attention"``), a class (``"LinearSelfAttention"``, with or without its
            module), or a glob on module paths (``"stages.3.*"``); one string or several.
        skip: names to leave out, in the same forms.
        dry_run: decide and report, change nothing.

    Returns:
        A :class:`Handle` to print and to revert with.

    Raises:
        TypeError: an argument of the wrong type.
        BackendUnavailable: a backend was asked for by name and cannot run this model where it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}; it must be a torch.nn.Module")
    if not isinstance(dry_run, bool):
        raise TypeError(f"accelerate: dry_run is a {type(dry_run).__name__}; it must be a bool")
    selection = {"only": _patterns("only", only), "skip": _patterns("skip", skip)}

    paths = {module: path for path, module in model.named_modules()}
    planned: dict[nn.Module, type[Fused]] = {}
    records: dict[nn.Module, Record] = {}
    candidates: list[tuple[str, type[Fused], str]] = []
    # Children first: whether a block can be replaced depends on its layers.
    for module, path in reversed(paths.items()):
        found = _find(module)
        if found is None:
            continue
        mixin, name, reason = found
        candidates.append((path, mixin, name))
        reason = (
            reason
            or _deselected(selection, path, mixin, name)
            or ("its forward is overridden on the instance" if "forward" in module.__dict__ else None)
            or mixin._vk_why_not(module, lambda child: planned.get(child, type(child)))
        )
        absorbed = [] if reason else [child for child in module.modules() if child in planned and issubclass(planned[child], mixin._vk_absorbs)]
        parts = {} if reason else {part: (paths[part], kind, _name(part)) for part, kind in mixin._vk_parts(module).items()}
        candidates += parts.values()
        for part_path, kind, part_name in parts.values():
            if _deselected({"skip": selection["skip"]}, part_path, kind, part_name):
                reason = f"{part_path.removeprefix(path).lstrip('.')}, without which it cannot be replaced, is named in skip"
        if reason is not None:
            records[module] = Record(path, name, mixin._vk_op, reason=reason)
            continue
        for child in absorbed:
            del planned[child], records[child]
        for new, (new_path, kind, new_name) in {module: (path, mixin, name), **parts}.items():
            planned[new] = kind
            backend = kind._vk_backend(new)
            records[new] = Record(new_path, new_name, kind._vk_op, backend=backend, note=kind._vk_note(new))
    if not dry_run:
        for module, mixin in planned.items():
            swap(module, mixin)
    in_order = [records[module] for module in paths if module in records]
    return Handle(
        {} if dry_run else {paths[module]: module for module in planned},
        [record for record in in_order if not record.reason],
        [record for record in in_order if record.reason],
        [*_unmatched(selection, candidates), *_when({records[module].op for module, mixin in planned.items() if mixin._vk_in_evaluation})],
        dry_run,
    )


def _when(ops: set[str]) -> list[str]:
    """What to know of those that work in evaluation alone."""
    if not ops:
        return []
    names = " and ".join(sorted(ops))
    return [f"note: {names} run in evaluation without gradients; in training, under autocast, in torch.compile and torch.export their layers do."]


def _name(module: nn.Module) -> str:
    return qualified(published(type(module)))


def _find(module: nn.Module) -> tuple[type[Fused], str, str | None] | None:
    """The replacement for a module, its class's name, and a reason against that the class alone gives; ``None`` for a class we do not know."""
    cls = published(type(module))
    name = qualified(cls)
    if is_fused(module):
        original, mixin = origin(module)
        return mixin, qualified(published(original)), "already accelerated"
    if name in _TABLE:
        return _TABLE[name], name, None
    for match in (official.match, blocks.match, patch_embedding.match, classifiers.match):
        if (by_content := match(module)) is not None:
            return by_content, name, None
    for base in cls.__mro__[1:]:
        if qualified(base) in _TABLE:
            return _TABLE[qualified(base)], name, f"a subclass of {base.__name__}, which may compute something else"
    return None


def _patterns(argument: str, value: Any) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None if value is None else (value,)
    if not isinstance(value, Iterable):
        raise TypeError(f"accelerate: {argument} is a {type(value).__name__}; it must be {_NAMES}")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"accelerate: {argument} holds a {type(pattern).__name__}; it must be {_NAMES}")
    return patterns


def _matches(pattern: str, path: str, mixin: type[Fused], name: str) -> bool:
    return pattern in (mixin._vk_op, name, name.rpartition(".")[2]) or fnmatch.fnmatchcase(path, pattern)


def _deselected(selection: dict[str, tuple[str, ...] | None], path: str, mixin: type[Fused], name: str) -> str | None:
    only, skip = selection.get("only"), selection["skip"]
    if only is not None and not any(_matches(pattern, path, mixin, name) for pattern in only):
        return "not named in only"
    if skip is not None and any(_matches(pattern, path, mixin, name) for pattern in skip):
        return "named in skip"
    return None


def _unmatched(selection: dict[str, tuple[str, ...] | None], candidates: list[tuple[str, type[Fused], str]]) -> list[str]:
    return [
        f"note: {argument}={pattern!r} matches none of the modules vitkernels knows in this model"
        for argument, patterns in selection.items()
        for pattern in patterns or ()
        if not any(_matches(pattern, *candidate) for candidate in candidates)
    ]
