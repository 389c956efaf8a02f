"""Which query stands for which target: the Hungarian matcher of DETR (arXiv 2005.12872, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.detection.targets import PackedTargets, Targets
from vitkernels.ops.matching.assignment import Invalid
from vitkernels.ops.matching.op import Kind


class HungarianMatcher(nn.Module):
    """The assignment of least total cost of targets to queries, for each image: scipy's own indices, ties included.

    The cost of a pair is ``cost_class`` times the class cost, plus ``cost_bbox`` times the L1 distance of the boxes, minus ``cost_giou`` times their
    GIoU. Only pairs within an image are computed.

    Args:
        cost_class, cost_bbox, cost_giou: weights, not all 0.
        kind: the class cost: ``"softmax"`` (DETR) or ``"focal"`` (Deformable, Conditional, RT- and RF-DETR); see
            :func:`vitkernels.ops.pairwise_box_cost`.
        alpha, gamma: of the focal cost.
        invalid: what becomes of costs that are NaN or infinite: ``"replace"``, by the largest finite cost of their image, with one warning, or
            ``"raise"``; see :func:`vitkernels.ops.linear_sum_assignment`.

    Raises:
        ValueError: all weights are 0.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        *,
        kind: Kind = "softmax",
        alpha: float = 0.25,
        gamma: float = 2.0,
        invalid: Invalid = "replace",
    ) -> None:
        super().__init__()
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("HungarianMatcher: cost_class, cost_bbox and cost_giou are all 0; at least one must not be")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.kind: Kind = kind
        self.alpha, self.gamma = alpha, gamma
        self.invalid: Invalid = invalid

    def extra_repr(self) -> str:
        """The weights and the kind of the class cost."""
        return f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}, kind={self.kind!r}"

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """The official matcher's arguments and result.

        Args:
            outputs: ``"pred_logits"`` [B, Q, C] and ``"pred_boxes"`` [B, Q, 4], (centre x, centre y, width, height).
            targets: for each image ``"labels"`` [T_b] and ``"boxes"`` [T_b, 4].

        Returns:
            For each image its matched queries, ascending, and their targets: int64 [min(Q, T_b)] each, on the CPU.

        Raises:
            ValueError: a wrong shape, another number of images, a label outside of [0, C), a box of negative width or height, a mix of devices; the
                message names the image.
            TypeError: a wrong dtype, or something that is no tensor.
            KeyError: an image without labels or boxes.
        """
        packed = PackedTargets.pack(targets)
        return packed.layout.pairs(self.match(outputs["pred_logits"], outputs["pred_boxes"], packed))

    def match(self, logits: Tensor, boxes: Tensor, targets: PackedTargets) -> Tensor:
        """The same for all decoder layers in one pass, with one copy from a GPU: logits [L, B, Q, C] or [B, Q, C] and boxes of the same shape.

        Returns:
            int64 [L, B, Q] or [B, Q] on the device of logits: the target of each query, counted over the batch, -1 for none.
        """
        weights = (self.cost_class, self.cost_bbox, self.cost_giou)
        return match(logits, boxes, targets, weights, kind=self.kind, alpha=self.alpha, gamma=self.gamma, invalid=self.invalid)


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    weights: tuple[float, float, float],
    *,
    kind: Kind = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
    invalid: Invalid = "replace",
) -> Tensor:
    """:meth:`HungarianMatcher.match` of these settings."""
    costs = ops.pairwise_box_cost(logits, boxes, targets.labels, targets.boxes, targets.layout, weights, kind=kind, alpha=alpha, gamma=gamma)
    return ops.linear_sum_assignment(costs, targets.layout, invalid=invalid)
