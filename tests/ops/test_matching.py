"""Matching and the set loss against what they replace: scipy's assignment, transformers' matchers and losses, and boxes one can work out by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment as scipys
from torch import Tensor

import vitkernels
from vitkernels import accuracy, host, ops
from vitkernels.ops import TargetLayout
from vitkernels.ops.matching import assignment

COMPILED = host.why_not() is None


@pytest.fixture(params=["compiled", "python"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The assignment on the compiled module, then without it."""
    if request.param == "python":
        monkeypatch.setattr(assignment.host, "compiled", lambda name: None)
    elif not COMPILED:
        pytest.skip(str(host.why_not()))
    return str(request.param)


def _assert_same(got: Sequence[Any], expected: Sequence[Any], what: str) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert np.array_equal(np.asarray(ours), theirs), f"{what}: {ours} instead of {theirs}"


# --- linear_sum_assignment ------------------------------------------------------------------------------------------------------------


def test_ten_thousand_problems_are_solved_as_scipy_solves_them(solver: str) -> None:
    """The same indices, and so the same total, ties and all: floats, whole numbers, empty and tall matrices, NaN and infinities replaced."""
    generator = np.random.default_rng(0)
    for number in range(10_000 if solver == "compiled" else 1_000):
        rows, columns = generator.integers(0, 14, 2) if number % 50 else generator.integers(20, 70, 2)
        costs = generator.integers(-3, generator.integers(-1, 9), (rows, columns)) if number % 2 else generator.normal(size=(rows, columns))
        costs = costs.astype((np.float64, np.float32, np.int64, np.float16)[number % 4])
        if number % 5 == 0 and costs.size and costs.dtype.kind == "f":
            spoiled = generator.random(costs.shape) < 0.2
            finite = costs[~spoiled]
            clean = np.where(spoiled, finite.max() if finite.size else 0, costs)
            costs[spoiled] = generator.choice([np.nan, np.inf, -np.inf], spoiled.sum())
            with warnings.catch_warnings():
                warnings.simplefilter("error" if not spoiled.any() else "ignore")
                got = ops.linear_sum_assignment(costs)
            expected = scipys(clean)
        else:
            got, expected = ops.linear_sum_assignment(costs), scipys(costs)
        _assert_same(got, expected, f"problem {number}, {costs.shape}")


@st.composite
def _batches(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], TargetLayout]:
    sizes = draw(st.lists(st.integers(0, 9), max_size=5))
    layers, queries = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    values = st.integers(0, 3) if draw(st.booleans()) else st.floats(-1e3, 1e3, width=32)
    count = layers * sum(sizes) * queries
    costs = draw(st.lists(values, min_size=count, max_size=count))
    return np.asarray(costs, np.float32).reshape(layers, sum(sizes), queries), TargetLayout.from_sizes(sizes)


def test_arrays_of_any_kind(solver: str) -> None:
    """Of any strides and byte order, and large enough for Python's lock to be released."""
    for size in (5, 80):
        costs = np.random.default_rng(size).normal(size=(size, 2 * size))
        for array in (costs[::2], costs.T, costs[:, ::-1], np.asfortranarray(costs), costs.astype(">f8"), costs.astype(">f4")):
            _assert_same(ops.linear_sum_assignment(array), scipys(array), f"strides {array.strides} of {array.dtype}")


def test_batches_are_solved_image_by_image(solver: str) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(_batches())
    def check(batch: tuple[np.ndarray[Any, Any], TargetLayout]) -> None:
        costs, layout = batch
        matches = ops.linear_sum_assignment(torch.from_numpy(costs), layout)
        assert matches.shape == (costs.shape[0], layout.images, costs.shape[2])
        for layer, found in zip(costs, matches, strict=True):
            for image, pair in enumerate(layout.pairs(found)):
                block = layer[layout.offsets[image] : layout.offsets[image + 1]].T
                _assert_same(pair, scipys(block), f"image {image} of {layout.sizes}")
            assert torch.equal(layout.matches(layout.pairs(found), costs.shape[2]), found)

    check()


def test_threads_change_nothing(threads: None) -> None:
    """Enough work for several threads, and ties, which an order of threads could break one way or the other."""
    layout = TargetLayout.from_sizes((40, 70, 3, 55) * 4)
    costs = torch.randint(50, (6, layout.total, 60), generator=torch.Generator().manual_seed(0)).double()
    torch.set_num_threads(1)
    alone = ops.linear_sum_assignment(costs, layout)
    torch.set_num_threads(4)
    assert torch.equal(ops.linear_sum_assignment(costs, layout), alone)
    for image, pair in enumerate(layout.pairs(alone[5])):
        _assert_same(pair, scipys(costs[5, layout.offsets[image] : layout.offsets[image + 1]].T), f"image {image}")


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32])
def test_tensors_in_tensors_out(dtype: torch.dtype) -> None:
    costs = torch.randint(9, (7, 5), generator=torch.Generator().manual_seed(1)).to(dtype)
    costs = torch.stack((costs, costs), dim=-1)[..., 0]  # not contiguous
    row, column = ops.linear_sum_assignment(costs.requires_grad_() if dtype.is_floating_point else costs)
    assert row.dtype is column.dtype is torch.int64
    _assert_same((row, column), scipys(costs.detach().double().numpy()), str(dtype))
    one_layer = ops.linear_sum_assignment(costs, TargetLayout.from_sizes((3, 4)))
    assert one_layer.shape == (2, 5) and (one_layer >= 0).sum(1).tolist() == [3, 4]
    as_array = ops.linear_sum_assignment(costs.detach().double().numpy(), TargetLayout.from_sizes((3, 4)))
    assert isinstance(as_array, np.ndarray) and np.array_equal(as_array, one_layer)


def test_nan_is_replaced_with_one_warning_or_refused(solver: str) -> None:
    """The image is named; and what is left is matched as if the NaN cost as much as the dearest."""
    layout = TargetLayout.from_sizes((2, 3, 1))
    costs = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    costs[1, 3, 2], costs[1, 5, 0] = torch.nan, -torch.inf
    with pytest.warns(RuntimeWarning, match=r"image 1 in layer 1 \(and of 1 more images\) hold NaN") as caught:
        matches = ops.linear_sum_assignment(costs, layout)
    assert len(caught) == 1 and caught[0].filename == __file__
    clean = costs.clone()
    clean[1, 3, 2], clean[1, 5, 0] = costs[1, 2:5].nan_to_num(-1).max(), costs[1, 5, 1:].max()
    assert torch.equal(matches, ops.linear_sum_assignment(clean, layout, invalid="raise"))
    with pytest.raises(ValueError, match="image 1 in layer 1"):
        ops.linear_sum_assignment(costs, layout, invalid="raise")
    with pytest.raises(ValueError, match=r"image 0 .*NaN"):
        ops.linear_sum_assignment(costs[0] * torch.nan, layout, invalid="raise")
    with pytest.warns(RuntimeWarning):
        assert [len(indices) for indices in ops.linear_sum_assignment(np.full((3, 2), np.nan))] == [2, 2]


def test_sums_that_overflow_are_no_crash(solver: str) -> None:
    """Costs at the end of float64's range: scipy's indices there, too."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        costs = generator.choice([1.79e308, -1.79e308, 1e308, 3.0], generator.integers(2, 8, 2))
        _assert_same(ops.linear_sum_assignment(costs), scipys(costs), str(costs))


@pytest.mark.parametrize(
    ("costs", "layout", "exception", "words"),
    [
        ([[1.0]], None, TypeError, "costs is a list; it must be a numpy array or a Tensor"),
        (np.ones(3), None, ValueError, r"costs has shape \[3\]; it must be \[N, M\]"),
        (np.ones((2, 2), complex), None, TypeError, "costs has dtype complex128; it must be real"),
        (torch.ones(2, 2), [2], TypeError, "layout is a list; it must be a TargetLayout"),
        (torch.ones(2), TargetLayout.from_sizes((2,)), ValueError, r"costs has shape \[2\]; it must be \[L, T, Q\] or \[T, Q\]"),
        (torch.ones(2, 5), TargetLayout.from_sizes((2, 1)), ValueError, r"costs has shape \[2, 5\]; it must have T = 3 rows"),
    ],
)
def test_bad_costs_are_refused(costs: Any, layout: Any, exception: type[Exception], words: str) -> None:
    with pytest.raises(exception, match=words):
        ops.linear_sum_assignment(costs, layout)
    with pytest.raises(ValueError, match="invalid is 'ignore'"):
        ops.linear_sum_assignment(costs, layout, invalid="ignore")  # type: ignore[call-overload]


# --- TargetLayout ---------------------------------------------------------------------------------------------------------------------


def _targets(sizes: Sequence[int], classes: int, dtype: torch.dtype = torch.float32, grid: int | None = None) -> list[dict[str, Tensor]]:
    return [{"class_labels": torch.randint(classes, (n,)), "boxes": _boxes(n, dtype=dtype, grid=grid)} for n in sizes]


def _boxes(*shape: int, dtype: torch.dtype, grid: int | None = None) -> Tensor:
    return (torch.randint(1, grid, (*shape, 4)) / grid).to(dtype) if grid else 0.1 + 0.8 * torch.rand(*shape, 4, dtype=dtype)


def _joined(targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, TargetLayout]:
    return torch.cat([t["class_labels"] for t in targets]), torch.cat([t["boxes"] for t in targets]), TargetLayout.from_targets(targets)


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"boxes": torch.ones(3, 4)}, ValueError, r"boxes of image 1 has shape \[3, 4\]; it must be \[T_b, 4\] = \[2, 4\]"),
        ({"class_labels": torch.ones(2, 1)}, ValueError, r"class_labels of image 1 has shape \[2, 1\]"),
        ({"boxes": torch.ones(2, 4, device="meta")}, ValueError, "boxes of image 1 is on meta; it must be on cpu"),
        ({"boxes": [[1.0]]}, TypeError, "boxes of image 1 is a list"),
    ],
)
def test_a_bad_target_is_named_by_its_image(change: dict[str, Any], exception: type[Exception], words: str) -> None:
    targets = _targets((1, 2), 5)
    targets[1] |= change
    with pytest.raises(exception, match=words):
        TargetLayout.from_targets(targets)
    with pytest.raises(KeyError, match=r"targets\[0\] has no 'labels'"):
        TargetLayout.from_targets(targets, labels="labels")


def test_pairs_are_of_int64_matches_alone(solver: str) -> None:
    layout = TargetLayout.from_sizes([1, 0, 2])
    matches = torch.tensor([[-1, 0, -1], [-1, -1, -1], [2, -1, 1]])
    expected = [([1], [0]), ([], []), ([0, 2], [1, 0])]
    assert [tuple(index.tolist() for index in pair) for pair in layout.pairs(matches)] == expected
    with pytest.raises(TypeError, match=r"matches has dtype torch\.int32"):
        layout.pairs(matches.int())


def test_bad_sizes_and_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes\[1\] is -1; image 1"):
        TargetLayout.from_sizes((2, -1))
    with pytest.raises(TypeError, match=r"sizes\[0\] is a float"):
        TargetLayout.from_sizes((2.0,))  # type: ignore[arg-type]
    layout, nothing = TargetLayout.from_sizes((1, 2)), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="a target of image 1 is outside of"):
        layout.matches([(nothing, nothing), (torch.tensor([0]), torch.tensor([2]))], 4)
    with pytest.raises(ValueError, match="a query of image 0 is outside of"):
        layout.matches([(torch.tensor([4]), torch.tensor([0])), (nothing, nothing)], 4)
    with pytest.raises(ValueError, match="for 1 images; there must be for 2"):
        layout.matches([(nothing, nothing)], 4)
    with pytest.raises(ValueError, match=r"matches has shape \[3, 4\]"):
        layout.pairs(torch.zeros(3, 4, dtype=torch.int64))


# --- against transformers -------------------------------------------------------------------------------------------------------------

SIZES = (3, 0, 20, 1)
EOS = 0.125  # theirs is rounded to float32: this one is what it says


def _predictions(layers: int, queries: int, classes: int, dtype: torch.dtype, grid: int | None = None) -> tuple[Tensor, Tensor]:
    boxes = _boxes(layers, len(SIZES), queries, dtype=dtype, grid=grid)
    return torch.randn(layers, len(SIZES), queries, classes, dtype=dtype).requires_grad_(), boxes.requires_grad_()


@pytest.fixture(params=["reference", "native"])
def on(request: pytest.FixtureRequest) -> Any:
    """Everything on one backend."""
    reason = vitkernels.backends.why_not("detection_set_loss", request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    with vitkernels.backend(request.param):
        yield


@pytest.mark.parametrize("kind", ["softmax", "focal"])
@pytest.mark.parametrize("queries", [9, 40])
def test_matches_are_those_of_transformers(kind: Any, queries: int, on: None) -> None:
    """With images without targets and with more targets than queries."""
    detr = pytest.importorskip("transformers.loss.loss_for_object_detection")
    deformable = pytest.importorskip("transformers.loss.loss_deformable_detr")
    matcher = (detr.HungarianMatcher if kind == "softmax" else deformable.DeformableDetrHungarianMatcher)(1.0, 5.0, 2.0)
    logits, boxes = _predictions(3, queries, 12, torch.float32)
    targets = _targets(SIZES, 12)
    labels, target_boxes, layout = _joined(targets)
    costs = ops.pairwise_box_cost(logits, boxes, labels, target_boxes, layout, kind=kind)
    assert not costs.requires_grad
    matches = ops.linear_sum_assignment(costs, layout)
    for layer in range(3):
        expected = matcher({"logits": logits[layer], "pred_boxes": boxes[layer]}, targets)
        for pair, their_pair in zip(layout.pairs(matches[layer]), expected, strict=True):
            _assert_same(pair, [i.numpy() for i in their_pair], f"layer {layer}")
        alone = ops.pairwise_box_cost(logits[layer], boxes[layer], labels, target_boxes, layout, kind=kind)
        assert torch.equal(alone, costs[layer])


class _Given(torch.nn.Module):
    """A matcher that hands out what was matched before, layer by layer."""

    def __init__(self, indices: list[Any]) -> None:
        super().__init__()
        self.indices = iter(indices)

    def forward(self, *_: Any) -> Any:
        return next(self.indices)


def _transformers_losses(kind: str, layers: list[Any], classes: int) -> Callable[..., Tensor]:
    """Their losses [L, 3] given the matches of each layer; one criterion call for each, as they have it."""
    detr = pytest.importorskip("transformers.loss.loss_for_object_detection")
    deformable = pytest.importorskip("transformers.loss.loss_deformable_detr")

    def losses(logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        if kind == "softmax":
            criterion = detr.ImageLoss(_Given(layers), classes - 1, EOS, ["labels", "boxes"])
        else:
            criterion = deformable.DeformableDetrImageLoss(_Given(layers), classes, 0.25, ["labels", "boxes"])
        criterion = criterion.to(logits.dtype)
        found = [criterion({"logits": x, "pred_boxes": b}, targets) for x, b in zip(logits, boxes, strict=True)]
        return torch.stack([torch.stack((f["loss_ce"], f["loss_bbox"], f["loss_giou"])) for f in found])

    return losses


@pytest.mark.parametrize("kind", ["softmax", "focal"])
@pytest.mark.parametrize("grid", [None, 4], ids=["any boxes", "edges that meet"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_are_those_of_transformers(kind: Any, grid: int | None, dtype: torch.dtype, on: None) -> None:
    """In float64 to the last digits, also where coordinates are equal and where boxes touch; in float32 by the rule."""
    classes = 12
    logits, boxes = _predictions(3, 40, classes, dtype, grid)
    targets = _targets(SIZES, classes - 1, dtype, grid)
    labels, target_boxes, layout = _joined(targets)
    matches = ops.linear_sum_assignment(ops.pairwise_box_cost(logits, boxes, labels, target_boxes, layout, kind=kind), layout)
    theirs = _transformers_losses(kind, [layout.pairs(m) for m in matches], classes)
    weights = torch.rand(3, 3, dtype=dtype)

    def results(losses: Tensor, *inputs: Tensor) -> list[Tensor]:
        return [losses.detach(), *torch.autograd.grad((losses * weights.to(losses.dtype)).sum(), inputs)]

    ours = results(ops.detection_set_loss(logits, boxes, labels, target_boxes, matches, float(layout.total), kind=kind, eos_coef=EOS), logits, boxes)
    eager = results(theirs(logits, boxes, targets), logits, boxes)
    if dtype is torch.float64:
        for got, expected in zip(ours, eager, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
        return
    wide = [t.detach().double().requires_grad_() for t in (logits, boxes)]
    theirs = _transformers_losses(kind, [layout.pairs(m) for m in matches], classes)
    exact = results(theirs(*wide, [t | {"boxes": t["boxes"].double()} for t in targets]), *wide)
    for name, got, expected, truth in zip(("losses", "logits", "boxes"), ours, eager, exact, strict=True):
        assert accuracy.compare_tensors(name, got, expected, truth).holds


# --- by hand --------------------------------------------------------------------------------------------------------------------------


def test_boxes_worked_out_by_hand(on: None) -> None:
    """Two unit squares that share a quarter of one side each: intersection 1/4, union 7/4, hull 9/4."""
    logits, layout = torch.zeros(1, 1, 2), TargetLayout.from_sizes((1,))
    box, target, label = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]), torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([0])
    overlap = 1 / 7 - (9 / 4 - 7 / 4) / (9 / 4)
    cost = ops.pairwise_box_cost(logits, box, label, target, layout, (1.0, 5.0, 2.0))
    torch.testing.assert_close(cost, torch.tensor([[-0.5 + 5 * 1.0 - 2 * overlap]]))
    losses = ops.detection_set_loss(logits, box, label, target, torch.tensor([[0]]), torch.tensor([4.0]))
    torch.testing.assert_close(losses, torch.tensor([np.log(2), 1.0 / 4, (1 - overlap) / 4], dtype=torch.float32))


def test_giou_loss_is_the_diagonal_of_transformers_matrix() -> None:
    """Values, and gradients at ties, in float64; and boxes that are none are refused by their place."""
    detr = pytest.importorskip("transformers.loss.loss_for_object_detection")
    transforms = pytest.importorskip("transformers.image_transforms")
    torch.manual_seed(0)
    boxes, targets = (_boxes(50, dtype=torch.float64, grid=4).requires_grad_() for _ in range(2))
    loss = ops.generalized_box_iou_loss(boxes, targets)
    expected = 1 - detr.generalized_box_iou(*(transforms.center_to_corners_format(b) for b in (boxes, targets))).diag()
    grad = torch.rand_like(loss)
    for got, wanted in zip(torch.autograd.grad(loss, (boxes, targets), grad), torch.autograd.grad(expected, (boxes, targets), grad), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"target_boxes\[1\] has a box of width -1"):
        ops.generalized_box_iou_loss(torch.ones(2, 4), torch.tensor([[1.0] * 4, [1.0, 1.0, -1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"target_boxes has shape \[3, 4\]"):
        ops.generalized_box_iou_loss(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"boxes has shape \[2, 5\]"):
        ops.generalized_box_iou_loss(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"target_boxes has dtype torch.float64"):
        ops.generalized_box_iou_loss(torch.ones(2, 4), torch.ones(2, 4).double())


def test_groups_share_targets(on: None) -> None:
    """Two queries matched with one target count twice, as in the groups of Group DETR."""
    logits, boxes, target = torch.randn(1, 4, 5), _boxes(1, 4, dtype=torch.float32), _boxes(1, dtype=torch.float32)
    label = torch.tensor([2])
    pairs = [ops.detection_set_loss(logits, boxes, label, target, torch.tensor([m]), 1.0) for m in ([0, -1, -1, -1], [-1, -1, 0, -1], [0, -1, 0, -1])]
    torch.testing.assert_close(pairs[0][1:] + pairs[1][1:], pairs[2][1:])


def test_a_label_beyond_the_classes_is_found_in_a_compiled_call_too() -> None:
    """There Python does not look at values; the kernel does, and memory is safe."""
    if vitkernels.backends.why_not("detection_set_loss", "native", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("the native kernels are not built")
    logits, boxes = torch.randn(1, 4, 5), _boxes(1, 4, dtype=torch.float32)
    function = torch.compile(ops.detection_set_loss, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="target_labels must lie within 0 and 4"):
        function(logits, boxes, torch.tensor([5]), _boxes(1, dtype=torch.float32), torch.full((1, 4), -1), 1.0)
