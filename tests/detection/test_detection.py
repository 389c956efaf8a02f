"""vitkernels.detection against the official formulas in plain PyTorch: matches, losses, gradients, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels.accuracy import compare_tensors
from vitkernels.detection import HungarianMatcher, PackedTargets, SetCriterion

from .. import detr

pytestmark = pytest.mark.usefixtures("poison")

COSTS, EOS = (1, 5, 2), 0.125  # in every dtype the same number
LOSSES = ["labels", "boxes", "cardinality"]


def criteria(kind: str, losses: list[str] = LOSSES) -> tuple[Any, Any]:
    """The official formulas, and ours."""
    if kind == "softmax":
        theirs = detr.SetCriterion(5, detr.HungarianMatcher(*COSTS), {}, EOS, losses)
        return theirs, SetCriterion(5, HungarianMatcher(*COSTS), {}, EOS, losses)
    theirs = detr.FocalCriterion(6, detr.HungarianMatcher(*COSTS, focal=(0.25, 2.0)), {}, losses)
    return theirs, SetCriterion(6, HungarianMatcher(*COSTS, kind="focal"), {}, 1.0, losses, kind="focal")  # type: ignore[arg-type]


def run(criterion: Any, outputs: dict[str, Any], targets: detr.Targets) -> dict[str, Tensor]:
    """Every loss, and the gradient of their weighted sum in every prediction."""
    layers = [outputs, *outputs["aux_outputs"]]
    losses = criterion(outputs, targets)
    total = sum(losses[name] * weight for name, weight in weights(losses).items())
    predictions = [layer[name] for layer in layers for name in ("pred_logits", "pred_boxes")]
    gradients = torch.autograd.grad(total, predictions)  # type: ignore[arg-type]
    return losses | {f"grad {i}": gradient for i, gradient in enumerate(gradients)}


def weights(losses: dict[str, Tensor]) -> dict[str, float]:
    """Another one for each loss."""
    trained = [name for name in losses if name.startswith("loss")]
    return {name: 1 + 0.1 * i for i, name in enumerate(sorted(trained))}


def moved(outputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in another dtype."""
    one = {name: value.detach().to(dtype).requires_grad_() for name, value in outputs.items() if name != "aux_outputs"}
    return one | {"aux_outputs": [moved(layer, dtype) for layer in outputs["aux_outputs"]]} if "aux_outputs" in outputs else one


SIZES = {"some": (3, 1), "an empty image": (0, 4), "none": (0, 0), "more than queries": (12, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_the_same_losses_and_gradients(kind: str, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs, ours = criteria(kind)
    targets, outputs = detr.targets(counts), detr.outputs(dtype=dtype)
    exact_targets = [{"labels": t["labels"], "boxes": t["boxes"].double()} for t in targets]
    exact = run(copy.deepcopy(theirs).double(), moved(outputs, torch.float64), exact_targets)
    targets = targets if dtype is torch.float32 else exact_targets
    eager, fast = run(theirs.to(dtype), outputs, targets), run(ours, outputs, targets)
    assert fast.keys() == eager.keys()
    for name, truth in exact.items():
        assert fast[name].shape == eager[name].shape, name
        if dtype is torch.float64:  # eager is the truth, and its error 0
            torch.testing.assert_close(fast[name].double(), truth.double(), rtol=1e-12, atol=1e-14, msg=name)
            continue
        comparison = compare_tensors(name, fast[name], eager[name], truth)
        assert comparison.holds, comparison


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_the_same_matches(kind: str) -> None:
    theirs, ours = criteria(kind)
    for seed in range(20):
        outputs, targets = detr.outputs(1, 3, seed=seed), detr.targets((4, 0, 11), seed=seed)
        expected, found = theirs.matcher(outputs, targets), ours.matcher(outputs, targets)
        assert len(found) == len(expected)
        for pair, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(index, other) and index.dtype is torch.int64 for index, other in zip(pair, wanted, strict=True))


def test_ties_are_scipys() -> None:
    """Queries and targets that are all alike."""
    outputs = {"pred_logits": torch.zeros(1, 6, 4), "pred_boxes": torch.full((1, 6, 4), 0.5)}
    targets = [{"labels": torch.zeros(3, dtype=torch.long), "boxes": torch.full((3, 4), 0.25)}]
    expected = detr.HungarianMatcher(*COSTS)(outputs, targets)
    for index, other in zip(HungarianMatcher(*COSTS)(outputs, targets)[0], expected[0], strict=True):
        assert torch.equal(index, other)


def test_any_matcher_serves() -> None:
    """One of somebody's own is asked layer by layer."""

    class Backwards(torch.nn.Module):
        def forward(self, outputs: dict[str, Any], targets: detr.Targets) -> list[tuple[Tensor, Tensor]]:
            assert set(outputs) == {"pred_logits", "pred_boxes"}
            return [(torch.arange(len(t["labels"])), torch.arange(len(t["labels"])).flip(0)) for t in targets]

    targets, outputs = detr.targets(), detr.outputs()
    ours = SetCriterion(5, Backwards(), {}, 0.1, LOSSES)(outputs, targets)
    theirs = detr.SetCriterion(5, Backwards(), {}, 0.1, LOSSES)
    theirs.matcher.forward = lambda outputs, targets: Backwards()({k: outputs[k] for k in ("pred_logits", "pred_boxes")}, targets)
    for name, value in theirs(outputs, targets).items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("losses", [["labels"], ["boxes"], ["cardinality"], []], ids=str)
def test_only_what_is_asked_for(losses: list[str]) -> None:
    theirs, ours = criteria("softmax", losses)
    outputs, targets = detr.outputs(), detr.targets()
    assert ours(outputs, targets).keys() == theirs(outputs, targets).keys()


def test_without_auxiliary_outputs() -> None:
    theirs, ours = criteria("softmax")
    outputs, targets = detr.outputs(), detr.targets()
    del outputs["aux_outputs"]
    assert ours(outputs, targets).keys() == theirs(outputs, targets).keys() == {
        "loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error"
    }  # fmt: skip


def test_state_copies_and_pickles() -> None:
    theirs, ours = criteria("softmax")
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["empty_weight"]
    ours.load_state_dict(theirs.state_dict())
    outputs, targets = detr.outputs(), detr.targets()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(torch.equal(value, ours(outputs, targets)[name]) for name, value in twin(outputs, targets).items())
    assert "kind='softmax'" in repr(ours) and "cost_bbox=5" in repr(ours)


def test_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has 8 targets to our 4: the box losses are divided by 6."""
    _, ours = criteria("softmax")
    outputs, targets = detr.outputs(), detr.targets()
    alone = ours(outputs, targets)
    from vitkernels.detection import criterion

    monkeypatch.setattr(criterion.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(criterion.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(criterion.dist, "all_reduce", lambda boxes: boxes.add_(8))
    together = ours(outputs, targets)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value * 4 / 6 if name.startswith(("loss_bbox", "loss_giou")) else value)


def test_diverged_predictions() -> None:
    """NaN: warned of and matched all the same, or refused."""
    outputs, targets = detr.outputs(1), detr.targets()
    with torch.no_grad():
        outputs["pred_logits"][1, 2] = torch.nan
    with pytest.warns(RuntimeWarning, match="image 1"):
        found = HungarianMatcher(*COSTS)(outputs, targets)
    assert [len(i) for i, _ in found] == [3, 1]
    with pytest.raises(ValueError, match="image 1"):
        HungarianMatcher(*COSTS, invalid="raise")(outputs, targets)


def _broken(**changes: Any) -> detr.Targets:
    targets = detr.targets((3, 2))
    targets[1] |= changes
    return targets


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a list too short": (detr.targets((3,)), ValueError, "1 images"),
    "labels out of range": (_broken(labels=torch.tensor([0, 6])), ValueError, "target 1 of image 1.* is 6"),
    "labels below": (_broken(labels=torch.tensor([-1, 0])), ValueError, "target 0 of image 1.* is -1"),
    "corners in the wrong order": (_broken(boxes=torch.tensor([[0.5, 0.5, 0.1, 0.1], [0.5, 0.5, -0.1, 0.1]])), ValueError, "target 1 of image 1"),
    "boxes and labels of other lengths": (_broken(labels=torch.tensor([0])), ValueError, "boxes of image 1 has shape"),
    "another device": (_broken(boxes=torch.zeros(2, 4, device="meta")), ValueError, "image 1 is on meta"),
    "no labels": ([{"boxes": torch.zeros(0, 4)}] * 2, KeyError, "labels"),
    "no list": (_broken()[0], TypeError, "list"),
    "nothing": ([], ValueError, "empty"),
    "labels that are floating": (_broken(labels=torch.tensor([0.0, 1.0])), TypeError, "integer"),
}


@pytest.mark.parametrize(("targets", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_targets_are_refused_by_image(targets: Any, kind: type[Exception], words: str) -> None:
    _, ours = criteria("softmax")
    for call in (ours, ours.matcher):
        with pytest.raises(kind, match=words):
            call(detr.outputs(), targets)


def test_bad_predictions() -> None:
    _, ours = criteria("softmax")
    outputs = detr.outputs()
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_boxes"][1, 3, 2] = -0.5
    with pytest.raises(ValueError, match=r"query 3 of image 1 in layer 2"):
        ours(outputs, detr.targets())
    with pytest.raises(ValueError, match="6 channels; it must have 5"):
        SetCriterion(4, HungarianMatcher(), {}, 0.1, LOSSES)(detr.outputs(), detr.targets())


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(0, 0, 0)
    with pytest.raises(ValueError, match="'masks'"):
        SetCriterion(5, HungarianMatcher(), {}, 0.1, ["labels", "masks"])
    with pytest.raises(ValueError, match="kind is 'sigmoid'"):
        SetCriterion(5, HungarianMatcher(), {}, 0.1, LOSSES, kind="sigmoid")  # type: ignore[arg-type]


def test_packed_targets() -> None:
    targets = detr.targets((2, 0, 1), labels="class_labels")
    packed = PackedTargets.pack(targets, labels="class_labels")
    assert packed.layout.sizes == (2, 0, 1)
    assert torch.equal(packed.labels[2:], targets[2]["class_labels"]) and torch.equal(packed.boxes[:2], targets[0]["boxes"])
