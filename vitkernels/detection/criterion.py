"""The set loss of DETR (arXiv 2005.12872, section 3.1 and appendix A.2): class, L1 and GIoU loss of every decoder layer's matched queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.detection.matcher import HungarianMatcher
from vitkernels.detection.targets import PackedTargets, Targets
from vitkernels.nn import _checks
from vitkernels.ops.matching.op import KINDS, Kind

LOSSES = ("labels", "cardinality", "boxes")


class SetCriterion(nn.Module):
    """The official criterion, for all decoder layers at once: matches, then one call of :func:`vitkernels.ops.detection_set_loss`.

    Args:
        num_classes: classes without "no object".
        matcher: a :class:`HungarianMatcher`, or whatever is called and returns as one.
        weight_dict: weights of the losses by name, for whoever adds them up; not used here.
        eos_coef: weight of "no object" in the cross-entropy, whose logits have ``num_classes + 1`` channels.
        losses: which of ``"labels"``, ``"cardinality"`` and ``"boxes"``.
        kind: the class loss: ``"softmax"`` (DETR), or ``"focal"`` (Deformable DETR and its successors), for logits of ``num_classes`` channels, which
            has no use for ``eos_coef``. Give the matcher the same kind.
        alpha, gamma: of the focal loss.

    Raises:
        ValueError: a loss of another name (``"masks"`` is not computed here), or of another kind.

    ``forward`` with autocast computes in float32. State: the buffer ``empty_weight``, as the official class has it, for ``"softmax"``.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
        *,
        kind: Kind = "softmax",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        for name in losses:
            if name not in LOSSES:
                raise ValueError(f"SetCriterion: losses holds {name!r}; it must hold some of {', '.join(map(repr, LOSSES))}")
        if kind not in KINDS:
            raise ValueError(f"SetCriterion: kind is {kind!r}; it must be 'softmax' or 'focal'")
        self.num_classes, self.matcher, self.weight_dict, self.eos_coef, self.losses = num_classes, matcher, weight_dict, eos_coef, list(losses)
        self.kind: Kind = kind
        self.alpha, self.gamma = alpha, gamma
        if kind == "softmax":
            empty_weight = torch.ones(num_classes + 1)
            empty_weight[-1] = eos_coef
            self.register_buffer("empty_weight", empty_weight)

    def extra_repr(self) -> str:
        """What is computed."""
        return f"num_classes={self.num_classes}, eos_coef={self.eos_coef}, losses={self.losses}, kind={self.kind!r}"

    def forward(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """The official criterion's arguments and result.

        Args:
            outputs: ``"pred_logits"`` [B, Q, C] and ``"pred_boxes"`` [B, Q, 4], (centre x, centre y, width, height), and in ``"aux_outputs"``, if
                there, a list of the same for the decoder layers before the last.
            targets: for each image ``"labels"`` [T_b] and ``"boxes"`` [T_b, 4].

        Returns:
            The losses by name: ``loss_ce``, and of the last layer's matched queries ``class_error`` in percent (``"labels"``); ``cardinality_error``;
            ``loss_bbox`` and ``loss_giou`` (``"boxes"``). Those of ``aux_outputs[i]`` end in ``_i``. The box losses are divided by the number of
            targets, averaged over all processes.

        Raises:
            ValueError: a wrong shape, another number of images, a label outside of [0, C), a box of negative width or height, a mix of devices; the
                message names the image.
            TypeError: a wrong dtype, or something that is no tensor.
            KeyError: an image without labels or boxes.
        """
        found, channels = outputs["pred_logits"].shape[-1], self.num_classes + (self.kind == "softmax")
        if found != channels:
            raise ValueError(f"SetCriterion: pred_logits has {found} channels; it must have {channels}, for {self.num_classes} classes")
        one_pass = self.matcher.match if type(self.matcher) is HungarianMatcher and not _checks.hooked(self.matcher) else None
        settings = {"eos_coef": self.eos_coef, "alpha": self.alpha, "gamma": self.gamma}
        return evaluate(self.matcher, one_pass, outputs, targets, self.losses, kind=self.kind, **settings)


def evaluate(
    matcher: nn.Module,
    one_pass: Callable[[Tensor, Tensor, PackedTargets], Tensor] | None,
    outputs: Mapping[str, Any],
    targets: Targets,
    names: Sequence[str],
    *,
    kind: Kind = "softmax",
    **settings: Any,
) -> dict[str, Tensor]:
    """What the official criterion returns of ``names``; ``settings`` are those of :func:`vitkernels.ops.detection_set_loss`.

    ``one_pass`` is the matcher's way to match all decoder layers at once, if it has one.
    """
    (logits, boxes), packed = stacked(outputs), PackedTargets.pack(targets)
    matches = match_layers(matcher, one_pass, logits, boxes, packed, outputs, targets)
    losses = ops.detection_set_loss(logits, boxes, packed.labels, packed.boxes, matches, average_boxes(packed), kind=kind, **settings)
    found = by_name(losses, names, logits, packed, kind)
    if "labels" in names:
        found["class_error"] = class_error(logits[0], packed, matches[0])
    return found


def stacked(outputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [L, B, Q, C] and boxes [L, B, Q, 4]: of the last layer, then of ``aux_outputs``."""
    layers = [outputs, *outputs.get("aux_outputs", ())]
    return torch.stack([layer["pred_logits"] for layer in layers]), torch.stack([layer["pred_boxes"] for layer in layers])


def match_layers(
    matcher: nn.Module,
    one_pass: Callable[[Tensor, Tensor, PackedTargets], Tensor] | None,
    logits: Tensor,
    boxes: Tensor,
    packed: PackedTargets,
    outputs: Mapping[str, Any],
    targets: Targets,
) -> Tensor:
    """Matches [L, B, Q] of all layers: in one pass, or by a matcher of somebody's own, layer by layer."""
    if one_pass is not None:
        return one_pass(logits, boxes, packed)
    layers = [{name: value for name, value in outputs.items() if name != "aux_outputs"}, *outputs.get("aux_outputs", ())]
    return torch.stack([packed.layout.matches(matcher(layer, targets), logits.shape[2]) for layer in layers])


def average_boxes(packed: PackedTargets) -> Tensor | float:
    """What the box losses are divided by: the number of targets, averaged over the processes, at least 1. It is not waited for."""
    total = packed.layout.total
    if not (dist.is_available() and dist.is_initialized()):
        return float(max(total, 1))
    boxes = torch.tensor(float(total), device=packed.boxes.device)
    dist.all_reduce(boxes)
    return (boxes / dist.get_world_size()).clamp(min=1)


def by_name(losses: Tensor, names: Sequence[str], logits: Tensor, packed: PackedTargets, kind: str) -> dict[str, Tensor]:
    """The losses [L, 3] of the last layer and of those before it, and the cardinality errors, by their official names: those asked for."""
    class_loss, box_loss, overlap_loss = losses.unbind(1)
    columns: dict[str, Tensor] = {}
    for name in names:
        if name == "labels":
            columns["loss_ce"] = class_loss
        elif name == "cardinality":
            columns["cardinality_error"] = cardinality_errors(logits, packed, kind)
        else:
            columns |= {"loss_bbox": box_loss, "loss_giou": overlap_loss}
    layers = {name: column.unbind(0) for name, column in columns.items()}
    suffixes = ("", *(f"_{i}" for i in range(losses.shape[0] - 1)))
    return {name + suffix: layers[name][i] for i, suffix in enumerate(suffixes) for name in columns}


@torch.no_grad()
def cardinality_errors(logits: Tensor, packed: PackedTargets, kind: str) -> Tensor:
    """[L]: how far the number of queries that name a class is from the number of targets, on average over the images. For logging."""
    present = logits.amax(-1).sigmoid() > 0.5 if kind == "focal" else logits.argmax(-1) != logits.shape[-1] - 1
    wanted = packed.layout.cu_targets.diff()
    return (present.sum(-1) - wanted).abs().float().mean(-1)


@torch.no_grad()
def class_error(logits: Tensor, packed: PackedTargets, matches: Tensor) -> Tensor:
    """Percent of the matched queries whose likeliest class is not their target's: logits [B, Q, C], matches [B, Q]. For logging."""
    matched = sum(min(size, logits.shape[1]) for size in packed.layout.sizes)
    if matched == 0:
        return torch.full((), 100.0, device=logits.device)
    right = (logits.argmax(-1) == packed.labels[matches.clamp(min=0)]) & (matches >= 0)
    return 100 - right.sum().float() * (100.0 / matched)
