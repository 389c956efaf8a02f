"""Matching and set loss in models: transformers' detectors and the authors' classes, original against accelerated."""

from __future__ import annotations

import copy
import importlib
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.accuracy import compare_tensors
from vitkernels.detection import HungarianMatcher

from .. import detr, zoo
from ..zoo import reasons

pytestmark = pytest.mark.usefixtures("poison")

FOCAL = ("ConditionalDetr", "DeformableDetr")
LOSSES = ["labels", "boxes", "cardinality"]


def detector(family: str, **options: Any) -> Any:
    return detr.yolos(**options) if family == "Yolos" else detr.transformers_model(family, **options)


def labels(counts: tuple[int, ...] = (3, 1), **options: Any) -> detr.Targets:
    return detr.targets(counts, labels="class_labels", **options)


def predictions(classes: int, dtype: torch.dtype, layers: int = 3) -> tuple[Tensor, ...]:
    """Logits and boxes of the last layer, and of all layers."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(layers + 1, 2, 9, classes, generator=generator)
    boxes = torch.rand(layers + 1, 2, 9, 4, generator=generator) * 0.4 + 0.1
    return tuple(t.to(dtype).requires_grad_() for t in (logits[0], boxes[0], logits[1:], boxes[1:]))


def run(loss: Any, config: Any, given: tuple[Tensor, ...], targets: detr.Targets) -> dict[str, Tensor]:
    """The loss, its parts and its gradients."""
    logits, boxes, outputs_class, outputs_coord = given
    total, parts, auxiliary = loss(logits, targets, torch.device("cpu"), boxes, config, outputs_class, outputs_coord)
    assert (auxiliary is not None) == config.auxiliary_loss
    for i, layer in enumerate(auxiliary or ()):
        assert torch.equal(layer["logits"], outputs_class[i]) and torch.equal(layer["pred_boxes"], outputs_coord[i])
    wanted = given if config.auxiliary_loss else given[:2]
    gradients = torch.autograd.grad(total, wanted)
    return {"loss": total} | parts | {f"grad {i}": gradient for i, gradient in enumerate(gradients)}


def exactly(family: str, config: Any, given: tuple[Tensor, ...], targets: detr.Targets) -> dict[str, Tensor]:
    """The official formulas in float64."""
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    if family in FOCAL:
        criterion: Any = detr.FocalCriterion(
            config.num_labels, detr.HungarianMatcher(*costs, focal=(0.25, 2.0)), {}, LOSSES, focal_alpha=config.focal_alpha
        )
    else:
        criterion = detr.SetCriterion(config.num_labels, detr.HungarianMatcher(*costs), {}, config.eos_coefficient, LOSSES)

    def loss(logits: Tensor, targets: Any, _: Any, boxes: Tensor, config: Any, outputs_class: Tensor, outputs_coord: Tensor) -> Any:
        auxiliary = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(outputs_class[:-1], outputs_coord[:-1], strict=True)]
        auxiliary = auxiliary if config.auxiliary_loss else []
        parts = criterion.double()({"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": auxiliary}, targets)
        del parts["class_error"]
        weights = {"ce": 1, "bbox": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
        total = sum(value * weights[name.split("_")[1]] for name, value in parts.items() if name.startswith("loss"))
        named = [{"logits": layer["pred_logits"], "pred_boxes": layer["pred_boxes"]} for layer in auxiliary]
        return total, parts, named if config.auxiliary_loss else None

    exact = [{"labels": target["class_labels"], "boxes": target["boxes"].double()} for target in targets]
    return run(loss, config, given, exact)


CASES = [
    pytest.param("Detr", {}, (3, 1), id="Detr"),
    pytest.param("Detr", {"auxiliary_loss": False}, (3, 1), id="Detr, last layer"),
    pytest.param("Detr", {"eos_coefficient": 0.3, "giou_loss_coefficient": 3}, (0, 2), id="Detr, an empty image"),
    pytest.param("Detr", {"class_cost": 2}, (0, 0), id="Detr, no targets"),
    pytest.param("TableTransformer", {}, (12, 1), id="TableTransformer, more than queries"),
    pytest.param("Yolos", {}, (3, 1), id="Yolos"),
    pytest.param("ConditionalDetr", {}, (3, 1), id="ConditionalDetr"),
    pytest.param("DeformableDetr", {"focal_alpha": 0.4}, (3, 0), id="DeformableDetr"),
]


@pytest.mark.parametrize(("family", "options", "counts"), CASES)
def test_the_same_loss(family: str, options: dict[str, Any], counts: tuple[int, ...]) -> None:
    model = detector(family, **options)
    original, config = model.loss_function, model.config
    given = predictions(config.num_labels + (family not in FOCAL), torch.float32)
    eager = run(original, config, given, labels(counts))
    handle = vitkernels.accelerate(model, only="detection_set_loss")
    assert [(r.path, r.op) for r in handle.replaced] == [("", "detection_set_loss")]
    fast = run(model.loss_function, config, given, labels(counts))
    exact = exactly(family, config, tuple(t.detach().double().requires_grad_() for t in given), labels(counts))
    assert fast.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        assert fast[name].dtype is eager[name].dtype and fast[name].shape == eager[name].shape, name
        comparison = compare_tensors(name, fast[name], eager[name], truth)
        assert comparison.holds, comparison
    assert not handle.fallbacks


@pytest.mark.parametrize("family", ["Detr", "DeformableDetr"])
def test_a_training_step(family: str) -> None:
    """Of the whole accelerated model: its loss, what it returns beside it, and every gradient."""
    batch = {"pixel_values": zoo.photos(64)}
    original = zoo.settle(detector(family), batch).train()
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    found = []
    for model in (original, accelerated):
        output = model(**batch, labels=labels())
        output.loss.backward()
        found.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (theirs, expected), (ours, gradients) = found
    assert ours.keys() == theirs.keys() and gradients.keys() == expected.keys() and not handle.fallbacks
    torch.testing.assert_close(ours.loss_dict, theirs.loss_dict)
    torch.testing.assert_close(ours.loss, theirs.loss)
    # Biases of keys and in front of norms have a gradient of nothing but rounding noise.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_swapped_and_reverted() -> None:
    model = zoo.settle(detector("Detr"), batch := {"pixel_values": zoo.photos(64)}).eval()
    original = model.loss_function

    def run(model: Any) -> Tensor:
        return model(**batch, labels=labels()).loss.detach()

    with zoo.swapped_and_reverted(model, run) as expected:
        torch.testing.assert_close(run(model), expected)
        assert model.loss_function is not original and type(model).__name__ == "DetrForObjectDetection"
    assert model.loss_function is original


def test_other_models_keep_theirs() -> None:
    one, other = detector("Detr"), detector("Detr")
    original = other.loss_function
    vitkernels.accelerate(one)
    assert other.loss_function is original


def test_a_loss_of_ones_own_is_kept() -> None:
    def loss(logits: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        return logits.sum(), None, None

    model = detector("Detr")
    model.loss_function = loss
    assert "its loss is" in reasons(vitkernels.accelerate(model))[""] and model.loss_function is loss
    model = detector("Detr")
    handle = vitkernels.accelerate(model)
    model.loss_function = loss  # later
    assert model.loss_function is loss and "its loss is" in handle.fallbacks[""]
    handle.remove()
    assert model.loss_function is loss


def test_what_has_more_to_its_loss_is_reported() -> None:
    transformers = importlib.import_module("transformers")
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, layer_type="basic", out_features=stages)
    segmentation = transformers.DetrForSegmentation(detector("Detr", encoder_attention_heads=8, backbone_config=backbone).config)
    handle = vitkernels.accelerate(segmentation, only="detection_set_loss")
    assert reasons(handle)[""] == "its loss is ForSegmentationLoss, which has more to it than classes and boxes"


@pytest.mark.parametrize(
    ("broken", "kind", "words"),
    [
        ({"class_labels": torch.tensor([7])}, ValueError, "target 0 of image 1"),
        ({"boxes": torch.tensor([[0.5, 0.5, -0.2, 0.1]])}, ValueError, "image 1"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, "boxes of image 1"),
        ({"boxes": torch.zeros(1, 4, device="meta")}, ValueError, "boxes of image 1 is on meta"),
    ],
    ids=["label", "box", "lengths", "device"],
)
def test_bad_targets_are_named_by_image(broken: dict[str, Tensor], kind: type[Exception], words: str) -> None:
    model = detector("Detr")
    vitkernels.accelerate(model)
    targets = labels()
    targets[1] |= broken
    with pytest.raises(kind, match=words):
        run(model.loss_function, model.config, predictions(6, torch.float32), targets)


def test_what_does_not_fit_the_config_runs_the_original() -> None:
    model = detector("Detr")
    handle = vitkernels.accelerate(model)
    with pytest.raises((RuntimeError, IndexError)):
        run(model.loss_function, model.config, predictions(4, torch.float32), labels())
    assert handle.fallbacks == {"": "logits have 4 channels for 5 labels"}


def test_reduced_as_accelerate_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of boxes is reduced with accelerate, where that runs."""

    class State:
        _shared_state: ClassVar[dict[str, bool]] = {"started": True}
        num_processes = 2

    module = importlib.import_module("transformers.loss.loss_for_object_detection")
    monkeypatch.setattr(module, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(module, "PartialState", State, raising=False)
    monkeypatch.setattr(module, "reduce", lambda boxes: boxes + 6, raising=False)
    model = detector("Detr")
    original, given = model.loss_function, predictions(6, torch.float32)
    expected = run(original, model.config, given, labels())
    vitkernels.accelerate(model)
    torch.testing.assert_close(run(model.loss_function, model.config, given, labels()), expected)


def test_compiled_models_still_train() -> None:
    """As with the original, the graph breaks where the matching is."""
    torch.compiler.reset()
    model = detector("Detr")
    given = predictions(6, torch.float32)
    expected = run(model.loss_function, model.config, given, labels())
    vitkernels.accelerate(model)

    def loss(*arguments: Any) -> Any:
        return model.loss_function(*arguments)

    torch.testing.assert_close(run(torch.compile(loss, backend="eager"), model.config, given, labels()), expected)


# --- the authors' classes --------------------------------------------------------------------------------------------------------------


def authors(losses: list[str] = LOSSES) -> Any:
    return detr.SetCriterion(5, detr.HungarianMatcher(1, 5, 2), {}, 0.1, losses)


def outcome(criterion: Any, targets: detr.Targets | None = None) -> dict[str, Tensor]:
    """The losses, and the gradients of their sum."""
    outputs = detr.outputs()
    losses = criterion(outputs, targets or detr.targets())
    sum(value for name, value in losses.items() if name.startswith("loss")).backward()
    layers = [outputs, *outputs["aux_outputs"]]
    gradients = [layer[name].grad for layer in layers for name in ("pred_logits", "pred_boxes")]
    return losses | {f"grad {i}": gradient for i, gradient in enumerate(gradients)}


def test_authors_criterion() -> None:
    criterion = authors()
    expected = outcome(criterion)
    handle = vitkernels.accelerate(criterion)
    assert [(r.path, r.op) for r in handle.replaced] == [("", "detection_set_loss"), ("matcher", "pairwise_box_cost")]
    found = outcome(criterion)
    torch.testing.assert_close(found, expected)
    assert not handle.fallbacks and list(criterion.state_dict()) == ["empty_weight"]
    twin = copy.deepcopy(criterion)
    handle.remove()
    assert type(criterion) is detr.SetCriterion and type(criterion.matcher) is detr.HungarianMatcher
    for again in (criterion, twin):
        torch.testing.assert_close(outcome(again), expected)


def test_authors_matcher() -> None:
    matcher = detr.HungarianMatcher(1, 5, 2)
    outputs, targets = detr.outputs(1, 3), detr.targets((4, 0, 11))
    expected = matcher(outputs, targets)
    vitkernels.accelerate(matcher)
    for pair, other in zip(matcher(outputs, targets), expected, strict=True):
        assert all(torch.equal(index, wanted) for index, wanted in zip(pair, other, strict=True))


def test_one_pass_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkernels.detection import matcher

    shapes: list[tuple[int, ...]] = []
    cost = matcher.ops.pairwise_box_cost
    monkeypatch.setattr(
        matcher.ops, "pairwise_box_cost", lambda logits, *rest, **options: shapes.append(logits.shape) or cost(logits, *rest, **options)
    )
    criterion = authors()
    vitkernels.accelerate(criterion)
    shapes.clear()
    outcome(criterion)
    assert shapes == [(3, 2, 9, 6)]


def test_hook_on_the_matcher_sees_every_layer() -> None:
    criterion, seen = authors(), []
    expected = outcome(criterion)
    criterion.matcher.register_forward_hook(lambda module, args, pairs: seen.append(len(pairs)))
    vitkernels.accelerate(criterion)
    torch.testing.assert_close(outcome(criterion), expected)
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("matcher", [HungarianMatcher(1, 5, 2), detr.HungarianMatcher(1, 5, 2, focal=(0.25, 2.0))], ids=["ours", "another"])
def test_matchers_of_other_classes(matcher: nn.Module) -> None:
    criterion = authors()
    criterion.matcher = matcher
    expected = outcome(criterion)
    handle = vitkernels.accelerate(criterion)
    assert [r.path for r in handle.replaced] == [""]
    torch.testing.assert_close(outcome(criterion), expected)


def test_masks_are_left_to_the_original() -> None:
    handle = vitkernels.accelerate(authors([*LOSSES, "masks"]))
    assert reasons(handle) == {"": "it computes 'masks'"} and [r.path for r in handle.replaced] == ["matcher"]


def test_classes_of_other_weights() -> None:
    criterion = authors()
    handle = vitkernels.accelerate(criterion)
    with torch.no_grad():
        criterion.empty_weight[2] = 3.0  # later
    theirs = authors()
    theirs.empty_weight.copy_(criterion.empty_weight)
    torch.testing.assert_close(outcome(criterion), outcome(theirs))
    assert "other weights" in handle.fallbacks[""]
    assert "other weights" in reasons(vitkernels.accelerate(theirs))[""]


class _Halved(detr.SetCriterion):
    def forward(self, outputs: dict[str, Any], targets: detr.Targets) -> dict[str, Tensor]:
        return {name: value / 2 if name == "loss_giou" else value for name, value in super().forward(outputs, targets).items()}


class _Longer(detr.SetCriterion):
    def forward(self, outputs: dict[str, Any], targets: detr.Targets) -> dict[str, Tensor]:
        return super().forward(outputs, targets) | {"loss_more": torch.zeros(())}


class _Shifted(detr.HungarianMatcher):
    def forward(self, outputs: dict[str, Any], targets: detr.Targets) -> list[tuple[Tensor, Tensor]]:
        return [(i, j.flip(0)) for i, j in super().forward(outputs, targets)]


@pytest.mark.parametrize("base", [_Halved, _Longer, _Shifted])
def test_other_code_is_left_alone(base: type[nn.Module]) -> None:
    cls: Any = type(base.__mro__[1].__name__, (base,), {})
    impostor = cls(1, 5, 2) if base is _Shifted else cls(5, detr.HungarianMatcher(), {}, 0.1, LOSSES)
    assert "computes something else" in reasons(vitkernels.accelerate(impostor))[""]


def test_focal_matchers_are_not_taken_for_detrs() -> None:
    handle = vitkernels.accelerate(detr.HungarianMatcher(1, 5, 2, focal=(0.25, 2.0)))
    assert "computes something else" in reasons(handle)[""]
