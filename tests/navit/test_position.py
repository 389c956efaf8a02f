"""Factorized position embeddings against their formulas, written again with loops and float64."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels.navit import FactorizedPositionEmbedding, patchify

DIM, SIZE = 8, 6
POSITIONS, KINDS, COMBINES = ("absolute", "fractional"), ("learned", "sinusoidal", "fourier"), ("sum", "product", "concat")
OPTIONS = list(itertools.product(POSITIONS, KINDS, COMBINES))


def module(position: Any, kind: Any, combine: Any, size: int = SIZE) -> FactorizedPositionEmbedding:
    embedding = FactorizedPositionEmbedding(DIM, size, position=position, kind=kind, combine=combine, frequencies=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in embedding.parameters():  # frequencies, too: at first both axes have the same
        torch.nn.init.normal_(parameter, generator=generator)
    return embedding


def places(*grids: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """rows, cols and each token's grid."""
    batch = patchify([torch.zeros(1, rows, cols) for rows, cols in grids], 1)
    return batch.rows, batch.cols, batch.grids[batch.image]


def one_axis(embedding: FactorizedPositionEmbedding, axis: str, p: int, side: int) -> Tensor:
    """The embedding of patch ``p`` of ``side``, the formula of the docstring."""
    absolute = embedding.position == "absolute"
    if embedding.kind == "learned":
        table = getattr(embedding, f"{axis}_table")
        at = p if absolute else p / side * (SIZE - 1)
        below = math.floor(at)
        return table[below] * (1 - (at - below)) + table[min(below + 1, SIZE - 1)] * (at - below)
    if embedding.kind == "sinusoidal":
        half = embedding.width // 2
        angles = [(p if absolute else p / side * SIZE) / 10000 ** (i / half) for i in range(half)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
    frequencies, weight = getattr(embedding, f"{axis}_frequencies"), getattr(embedding, f"{axis}_map").weight
    angles = 2 * math.pi * p / (SIZE if absolute else side) * frequencies
    return weight @ torch.cat([angles.sin(), angles.cos()])


def expected(embedding: FactorizedPositionEmbedding, x: Tensor, rows: Tensor, cols: Tensor, grids: Tensor) -> Tensor:
    out = []
    for i, (row, col, (height, width)) in enumerate(zip(rows.tolist(), cols.tolist(), grids.tolist(), strict=True)):
        a, b = one_axis(embedding, "row", row, height), one_axis(embedding, "col", col, width)
        both = {"sum": a + b, "product": a * b, "concat": torch.cat([a, b])}[embedding.combine]
        out.append(x[i] + both)
    return torch.stack(out)


@pytest.mark.parametrize(("position", "kind", "combine"), OPTIONS)
def test_against_the_formula(position: str, kind: str, combine: str) -> None:
    embedding = module(position, kind, combine)
    rows, cols, grids = places((6, 5), (1, 4), (3, 2), *([(17, 9)] if position == "fractional" else []))
    x = torch.randn(len(rows), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(embedding(x, rows, cols, grids), expected(embedding, x, rows, cols, grids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("position", "kind", "combine"), [o for o in OPTIONS if o[1] != "sinusoidal"])
def test_gradients(position: str, kind: str, combine: str) -> None:
    embedding = module(position, kind, combine)
    rows, cols, grids = places((2, 3), (4, 1))
    x = torch.randn(len(rows), DIM, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    names = [name for name, _ in embedding.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(embedding, dict(zip(names, parameters, strict=True)), (x, rows, cols, grids))

    assert torch.autograd.gradcheck(call, (x, *embedding.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_fractional_depends_on_the_share_and_absolute_does_not(kind: str) -> None:
    """Patch 1 of 2 and patch 2 of 4 lie at the same share of the side."""
    grids = torch.tensor([[2, 2], [4, 4]])
    at = torch.tensor([1, 2])
    x = torch.zeros(2, DIM, dtype=torch.float64)
    same, different = module("fractional", kind, "sum")(x, at, at, grids), module("absolute", kind, "sum")(x, at, at, grids)
    assert torch.equal(same[0], same[1])
    assert not torch.allclose(different[0], different[1])


def test_rows_and_columns_are_told_apart() -> None:
    for kind in ("learned", "fourier"):
        embedding = module("absolute", kind, "sum")
        x, zero, one = torch.zeros(1, DIM, dtype=torch.float64), torch.tensor([0]), torch.tensor([1])
        assert not torch.allclose(embedding(x, zero, one), embedding(x, one, zero))


def test_state_dict() -> None:
    shapes = {
        "learned": {"row_table": (SIZE, DIM), "col_table": (SIZE, DIM)},
        "sinusoidal": {},
        "fourier": {"row_frequencies": (3,), "col_frequencies": (3,), "row_map.weight": (DIM, 6), "col_map.weight": (DIM, 6)},
    }
    for kind, expected_shapes in shapes.items():
        assert {name: tuple(value.shape) for name, value in module("absolute", kind, "sum").state_dict().items()} == expected_shapes
    assert module("absolute", "learned", "concat").state_dict()["row_table"].shape == (SIZE, DIM // 2)


def test_first_parameters() -> None:
    torch.manual_seed(0)
    learned = FactorizedPositionEmbedding(256, 64)
    assert float(learned.row_table.detach().std()) == pytest.approx(1 / 16, rel=0.03)
    fourier = FactorizedPositionEmbedding(8, 64, kind="fourier", frequencies=6)
    torch.testing.assert_close(fourier.row_frequencies.detach(), torch.tensor([1.0, 2, 4, 8, 16, 32]))


def test_dtype_is_that_of_x() -> None:
    rows, cols, grids = places((2, 2))
    for kind in KINDS:
        embedding = FactorizedPositionEmbedding(DIM, SIZE, kind=kind, position="fractional")  # type: ignore[arg-type]
        assert embedding(torch.zeros(4, DIM, dtype=torch.bfloat16), rows, cols, grids).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"position": "relative"}, "position is 'relative'; it must be one of 'absolute', 'fractional'"),
        ({"kind": "rotary"}, "kind is 'rotary'"),
        ({"combine": "max"}, "combine is 'max'"),
        ({"dim": 0}, "dim is 0"),
        ({"max_size": 0}, "max_size is 0"),
        ({"dim": 6, "kind": "sinusoidal", "combine": "concat"}, "dim is 6; with kind='sinusoidal' and combine='concat' it must be a multiple of 4"),
        ({"dim": 7, "combine": "concat"}, "must be a multiple of 2"),
    ],
)
def test_errors(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        FactorizedPositionEmbedding(**{"dim": DIM, "max_size": SIZE, **arguments})


def test_an_absolute_position_beyond_the_table() -> None:
    at = torch.tensor([0, SIZE])
    with pytest.raises(ValueError, match=f"rows holds {SIZE}"):
        module("absolute", "learned", "sum")(torch.zeros(2, DIM, dtype=torch.float64), at, at.flip(0))


def test_grids_are_needed_for_fractions() -> None:
    rows, cols, _ = places((2, 2))
    with pytest.raises(ValueError, match="grids is None"):
        module("fractional", "learned", "sum")(torch.zeros(4, DIM), rows, cols)
