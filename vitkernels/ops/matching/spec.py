"""Samples, bad inputs and benchmark shapes of the matching cost and the set loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops._arrange import as_it_is, first_for_all, with_gaps
from vitkernels.ops.matching import op, reference
from vitkernels.ops.matching.assignment import linear_sum_assignment
from vitkernels.ops.matching.layout import TargetLayout
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample


def _queries_first(x: Tensor) -> Tensor:
    """[..., Q, B, C] in memory, as the sequence-first layers of the official code leave it."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def _classes_first(x: Tensor) -> Tensor:
    """[..., C, Q] in memory."""
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


_Drawn = tuple[Tensor, Tensor, Tensor, Tensor, TargetLayout]


def _draw(
    name: str,
    queries: int,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str,
    grad: bool,
    layers: int | None = 2,
    classes: int = 12,
    scale: float = 1.0,
    grid: int | None = None,
    arrange: Callable[[Tensor], Tensor] = as_it_is,
) -> _Drawn:
    """Predictions and targets of images with so many targets. ``grid``: boxes are multiples of 1 / grid, so that edges meet."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    lead = (len(sizes), queries) if layers is None else (layers, len(sizes), queries)

    def boxes(*shape: int) -> Tensor:
        if grid:
            return torch.randint(1, grid, (*shape, 4), generator=generator).double() / grid
        return 0.1 + 0.8 * torch.rand((*shape, 4), generator=generator, dtype=torch.float64)

    def leaf(tensor: Tensor) -> Tensor:
        return arrange(tensor.to(dtype)).to(device).detach().requires_grad_(grad)

    layout = TargetLayout.from_sizes(sizes, device=device)
    logits = scale * torch.randn((*lead, classes), generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (layout.total,), generator=generator).to(device)
    return leaf(logits), leaf(boxes(*lead)), labels, boxes(layout.total).to(dtype).to(device), layout


# Images with so many targets: none, more than there are queries, one.
_MIX = (3, 0, 9, 1)


def _shapes(small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What both ops are asked for: a name and the arguments of :func:`_draw`."""
    yield "4 images", {"queries": 7, "sizes": _MIX}
    yield "tiny", {"queries": 3, "sizes": (2,), "classes": 3, "layers": 1}
    yield "one layer", {"queries": 7, "sizes": _MIX, "layers": None}
    yield "queries first", {"queries": 7, "sizes": _MIX, "arrange": _queries_first}
    yield "no target", {"queries": 5, "sizes": (0, 0)}
    yield "classes first", {"queries": 7, "sizes": _MIX, "arrange": _classes_first}
    yield "strided", {"queries": 6, "sizes": (2, 3), "arrange": with_gaps}
    yield "same in all layers", {"queries": 6, "sizes": (2, 3), "layers": 3, "arrange": first_for_all}
    yield "two classes", {"queries": 17, "sizes": (1, 5), "classes": 2}
    yield "91 classes", {"queries": 20, "sizes": (4, 1), "classes": 92, "layers": 1}
    yield "large logits", {"queries": 9, "sizes": (4, 2), "scale": 30.0}
    if not small:
        yield "100 queries", {"queries": 100, "sizes": (20, 1, 130), "classes": 92, "layers": 6}
        yield "300 queries", {"queries": 300, "sizes": (50,), "classes": 365, "layers": 3}


# --- pairwise_box_cost ----------------------------------------------------------------------------------------------------------------


def _cost_sample(name: str, kind: str = "softmax", *, weights: tuple[float, float, float] = (1.0, 5.0, 2.0), **shape: Any) -> Sample:
    logits, boxes, labels, target_boxes, layout = _draw(name, **shape | {"grad": False})
    return Sample(
        f"{name} {kind}",
        (logits, boxes, labels),
        {"target_boxes": target_boxes, "layout": layout, "weights": weights, "kind": kind},
        ("target_boxes",),
    )


def _cost_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_cost_sample, dtype=dtype, device=device)
    for name, shape in _shapes(small):
        for kind in op.KINDS:
            yield make(name, kind, **shape)
    yield make("no query", queries=0, sizes=(2, 1))
    yield make("no image", queries=4, sizes=())
    yield make("class alone", queries=5, sizes=(4,), weights=(1.0, 0.0, 0.0))
    yield make("boxes alone", queries=5, sizes=(4,), weights=(0.0, 1.0, 1.0))
    yield make("edges that meet", queries=30, sizes=(10, 5), grid=4)


def _spoiled(tensor: Tensor, value: float, *place: int) -> Tensor:
    changed = tensor.detach().clone()
    changed[place] = value
    return changed


def _bad_predictions(bad: Callable[..., BadInput], given: dict[str, Any]) -> Iterator[BadInput]:
    """What both ops refuse."""
    logits, boxes, labels, target_boxes = (given[name] for name in ("logits", "boxes", "target_labels", "target_boxes"))
    yield bad("logits are a list", TypeError, ("logits is a list", "[L, B, Q, C]"), logits=[1.0])
    yield bad("logits of one image", ValueError, ("logits has shape [5, 4]", "[B, Q, C]"), logits=logits[0, 0])
    yield bad("integer logits", TypeError, ("logits has dtype torch.int64", "floating"), logits=logits.long())
    yield bad("sparse boxes", TypeError, ("boxes has layout torch.sparse_coo", "dense"), boxes=boxes.to_sparse())
    yield bad("no class", ValueError, ("logits has shape [2, 3, 5, 0]", "at least one class"), logits=logits[..., :0])
    yield bad("boxes of five numbers", ValueError, ("boxes has shape [2, 3, 5, 5]", "[2, 3, 5, 4]"), boxes=torch.ones(2, 3, 5, 5))
    yield bad("boxes of other queries", ValueError, ("boxes has shape [2, 3, 4, 4]", "[2, 3, 5, 4]"), boxes=boxes[:, :, :4])
    yield bad("boxes of another dtype", TypeError, ("boxes has dtype torch.float64", "torch.float32"), boxes=boxes.double())
    yield bad("boxes on another device", ValueError, ("boxes is on meta", "cpu"), boxes=boxes.to("meta"))
    yield bad("x1 < x0", ValueError, ("query 3 of image 2 in layer 1", "width -0.5"), boxes=_spoiled(boxes, -0.5, 1, 2, 3, 2))
    yield bad("labels are a list", TypeError, ("target_labels is a list", "[T]"), target_labels=[1])
    yield bad("floating labels", TypeError, ("target_labels has dtype torch.float32", "integer"), target_labels=labels.float())
    yield bad("a mask for labels", TypeError, ("target_labels has dtype torch.bool", "integer"), target_labels=labels > 0)
    yield bad("labels of two dimensions", ValueError, ("target_labels has shape [4, 1]", "[T]"), target_labels=labels[:, None])
    yield bad("labels on another device", ValueError, ("target_labels is on meta", "cpu"), target_labels=labels.to("meta"))
    yield bad("a label too large", ValueError, ("target_labels[3]", "is 4", "[0, 4)"), target_labels=_spoiled(labels, 4, 3))
    yield bad("a negative label", ValueError, ("target_labels[0]", "is -1", "[0, 4)"), target_labels=_spoiled(labels, -1, 0))
    yield bad("target boxes of other number", ValueError, ("target_boxes has shape [3, 4]", "[4, 4]"), target_boxes=target_boxes[:3])
    yield bad("integer target boxes", TypeError, ("target_boxes has dtype torch.int64", "floating"), target_boxes=target_boxes.long())
    yield bad("target boxes on another device", ValueError, ("target_boxes is on meta", "cpu"), target_boxes=target_boxes.to("meta"))
    yield bad("y1 < y0", ValueError, ("target_boxes[2]", "height -1"), target_boxes=_spoiled(target_boxes, -1, 2, 3))
    yield bad("targets that learn", ValueError, ("target_boxes requires a gradient", "detach"), target_boxes=target_boxes.clone().requires_grad_())
    yield bad("unknown kind", ValueError, ("kind is 'hinge'", "'softmax'", "'focal'"), kind="hinge")


def _given() -> tuple[dict[str, Any], TargetLayout]:
    logits, boxes, labels, target_boxes, layout = _draw("bad", 5, (3, 0, 1), classes=4, dtype=torch.float32, device="cpu", grad=False)
    return {"logits": logits, "boxes": boxes, "target_labels": labels, "target_boxes": target_boxes}, layout


def _cost_bad_inputs() -> Iterator[BadInput]:
    given, layout = _given()
    given["layout"] = layout

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], **changed: Any) -> BadInput:
        return BadInput.of(name, exception, words, **given | changed)

    yield from _bad_predictions(bad, given)
    labels = given["target_labels"]
    yield bad("a label of the last image", ValueError, ("target 0 of image 2", "[0, 4)"), target_labels=_spoiled(labels, 9, 3))
    yield bad("a list for a layout", TypeError, ("layout is a list", "TargetLayout"), layout=[3, 0, 1])
    yield bad("layout of other images", ValueError, ("layout is of 2 images", "3"), layout=TargetLayout.from_sizes((3, 1)))
    yield bad("layout of other targets", ValueError, ("target_labels has shape [4]", "[5]"), layout=TargetLayout.from_sizes((3, 1, 1)))
    yield bad("layout on another device", ValueError, ("layout is on meta", "cpu"), layout=layout.to("meta"))
    yield bad("two weights", ValueError, ("weights has 2 numbers", "3"), weights=(1.0, 5.0))


def _every_pair(
    logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, layout: TargetLayout, weights: tuple[float, ...], kind: str
) -> Tensor:
    """As DETR's matcher has it: layer by layer every query against every image's targets, of which each image's own are then cut out."""
    found = []
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        p = layer_logits.flatten(0, 1).softmax(-1) if kind == "softmax" else layer_logits.flatten(0, 1).sigmoid()
        class_cost = -p[:, target_labels]
        if kind == "focal":
            against, for_it = 0.75 * p**2 * -(1 - p + 1e-8).log(), 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
            class_cost = for_it[:, target_labels] - against[:, target_labels]
        rows = layer_boxes.flatten(0, 1)
        overlap = reference.generalized_box_iou(reference.corners(rows)[:, None], reference.corners(target_boxes))
        cost = weights[0] * class_cost + weights[1] * torch.cdist(rows, target_boxes, p=1) - weights[2] * overlap
        blocks = cost.view(*layer_boxes.shape[:2], -1).split(layout.sizes, dim=-1)
        found.append(torch.cat([block[image].t() for image, block in enumerate(blocks)]))
    return torch.stack(found)


def _cost_case(name: str, layers: int, queries: int, sizes: Sequence[int], classes: int, kind: str = "softmax") -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        return _cost_sample("bench", kind, queries=queries, sizes=sizes, classes=classes, layers=layers, dtype=dtype, device=device)

    moved = layers * queries * (len(sizes) * (classes + 4) + sum(sizes))
    return BenchCase(name=name, make=make, flops=0, elements_moved=moved)


# --- detection_set_loss ---------------------------------------------------------------------------------------------------------------


def _loss_sample(name: str, kind: str = "softmax", *, options: dict[str, float] | None = None, **shape: Any) -> Sample:
    logits, boxes, labels, target_boxes, layout = _draw(name, **shape)
    # Any assignment will do: the distance of the boxes in float64, so that every dtype and device gets the same one.
    predicted, wanted = boxes.detach().cpu().double(), target_boxes.cpu().double()
    per_image = [torch.cdist(t, p) for t, p in zip(wanted.split(layout.sizes), predicted.movedim(-3, 0), strict=True)]
    if per_image:
        matches = linear_sum_assignment(torch.cat(per_image, dim=-2), TargetLayout.from_sizes(layout.sizes)).to(logits.device)
    else:
        matches = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    kwargs = {"target_boxes": target_boxes, "matches": matches, "num_boxes": float(max(layout.total, 1)), "kind": kind, **(options or {})}
    return Sample(f"{name} {kind}", (logits, boxes, labels), kwargs, buffers=("target_boxes",))


def _loss_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_loss_sample, dtype=dtype, device=device, grad=grad)
    for name, shape in _shapes(small):
        for kind in op.KINDS:
            yield make(name, kind, **shape)
    yield make("no query", "focal", queries=0, sizes=(2, 1))
    yield make("no image", "focal", queries=4, sizes=())
    yield make("no object counts as much", queries=6, sizes=(2, 3), options={"eos_coef": 1.0})
    yield make("no object counts nothing", queries=6, sizes=(2, 3), options={"eos_coef": 0.0})
    yield make("another alpha and gamma", "focal", queries=6, sizes=(2, 3), options={"alpha": 0.6, "gamma": 1.5})
    if dtype is not torch.float64:  # in which gradients are differenced: a tie has none
        yield make("edges that meet", queries=30, sizes=(10, 5), grid=4)
        yield make("all boxes equal", queries=6, sizes=(2, 3), grid=2)


def _loss_bad_inputs() -> Iterator[BadInput]:
    given, _ = _given()
    matches = torch.full(given["logits"].shape[:-1], -1)
    given |= {"matches": matches, "num_boxes": 4.0}

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], **changed: Any) -> BadInput:
        return BadInput.of(name, exception, words, **given | changed)

    yield from _bad_predictions(bad, given)
    yield bad("matches are a list", TypeError, ("matches is a list", "[L, B, Q]"), matches=[-1])
    yield bad("int32 matches", TypeError, ("matches has dtype torch.int32", "torch.int64"), matches=matches.int())
    yield bad("matches of one layer", ValueError, ("matches has shape [3, 5]", "[2, 3, 5]"), matches=matches[0])
    yield bad("matches on another device", ValueError, ("matches is on meta", "cpu"), matches=matches.to("meta"))
    yield bad("a target that does not exist", ValueError, ("matches holds 4", "4 targets"), matches=_spoiled(matches, 4, 0, 0, 0))
    yield bad("a match below -1", ValueError, ("matches holds -2", "-1 or one of"), matches=_spoiled(matches, -2, 0, 0, 0))
    yield bad("two numbers of boxes", ValueError, ("num_boxes has shape [2]", "a number"), num_boxes=torch.ones(2))
    yield bad("num_boxes on another device", ValueError, ("num_boxes is on meta", "cpu"), num_boxes=torch.ones((), device="meta"))


def _loss_saved(sample: Sample) -> int:
    """The matches and labels, the target boxes in the accumulation dtype, the number of boxes and a divisor for each layer."""
    logits, target_boxes = sample.args[0], sample.kwargs["target_boxes"]
    queries, wide = logits.shape[:-1].numel(), 8 if logits.dtype is torch.float64 else 4
    return 8 * queries + target_boxes.shape[0] * (8 + 4 * wide) + wide + logits.shape[:-3].numel() * wide


def _layer_by_layer(
    logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, matches: Tensor, num_boxes: float, kind: str
) -> Tensor:
    """As DETR's criterion has it: for each layer the matched pairs are gathered, and GIoU is the diagonal of a matrix of all of them."""
    classes, found = logits.shape[-1], []
    weight = torch.ones(classes, dtype=logits.dtype, device=logits.device)
    weight[-1] = 0.1
    for layer_logits, layer_boxes, match in zip(logits, boxes, matches, strict=True):
        matched = match >= 0
        target = torch.full_like(match, classes if kind == "focal" else classes - 1)
        target[matched] = target_labels[match[matched]]
        if kind == "focal":
            one_hot = F.one_hot(target, classes + 1)[..., :-1].to(logits.dtype)
            p = layer_logits.sigmoid()
            loss = F.binary_cross_entropy_with_logits(layer_logits, one_hot, reduction="none")
            loss = loss * (1 - (p * one_hot + (1 - p) * (1 - one_hot))) ** 2 * (0.25 * one_hot + 0.75 * (1 - one_hot))
            class_loss = loss.sum() / num_boxes
        else:
            class_loss = F.cross_entropy(layer_logits.transpose(1, 2), target, weight)
        box, other = layer_boxes[matched], target_boxes[match[matched]]
        overlap = reference.generalized_box_iou(reference.corners(box)[:, None], reference.corners(other)).diag()
        found.append(torch.stack((class_loss, F.l1_loss(box, other, reduction="sum") / num_boxes, (1 - overlap).sum() / num_boxes)))
    return torch.stack(found)


def _loss_case(name: str, layers: int, queries: int, sizes: Sequence[int], classes: int, kind: str = "softmax") -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        return _loss_sample("bench", kind, queries=queries, sizes=sizes, classes=classes, layers=layers, dtype=dtype, device=device, grad=False)

    moved = layers * queries * len(sizes) * (classes + 4)
    return BenchCase(name=name, make=make, flops=0, elements_moved=moved)


_TWENTY = (17, 24, 20, 22, 14, 21, 19, 26, 18, 23, 16, 20, 25, 15, 19, 21)  # targets of 16 images, twenty on average

SPECS = (
    OpSpec(
        name="pairwise_box_cost",
        family="matching",
        function=op.pairwise_box_cost,
        reference=backends.backend("reference")(op.pairwise_box_cost),
        summary="matching cost of each image's queries and targets, all decoder layers at once (DETR, arXiv 2005.12872)",
        samples=_cost_samples,
        bad_inputs=_cost_bad_inputs,
        bench_cases=(
            _cost_case("B2 Q100 T~20", 1, 100, _TWENTY[:2], 92),
            _cost_case("B16 Q100 T~20", 1, 100, _TWENTY, 92),
            _cost_case("6 layers B16 Q100 T~20", 6, 100, _TWENTY, 92),
            _cost_case("focal 6 layers B4 Q300 T~20", 6, 300, _TWENTY[:4], 80, "focal"),
        ),
        saved_bytes=lambda sample: 0,
        peers={"every pair": _every_pair},
        otherwise=("every pair",),
        differentiable=False,
        wide=True,
    ),
    OpSpec(
        name="detection_set_loss",
        family="matching",
        function=op.detection_set_loss,
        reference=backends.backend("reference")(op.detection_set_loss),
        summary="class, L1 and GIoU loss of matched predictions, all decoder layers at once (DETR, arXiv 2005.12872)",
        samples=_loss_samples,
        bad_inputs=_loss_bad_inputs,
        bench_cases=(
            _loss_case("6 layers B2 Q100 T~20", 6, 100, _TWENTY[:2], 92),
            _loss_case("6 layers B16 Q100 T~20", 6, 100, _TWENTY, 92),
            _loss_case("focal 6 layers B4 Q300 T~20", 6, 300, _TWENTY[:4], 80, "focal"),
        ),
        saved_bytes=_loss_saved,
        peers={"layer by layer": _layer_by_layer},
        otherwise=("layer by layer",),
        wide=True,
    ),
)
