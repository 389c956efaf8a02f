"""DETR's matching cost and set loss in plain PyTorch, all layers and images at once: no loop, no host sync, float32 and wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops.packed.layout import sequence_of_rows

EPSILON = 1e-8  # what every implementation of the focal cost adds to a probability before its logarithm


def corners(boxes: Tensor) -> Tensor:
    """Boxes (centre x, centre y, width, height) as (x0, y0, x1, y1), [..., 4]."""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat((centre - half, centre + half), dim=-1)


def generalized_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of boxes [..., 4] given by corners, elementwise: no pair is computed that is not asked for."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        sides = high - low
        return sides[..., 0] * sides[..., 1]

    low, high, other_low, other_high = boxes[..., :2], boxes[..., 2:], others[..., :2], others[..., 2:]
    inner_low, inner_high = torch.maximum(low, other_low), torch.minimum(high, other_high)
    sides = (inner_high - inner_low).clamp(min=0)
    overlap = sides[..., 0] * sides[..., 1]
    union = area(low, high) + area(other_low, other_high) - overlap
    hull = area(torch.minimum(low, other_low), torch.maximum(high, other_high))
    return overlap / union - (hull - union) / hull


def pairwise_box_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    cu_targets: Tensor,
    weights: tuple[float, float, float],
    focal: bool,
    alpha: float,
    gamma: float,
) -> Tensor:
    """The cost [L, T, Q] of each target and each query of its image: logits [L, B, Q, C], boxes [L, B, Q, 4], cu_targets [B + 1]."""
    wide = _define.accumulation_dtype(logits.dtype)
    logits, boxes, target_boxes = logits.to(wide), boxes.to(wide), target_boxes.to(wide)
    image, _ = sequence_of_rows(cu_targets, target_labels.shape[0])
    scores = (logits if focal else logits.softmax(-1))[:, image, :, target_labels].transpose(0, 1)  # [L, T, Q]
    if focal:
        p, rest = scores.sigmoid(), (-scores).sigmoid()  # 1 - p would be all rounding where p is almost 1
        class_cost = (1 - alpha) * p**gamma * (rest + EPSILON).log() - alpha * rest**gamma * (p + EPSILON).log()
    else:
        class_cost = -scores
    boxes, others = boxes[:, image], target_boxes[:, None]  # [L, T, Q, 4], [T, 1, 4]
    distance = (boxes - others).abs().sum(-1)
    overlap = generalized_box_iou(corners(boxes), corners(others))
    return weights[0] * class_cost + weights[1] * distance - weights[2] * overlap


def detection_set_loss(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    matches: Tensor,
    num_boxes: Tensor,
    eos_coef: float,
    focal: bool,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Class, L1 and GIoU loss [L, 3]: logits [L, B, Q, C], boxes [L, B, Q, 4], matches [L, B, Q] into the targets, -1 for none."""
    wide = _define.accumulation_dtype(logits.dtype)
    logits, boxes, num_boxes = logits.to(wide), boxes.to(wide), num_boxes.to(wide)
    classes, one = logits.shape[-1], logits.new_ones(())
    # Queries without a target get one more, behind the last: no object for a class, and for a box the one that then stands in the prediction's place.
    matched = matches >= 0
    index = torch.where(matched, matches, target_labels.shape[0])
    label = torch.cat((target_labels, target_labels.new_full((1,), classes if focal else classes - 1)))[index]
    others = torch.cat((target_boxes.to(wide), boxes.new_full((1, 4), 0.5)))[index]
    boxes = torch.where(matched[..., None], boxes, 0.5)

    if focal:
        is_class = label[..., None] == torch.arange(classes, device=label.device)
        against = torch.where(is_class, -logits, logits)  # what speaks for the wrong answer
        share = torch.where(is_class, alpha * one, (1 - alpha) * one)
        class_loss = (share * against.sigmoid() ** gamma * -F.logsigmoid(-against)).sum((1, 2, 3)) / num_boxes
    else:
        weight = torch.where(label == classes - 1, eos_coef * one, one)
        loss = -logits.log_softmax(-1).gather(-1, label[..., None])[..., 0]
        class_loss = (weight * loss).sum((1, 2)) / weight.sum((1, 2))
    box_loss = (boxes - others).abs().sum((1, 2, 3)) / num_boxes
    overlap_loss = (1 - generalized_box_iou(corners(boxes), corners(others))).sum((1, 2)) / num_boxes
    return torch.stack((class_loss, box_loss, overlap_loss), dim=-1)
