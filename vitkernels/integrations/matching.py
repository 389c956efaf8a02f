"""Matching and set loss of DETR in models: transformers' detectors, and the authors' ``HungarianMatcher`` and ``SetCriterion``.

transformers builds matcher and criterion anew in every call of a function that the model looks up by its loss type. So the model is what is replaced:
it looks up ours. The authors' classes are recognised by their attributes (``official.py``) and compared by running them.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitkernels import ops
from vitkernels.backends import backend
from vitkernels.detection import HungarianMatcher, PackedTargets, criterion
from vitkernels.detection.matcher import match
from vitkernels.detection.targets import Targets
from vitkernels.integrations._fused import Fused, Role, fell_back, last_fallback, swap
from vitkernels.integrations.packed import untraced
from vitkernels.nn import _checks, _derived
from vitkernels.ops.matching.op import Kind

_TRANSFORMERS = "transformers.loss.loss_for_object_detection"
_LOSSES: dict[str, Kind] = {
    f"{_TRANSFORMERS}.ForObjectDetectionLoss": "softmax",
    "transformers.loss.loss_deformable_detr.DeformableDetrForObjectDetectionLoss": "focal",
}


class Detector(Fused):
    """``DetrForObjectDetection`` and its family: what they look up as their loss."""

    _vk_op: ClassVar[str] = "detection_set_loss"
    # transformers looks up by the class's name what of a model can be recorded, and writes it into the configs it saves.
    _vk_same_name: ClassVar[bool] = True

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        loss = module.loss_function
        return None if _name(loss) in _LOSSES else f"its loss is {_name(loss).rpartition('.')[2]}, which has more to it than classes and boxes"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.parameters())

    @property
    def loss_function(self) -> Any:
        """The original's, or in its place what computes the same of the same arguments."""
        original = super().loss_function
        kind = _LOSSES.get(_name(original))
        if kind is None:
            fell_back(self, f"its loss is {_name(original)}")
            return original
        return functools.partial(untraced(_loss), self, original, kind)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _loss(
    module: nn.Module,
    original: Callable[..., Any],
    kind: Kind,
    logits: Tensor,
    labels: Targets,
    device: torch.device,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """The arguments and results of transformers' ``ForObjectDetectionLoss``."""
    weights = (config.class_cost, config.bbox_cost, config.giou_cost)
    alpha = config.focal_alpha if kind == "focal" else 0.25
    reason = _checks.why_not_tensor(logits)
    if logits.shape[-1] != config.num_labels + (kind == "softmax"):
        reason = f"logits have {logits.shape[-1]} channels for {config.num_labels} labels"
    elif config.auxiliary_loss and not (isinstance(outputs_class, Tensor) and isinstance(outputs_coord, Tensor)):
        reason = "there are no predictions of the other layers"
    elif not any(weights) or alpha < 0:
        reason = "the costs are all 0" if not any(weights) else "focal_alpha is negative"
    if reason is not None:
        fell_back(module, reason)
        return original(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, **kwargs)

    auxiliary = None
    logits, boxes = logits[None], pred_boxes[None]
    if config.auxiliary_loss and outputs_class is not None and outputs_coord is not None:
        auxiliary = [{"logits": a, "pred_boxes": b} for a, b in zip(outputs_class[:-1], outputs_coord[:-1], strict=False)]
        logits, boxes = torch.cat((logits, outputs_class[:-1])), torch.cat((boxes, outputs_coord[:-1]))
    targets = PackedTargets.pack(labels, labels="class_labels")
    # In the cost of matching, transformers' alpha is a constant.
    matches = match(logits, boxes, targets, weights, kind=kind)
    eos_coef = config.eos_coefficient if kind == "softmax" else 1.0
    losses = ops.detection_set_loss(logits, boxes, targets.labels, targets.boxes, matches, _boxes(targets), kind=kind, eos_coef=eos_coef, alpha=alpha)
    # Layers beyond the decoder's have no weight.
    class_loss, box_loss, overlap_loss = losses[: config.decoder_layers if auxiliary else 1].sum(0).unbind()
    total = class_loss + config.bbox_loss_coefficient * box_loss + config.giou_loss_coefficient * overlap_loss
    return total, criterion.by_name(losses, criterion.LOSSES, logits, targets, kind), auxiliary


def _boxes(targets: PackedTargets) -> Tensor | float:
    """What transformers divides by: the number of targets, reduced as accelerate does it where that runs."""
    module = sys.modules[_TRANSFORMERS]
    state = getattr(module, "PartialState", None)
    if state is None or not state._shared_state:
        return float(max(targets.layout.total, 1))
    boxes = module.reduce(torch.tensor([float(targets.layout.total)], device=targets.boxes.device))
    return (boxes / state().num_processes).clamp(min=1)


class AuthorsMatcher(Fused):
    """``HungarianMatcher`` of DETR's authors."""

    _vk_op: ClassVar[str] = "pairwise_box_cost"

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return _why_not_same("DETR's HungarianMatcher", module, cls)

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return torch.empty(0)  # it has none

    def _vk_match(self, logits: Tensor, boxes: Tensor, targets: PackedTargets) -> Tensor:
        return match(logits, boxes, targets, (self.cost_class, self.cost_bbox, self.cost_giou))

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """The original's arguments and result."""
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        if (reason := _checks.why_not_tensor(logits)) is not None:
            fell_back(self, reason)
            return super().forward(outputs, targets)
        packed = PackedTargets.pack(targets)
        return packed.layout.pairs(self._vk_match(logits, boxes, packed))


class AuthorsCriterion(Fused):
    """``SetCriterion`` of DETR's authors."""

    _vk_op: ClassVar[str] = "detection_set_loss"

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return cls._vk_why_not_now(module) or _why_not_same("DETR's SetCriterion", module, cls)

    @classmethod
    def _vk_why_not_now(cls, module: Any) -> str | None:
        others = [name for name in module.losses if name not in criterion.LOSSES]
        if others:
            return f"it computes {others[0]!r}"
        if _NO_OBJECT.entry(module).value("weight", functools.partial(_weight_of_no_object, module)) is None:
            return "its classes have other weights than 1, and 'no object' than eos_coef"
        return None

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.empty_weight

    def forward(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """The original's arguments and result."""
        logits = outputs["pred_logits"]
        reason = _checks.why_not_tensor(logits) or self._vk_why_not_now(self)
        if reason is None and logits.shape[-1] != self.num_classes + 1:
            reason = f"pred_logits has {logits.shape[-1]} channels for {self.num_classes} classes"
        if reason is not None:
            fell_back(self, reason)
            return super().forward(outputs, targets)
        matcher = self.matcher
        ours = {AuthorsMatcher: "_vk_match", HungarianMatcher: "match"}
        name = next((name for kind, name in ours.items() if isinstance(matcher, kind)), None)
        one_pass = getattr(matcher, name) if name is not None and not _checks.hooked(matcher) else None
        return criterion.evaluate(matcher, one_pass, outputs, targets, self.losses, eos_coef=self.eos_coef)


def _weight_of_no_object(module: Any) -> float | None:
    """``eos_coef`` if the weights of the classes say no more than that. Waits for a GPU, once for each change of the weights."""
    weights = module.empty_weight
    expected = torch.ones_like(weights)
    expected[-1] = module.eos_coef
    # Made in float32, and then perhaps brought to another dtype.
    rounding = max(torch.finfo(weights.dtype).eps, torch.finfo(torch.float32).eps)
    return module.eos_coef if torch.allclose(weights, expected, rtol=rounding, atol=0) else None


_NO_OBJECT: _derived.Derived[None, float | None] = _derived.Derived(lambda module: None, lambda module: (module.eos_coef, module.empty_weight))


def _why_not_same(known_as: str, module: Any, replacement: type[Fused]) -> str | None:
    """A name and some attributes promise nothing about the code: run copies on two images, one without targets, and compare."""
    with torch.random.fork_rng([]), torch.no_grad(), backend("reference"):
        theirs, ours = copy.deepcopy(module).cpu().double(), copy.deepcopy(module).cpu().double()
        swap(ours, replacement)
        classes = getattr(module, "num_classes", 7)
        layers: list[dict[str, Any]] = [
            {
                "pred_logits": torch.randn(2, 9, classes + 1, dtype=torch.float64),
                "pred_boxes": torch.rand(2, 9, 4, dtype=torch.float64) * 0.4 + 0.2,
            }
            for _ in range(2)
        ]
        outputs = layers[0] | {"aux_outputs": layers[1:]}
        targets = [{"labels": torch.randint(classes, (count,)), "boxes": torch.rand(count, 4, dtype=torch.float64) * 0.4 + 0.2} for count in (4, 0)]
        found = []
        for probe in (theirs, ours):
            for below in probe.modules():  # hooks are for the user's data
                below._forward_hooks.clear()
                below._forward_pre_hooks.clear()
            try:
                outcome = probe.forward(outputs, targets)
                found.append(pytree.tree_flatten(dict(sorted(outcome.items())) if isinstance(outcome, dict) else outcome))
            except Exception as error:  # whatever foreign code may raise
                return f"it has the attributes of {known_as}, but does not run like it: {error}"
    if (reason := last_fallback(ours)) is not None:
        return reason
    (expected, structure), (got, other) = found
    same = structure == other and all(
        isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-10)
        for a, b in zip(expected, got, strict=True)
    )
    return None if same else f"it has the attributes of {known_as}, but computes something else"


TABLE: dict[str, type[Fused]] = {
    f"transformers.models.{folder}.modeling_{folder}.{family}{task}": Detector
    for folder, family, tasks in (
        ("detr", "Detr", ("ForObjectDetection", "ForSegmentation")),
        ("table_transformer", "TableTransformer", ("ForObjectDetection",)),
        ("yolos", "Yolos", ("ForObjectDetection",)),
        ("conditional_detr", "ConditionalDetr", ("ForObjectDetection", "ForSegmentation")),
        ("deformable_detr", "DeformableDetr", ("ForObjectDetection",)),
        ("dab_detr", "DabDetr", ("ForObjectDetection",)),
        ("rt_detr", "RTDetr", ("ForObjectDetection",)),
        ("rt_detr_v2", "RTDetrV2", ("ForObjectDetection",)),
        ("d_fine", "DFine", ("ForObjectDetection",)),
    )
    for task in tasks
}
"""Those whose loss has more to it are named in the report, with the reason."""
