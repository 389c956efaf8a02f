"""Matching cost and set loss of detection transformers (DETR, arXiv 2005.12872): checks, choice of backend, and the ops.

Reads top to bottom: the cost, the loss, their checks, then the torch.library ops behind them. The assignment between the two runs on the host and is
in assignment.py. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.matching import reference
from vitkernels.ops.matching.layout import TargetLayout
from vitkernels.ops.packed.layout import can_read

backends.declare("pairwise_box_cost", backends.Support())
backends.declare("detection_set_loss", backends.Support())

Kind = Literal["softmax", "focal"]
KINDS = ("softmax", "focal")


def pairwise_box_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    layout: TargetLayout,
    weights: tuple[float, float, float] = (1.0, 5.0, 2.0),
    *,
    kind: Kind = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """What matching a query with a target costs, for the pairs within an image alone, all decoder layers in one pass.

    The cost is ``weights[0] class + weights[1] |box - target|_1 - weights[2] GIoU(box, target)``. The class cost is ``-softmax(logits)[label]``
    (``"softmax"``, DETR), or with p = sigmoid(logits)[label] and e = 1e-8 (``"focal"``, as in Deformable, Conditional, RT- and RF-DETR)
    ``(1 - alpha) p^gamma log(1 - p + e) - alpha (1 - p)^gamma log(p + e)``.

    Args:
        logits: [L, B, Q, C] of all decoder layers, or [B, Q, C] of one. Any strides.
        boxes: [L, B, Q, 4] or [B, Q, 4], (centre x, centre y, width, height). Any strides.
        target_labels: [T] integers in [0, C): the labels of all targets of the batch, one image after the other.
        target_boxes: [T, 4], as ``boxes``, of any floating dtype.
        layout: which targets belong to which image.
        weights: of the class, the L1 and the GIoU cost.
        kind: the class cost.
        alpha: of the focal class cost, the weight of an example of the class.
        gamma: its exponent.

    logits and boxes share one dtype (float32, bfloat16, float16, on the CPU also float64). All arithmetic is in float32 (float64 for float64), under
    autocast too, whatever it casts to: costs that are rounded to bfloat16 are mostly ties.

    Returns:
        [L, T, Q] or [T, Q], contiguous, float32 (float64 for float64): a row for each target, with the costs of its own image's queries. The rows of
        image b, transposed, are the cost matrix of DETR's matcher. Never differentiable: matching is not, and the arguments are detached.

    On the CPU labels and boxes are looked at. On a GPU that would wait for it, and a label that is outside of [0, C) makes its target's row NaN
    (on the reference a device-side assert), which :func:`linear_sum_assignment` then reports.

    Raises:
        ValueError: a wrong shape, another number of images or targets than the layout's, a mix of devices, a label outside of [0, C), a box of
            negative width or height. The message names the image.
        TypeError: a wrong or mixed dtype, something that is no tensor or no layout.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: DETR, arXiv 2005.12872, section 3.1, equation 1; GIoU, arXiv 1902.09630; the focal cost: Deformable DETR, arXiv 2010.04159, appendix A.4.
    """
    op = "pairwise_box_cost"
    logits, boxes = _checked_predictions(op, logits.detach() if isinstance(logits, Tensor) else logits, boxes, kind)
    boxes = boxes.detach()
    if not isinstance(layout, TargetLayout):
        raise TypeError(f"{op}: layout is a {type(layout).__name__}; it must be a TargetLayout (TargetLayout.from_sizes makes one)")
    target_labels, target_boxes = _checked_targets(op, target_labels, target_boxes, logits, layout)
    if len(weights) != 3:
        raise ValueError(f"{op}: weights has {len(weights)} numbers; it must have 3, of the class, the L1 and the GIoU cost")
    several = logits.dim() == 4
    if not several:
        logits, boxes = logits[None], boxes[None]
    arguments = logits, boxes, target_labels, target_boxes, layout.cu_targets

    def look() -> None:
        _look_at_boxes(op, boxes, several)
        _look_at_targets(op, target_labels, target_boxes, logits, layout)

    chosen = backends.select(op, logits)
    if chosen == "reference":
        look()
        costs = reference.pairwise_box_cost(*arguments, weights, kind == "focal", alpha, gamma)
    else:
        costs = _run(op, chosen, look, False, *arguments, list(map(float, weights)), kind == "focal", alpha, gamma)
    return costs if several else costs[0]


def detection_set_loss(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    matches: Tensor,
    num_boxes: Tensor | float,
    *,
    kind: Kind = "softmax",
    eos_coef: float = 0.1,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Class, L1 and GIoU loss of all decoder layers in one pass, each box against the one target that it is matched with.

    For each layer: the class loss; ``sum |box - target|_1 / num_boxes``; ``sum (1 - GIoU(box, target)) / num_boxes``, summed over the matched
    queries. The class loss is the cross-entropy with weight 1 for a class and ``eos_coef`` for the last, no object, divided by the sum of the weights
    (``"softmax"``, as ``F.cross_entropy`` of DETR); or the sigmoid focal loss summed over all queries and classes, by ``num_boxes`` (``"focal"``; all
    of logits are classes, a query without a target is an example against each).

    Args:
        logits: [L, B, Q, C] of all decoder layers, or [B, Q, C] of one. Any strides.
        boxes: [L, B, Q, 4] or [B, Q, 4], (centre x, centre y, width, height). Any strides.
        target_labels: [T] integers in [0, C): the labels of all targets of the batch, one image after the other.
        target_boxes: [T, 4], as ``boxes``, of any floating dtype.
        matches: [L, B, Q] or [B, Q] int64, as :func:`linear_sum_assignment` gives them: the target of each query, counted over the batch, or -1.
            Several queries may share a target, as in the groups of Group DETR.
        num_boxes: what the box losses are divided by, a number or a tensor [] or [1]; the number of targets, at least 1, averaged over processes.
        kind: the class loss.
        eos_coef: weight of no object, for ``"softmax"``.
        alpha: of the focal loss, the weight of an example of the class.
        gamma: its exponent.

    logits and boxes share one dtype (float32, bfloat16, float16, on the CPU also float64). All arithmetic is in float32 (float64 for float64), under
    autocast too, as that of PyTorch's own losses.

    Returns:
        [L, 3] or [3], float32 (float64 for float64): class, L1 and GIoU loss. Differentiable once, in logits and boxes. Gradients at ties are
        those of the same formulas in PyTorch: 0 for equal coordinates in L1, a half for each of two equal edges in GIoU. Saved for backward: the
        arguments, and one number for each layer. No host sync. Sums are in a fixed order: equal bit for bit from run to run,
        whatever the number of threads.

    On the CPU labels, boxes and matches are looked at. On a GPU that would wait for it, and a label outside of [0, C) makes the loss NaN (on the
    reference a device-side assert).

    Raises:
        ValueError: a wrong shape, a mix of devices, a label outside of [0, C), a box of negative width or height, a match with a target that does not
            exist, targets that require a gradient.
        TypeError: a wrong or mixed dtype, something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: DETR, arXiv 2005.12872, section 3.1, equation 2 and appendix A.2; the focal loss: arXiv 1708.02002, equation 5.
    """
    op = "detection_set_loss"
    logits, boxes = _checked_predictions(op, logits, boxes, kind)
    target_labels, target_boxes = _checked_targets(op, target_labels, target_boxes, logits, None)
    _check.is_tensor(op, "matches", matches, "[L, B, Q] or [B, Q]")
    if matches.dtype is not torch.int64:
        raise TypeError(f"{op}: matches has dtype {matches.dtype}; it must be torch.int64")
    _check.has_shape(op, "matches", matches, logits.shape[:-1], "[L, B, Q]" if logits.dim() == 4 else "[B, Q]")
    _on_device_of(op, "matches", matches, logits)
    wide = _define.accumulation_dtype(logits.dtype)
    if isinstance(num_boxes, Tensor):
        if num_boxes.numel() != 1:
            raise ValueError(f"{op}: num_boxes has shape {_check.shape_of(num_boxes)}; it must be a number, [] or [1]")
        _on_device_of(op, "num_boxes", num_boxes, logits)
        _not_differentiated(op, "num_boxes", num_boxes)
        num_boxes = num_boxes.reshape(()).to(wide)
    else:
        num_boxes = torch.full((), float(num_boxes), dtype=wide, device=logits.device)
    several = logits.dim() == 4
    if not several:
        logits, boxes, matches = logits[None], boxes[None], matches[None]
    arguments = logits, boxes, target_labels, target_boxes, matches.contiguous(), num_boxes, eos_coef, kind == "focal", alpha, gamma

    def look() -> None:
        _look_at_boxes(op, boxes, several)
        _look_at_targets(op, target_labels, target_boxes, logits, None)
        _look_at_matches(op, matches, target_labels.shape[0])

    chosen = backends.select(op, logits)
    if chosen == "reference":
        look()
        losses = reference.detection_set_loss(*arguments)
    else:
        losses, _ = _run(op, chosen, look, _define.differentiable(logits, boxes), *arguments)
    return losses if several else losses[0]


def generalized_box_iou_loss(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """1 - GIoU of each box and its own target: n numbers for n pairs, not the diagonal of an n x n matrix. Plain PyTorch, not a kernel.

    For a loss of one's own making; inside :func:`detection_set_loss` it is part of the one pass.

    Args:
        boxes: [..., 4], (centre x, centre y, width, height).
        target_boxes: the same shape, dtype and device.

    Returns:
        [...], in the dtype of the boxes; differentiable any number of times in both.

    Raises:
        ValueError: shapes that differ or do not end in 4, a mix of devices, on the CPU also a negative width or height.
        TypeError: something that is no tensor, a wrong or mixed dtype.

    Paper: GIoU, arXiv 1902.09630, algorithm 2.
    """
    op = "generalized_box_iou_loss"
    for name, tensor in (("boxes", boxes), ("target_boxes", target_boxes)):
        _check.is_tensor(op, name, tensor, "[..., 4]")
        _check.floating(op, name, tensor)
        if tensor.dim() == 0 or tensor.shape[-1] != 4:
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be [..., 4]")
        if _on_cpu(tensor) and (where := _negative(tensor)) is not None:
            place = f"{name}{where}" if where else name
            raise ValueError(f"{op}: {place} has {_size_of(tensor[tuple(where)])}; width and height must not be negative")
    _check.has_shape(op, "target_boxes", target_boxes, boxes.shape, "the shape of boxes")
    _check.same_kind(op, "target_boxes", target_boxes, "boxes", boxes)
    return 1 - reference.generalized_box_iou(reference.corners(boxes), reference.corners(target_boxes))


def _run(op: str, chosen: str, look: Callable[[], None], needs_autograd: bool, *arguments: Any) -> Any:
    """Call a kernel. The native ones look at values themselves, which Python takes longer for than they for all the rest; if they find something,
    ``look`` says where.
    """
    namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
    kernel = getattr(namespace, op).default
    if chosen != "native":
        look()
        return _define.call(kernel, needs_autograd, *arguments)
    try:
        return _define.call(kernel, needs_autograd, *arguments)
    except RuntimeError:
        look()
        raise


# --- checks ---------------------------------------------------------------------------------------------------------------------------


def _on_device_of(op: str, name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {logits.device}, the device of logits")


def _not_differentiated(op: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient; it must not, targets are not differentiated ({name}.detach() is accepted)")


def _checked_predictions(op: str, logits: Tensor, boxes: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Both in one dtype; autocast leaves a mixture behind, which meets in float32."""
    for name, tensor, symbols in (("logits", logits, "[L, B, Q, C] or [B, Q, C]"), ("boxes", boxes, "[L, B, Q, 4] or [B, Q, 4]")):
        _check.is_tensor(op, name, tensor, symbols)
        _check.strided(op, name, tensor)
        _check.floating(op, name, tensor)
        if tensor.dim() not in (3, 4):
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be {symbols}")
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits has shape {_check.shape_of(logits)}; it must have at least one class")
    _check.has_shape(op, "boxes", boxes, (*logits.shape[:-1], 4), "[L, B, Q, 4]" if logits.dim() == 4 else "[B, Q, 4]")
    if logits.dtype is not boxes.dtype and _define.autocast_of(logits) is not None:
        logits, boxes = (_define.cast(t, torch.float32) for t in (logits, boxes))
    _check.same_kind(op, "boxes", boxes, "logits", logits)
    return logits, boxes


def _checked_targets(op: str, labels: Tensor, boxes: Tensor, logits: Tensor, layout: TargetLayout | None) -> tuple[Tensor, Tensor]:
    """The targets as the kernels take them: int64, and the accumulation dtype, contiguous."""
    _check.is_tensor(op, "target_labels", labels, "[T]")
    _check.is_tensor(op, "target_boxes", boxes, "[T, 4]")
    for name, tensor in (("target_labels", labels), ("target_boxes", boxes)):
        _check.strided(op, name, tensor)
        _on_device_of(op, name, tensor, logits)
        _not_differentiated(op, name, tensor)
    _check.floating(op, "target_boxes", boxes)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TypeError(f"{op}: target_labels has dtype {labels.dtype}; it must be an integer dtype")
    if labels.dim() != 1:
        raise ValueError(f"{op}: target_labels has shape {_check.shape_of(labels)}; it must be [T]")
    _check.has_shape(op, "target_boxes", boxes, (labels.shape[0], 4), "[T, 4]")
    if layout is not None:
        _on_device_of(op, "layout", layout.cu_targets, logits)
        if layout.cu_targets.shape[0] != logits.shape[-3] + 1:
            raise ValueError(f"{op}: the layout is of {layout.images} images; it must be of {logits.shape[-3]}, the images of logits")
        if not torch.compiler.is_compiling() and layout.total != labels.shape[0]:
            raise ValueError(f"{op}: target_labels has shape {_check.shape_of(labels)}; it must be [T] = [{layout.total}], the targets of the layout")
    return labels.to(torch.int64).contiguous(), boxes.to(_define.accumulation_dtype(logits.dtype)).contiguous()


def _on_cpu(tensor: Tensor) -> bool:
    """Whether values are looked at: on the CPU, where they are numbers."""
    return tensor.device.type == "cpu" and can_read(tensor)


def _look_at_boxes(op: str, boxes: Tensor, several: bool) -> None:
    if _on_cpu(boxes) and (where := _negative(boxes)) is not None:
        layer, image, query = where
        place = f"query {query} of image {image}" + (f" in layer {layer}" if several else "")
        raise ValueError(f"{op}: boxes holds {_size_of(boxes[tuple(where)])} for {place}; width and height must not be negative")


def _look_at_targets(op: str, labels: Tensor, boxes: Tensor, logits: Tensor, layout: TargetLayout | None) -> None:
    if not _on_cpu(labels):
        return
    classes = logits.shape[-1]
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(f"{op}: target_labels[{at}]{_image(layout, at)} is {int(labels[at])}; it must be in [0, {classes}), a class of logits")
    if (where := _negative(boxes)) is not None:
        at = where[0]
        raise ValueError(f"{op}: target_boxes[{at}]{_image(layout, at)} has {_size_of(boxes[at])}; width and height must not be negative")


def _look_at_matches(op: str, matches: Tensor, targets: int) -> None:
    if not _on_cpu(matches):
        return
    outside = matches[(matches < -1) | (matches >= targets)]
    if outside.numel():
        raise ValueError(f"{op}: matches holds {int(outside[0])}; it must hold -1 or one of the {targets} targets, counted from 0")


def _negative(boxes: Tensor) -> list[int] | None:
    """The place of the first box with a negative side, whose corners would be in the wrong order. NaN is none."""
    negative = boxes.detach()[..., 2:] < 0
    return [int(i) for i in negative.nonzero()[0, :-1]] if negative.any() else None


def _size_of(box: Tensor) -> str:
    return f"a box of width {float(box[2]):g} and height {float(box[3]):g}"


def _image(layout: TargetLayout | None, target: int) -> str:
    return "" if layout is None else f" (target {target - layout.offsets[layout.image_of(target)]} of image {layout.image_of(target)})"


# --- vitkernels::pairwise_box_cost ----------------------------------------------------------------------------------------------------


def _cost_fake(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    cu_targets: Tensor,
    weights: list[float],
    focal: bool,
    alpha: float,
    gamma: float,
) -> Tensor:
    torch._check(logits.dim() == 4 and boxes.dim() == 4, lambda: "logits and boxes must be 4-dimensional")
    shape = (logits.shape[0], target_labels.shape[0], logits.shape[2])
    return logits.new_empty(shape, dtype=_define.accumulation_dtype(logits.dtype))


_define.define_without_gradient(
    "pairwise_box_cost",
    schema=(
        "(Tensor logits, Tensor boxes, Tensor target_labels, Tensor target_boxes, Tensor cu_targets, float[] weights, bool focal, float alpha,"
        " float gamma) -> Tensor"
    ),
    fake=_cost_fake,
)


# --- vitkernels::detection_set_loss ---------------------------------------------------------------------------------------------------


def _loss_fake(
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
) -> tuple[Tensor, Tensor]:
    torch._check(logits.dim() == 4 and boxes.dim() == 4 and matches.dim() == 3, lambda: "logits and boxes must be 4-, matches 3-dimensional")
    wide = _define.accumulation_dtype(logits.dtype)
    return logits.new_empty((logits.shape[0], 3), dtype=wide), logits.new_empty((logits.shape[0],), dtype=wide)


def _loss_backward_fake(grad_losses: Tensor, logits: Tensor, boxes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), boxes.new_empty(boxes.shape)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eos_coef, ctx.focal, ctx.alpha, ctx.gamma = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _loss_backward(op: Any, ctx: Any, grad_losses: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logits, grad_boxes = op(grad_losses, *ctx.saved_tensors, ctx.eos_coef, ctx.focal, ctx.alpha, ctx.gamma)
    need_logits, need_boxes = ctx.needs_input_grad[:2]
    return grad_logits if need_logits else None, grad_boxes if need_boxes else None, *(None,) * 8


_define.define(
    "detection_set_loss",
    schema=(
        "(Tensor logits, Tensor boxes, Tensor target_labels, Tensor target_boxes, Tensor matches, Tensor num_boxes, float eos_coef, bool focal,"
        " float alpha, float gamma) -> (Tensor losses, Tensor divisors)"
    ),
    backward_schema=(
        "(Tensor grad_losses, Tensor logits, Tensor boxes, Tensor target_labels, Tensor target_boxes, Tensor matches, Tensor num_boxes,"
        " Tensor divisors, float eos_coef, bool focal, float alpha, float gamma) -> (Tensor grad_logits, Tensor grad_boxes)"
    ),
    fake=_loss_fake,
    backward_fake=_loss_backward_fake,
    setup_context=_loss_setup,
    backward=_loss_backward,
    cast_by_autocast=(),
)

_define.implement_in_triton("matching", "detection_set_loss", without_gradient=("pairwise_box_cost",))
