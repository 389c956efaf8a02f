"""Samples, bad inputs and benchmark shapes of position embeddings and pooling of packed tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops._arrange import as_it_is, first_for_all, part_of_wider_rows, with_gaps
from vitkernels.ops.packed.layout import PackedLayout
from vitkernels.ops.tokens import op
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample


def _channels_first(x: Tensor) -> Tensor:
    """[D, T] in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


# --- factorized_position_embedding ----------------------------------------------------------------------------------------------------

_Grids = Sequence[tuple[int, int]]


def _places(grids: _Grids) -> tuple[Tensor, Tensor]:
    """Row and column of each patch of images of so many rows and columns of patches, one image after the other."""
    images = [torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2) for height, width in grids]
    rows, columns = torch.cat([torch.zeros((0, 2), dtype=torch.int64), *images]).unbind(1)
    return rows, columns


def _shares(grids: _Grids) -> tuple[Tensor, Tensor]:
    """The same as shares of each image's sides, p / side, float32; at most 0.8, so that a redraw that moves them by a quarter stays within 1."""
    sides = torch.cat([torch.zeros((0, 2)), *(torch.tensor([[height, width]]).expand(height * width, 2) for height, width in grids)])
    return tuple(0.8 * p / side for p, side in zip(_places(grids), sides.unbind(1), strict=True))  # type: ignore[return-value]


def _position_sample(
    name: str,
    grids: _Grids,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    dim: int = 24,
    lengths: tuple[int, int] = (7, 9),
    fractional: tuple[bool, bool] = (False, False),
    positions: torch.dtype | None = None,
    arrange: Callable[[Tensor], Tensor] = as_it_is,
    arrange_tables: Callable[[Tensor], Tensor] = as_it_is,
) -> Sample:
    """One call on the patches of images of these grids; ``positions`` is their dtype, ``fractional`` which axes have shares in place of indices."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def draw(rows: int) -> Tensor:
        return torch.randn((rows, dim), generator=generator, dtype=torch.float64).to(dtype)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device).detach().requires_grad_(grad)

    at = [shares if f else places for f, places, shares in zip(fractional, _places(grids), _shares(grids), strict=True)]
    x, tables = arrange(draw(len(at[0]))), [arrange_tables(draw(length)) for length in lengths]
    return Sample(name, (leaf(x), *map(leaf, tables), *(p.to(device, positions or p.dtype) for p in at)))


def _position_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_position_sample, dtype=dtype, device=device, grad=grad)
    grids = ((3, 4), (7, 2), (1, 9))
    yield make("3 images", grids)
    yield make("2x3, tiny", ((2, 3),), dim=3, lengths=(2, 3))
    yield make("3 images, fractional", grids, fractional=(True, True))
    yield make("fractional, tiny", ((2, 3),), dim=3, lengths=(3, 4), fractional=(True, True))
    yield make("one axis fractional", grids, fractional=(False, True), dim=17)
    yield make("the other axis fractional", grids, fractional=(True, False), dim=33)
    yield make("no token", ())
    yield make("no token, fractional", (), fractional=(True, True))
    yield make("1 token", ((1, 1),), lengths=(1, 1), dim=1)
    yield make("tables of one entry, fractional", ((3, 2),), lengths=(1, 1), fractional=(True, True))
    yield make("int32 positions", grids, positions=torch.int32)
    yield make("uint8 positions", grids, positions=torch.uint8)
    yield make("float64 positions", grids, fractional=(True, True), positions=torch.float64)
    yield make("bfloat16 positions", grids, fractional=(True, True), positions=torch.bfloat16)
    yield make("long tables", grids, lengths=(300, 200), fractional=(True, False))
    for dim in (8, 16, 20, 30, 63, 64, 65, 100):
        yield make(f"dim {dim}", ((3, 4), (2, 9)), dim=dim, fractional=(dim % 3 == 0, dim % 5 == 0))
    yield make("channels first", grids, arrange=_channels_first)
    yield make("strided", grids, arrange=with_gaps, arrange_tables=with_gaps, fractional=(True, False))
    yield make("part of wider rows", grids, arrange=part_of_wider_rows, arrange_tables=part_of_wider_rows)
    yield make("one row", grids, arrange=first_for_all, arrange_tables=first_for_all)
    if not small:
        large = ((14, 14), (24, 31), (7, 9), (32, 32))
        yield make("large", large, dim=384, lengths=(32, 32))
        yield make("large, fractional", large, dim=384, lengths=(64, 48), fractional=(True, True))


def _position_bad_inputs() -> Iterator[BadInput]:
    x, h, w = torch.randn(6, 8), torch.randn(3, 8), torch.randn(4, 8)
    rows, columns = torch.tensor([0, 0, 0, 2, 2, 2]), torch.tensor([0, 1, 3, 0, 1, 3])

    def bad(
        name: str, exception: type[Exception], words: tuple[str, ...], x: Any = x, h: Any = h, w: Any = w, rows: Any = rows, columns: Any = columns
    ) -> BadInput:
        return BadInput.of(name, exception, words, x, h, w, rows, columns)

    def with_one(values: Tensor, value: float) -> Tensor:
        return torch.cat((values[:-1], torch.tensor([value], dtype=values.dtype)))

    yield bad("x is a list", TypeError, ("x is a list", "[T, D]"), x=[1.0])
    yield bad("x of a padded batch", ValueError, ("x has shape [1, 6, 8]", "[T, D]"), x=x[None])
    yield bad("integer x", TypeError, ("x has dtype torch.int64", "floating"), x=x.long())
    yield bad("sparse table", TypeError, ("width_table has layout torch.sparse_coo", "dense"), w=w.to_sparse())
    yield bad("table of another width", ValueError, ("height_table has shape [3, 7]", "[L_h, D]", "D = 8"), h=h[:, :7])
    yield bad("table of one dimension", ValueError, ("width_table has shape [8]", "[L_w, D]"), w=w[0])
    yield bad("table of another dtype", TypeError, ("width_table has dtype torch.float64", "torch.float32"), w=w.double())
    yield bad("table on another device", ValueError, ("height_table is on meta", "cpu"), h=h.to("meta"))
    yield bad("rows is a list", TypeError, ("rows is a list", "[T]"), rows=rows.tolist())
    yield bad("rows of other length", ValueError, ("rows has shape [5]", "[6]"), rows=rows[:5])
    yield bad("rows of two dimensions", ValueError, ("rows has shape [6, 1]", "[6]"), rows=rows[:, None])
    yield bad("a mask for columns", TypeError, ("columns has dtype torch.bool", "integer"), columns=columns > 0)
    yield bad("columns on another device", ValueError, ("columns is on meta", "cpu"), columns=columns.to("meta"))
    yield bad("row beyond the table", ValueError, ("rows holds 3", "height_table", "3 entries"), rows=with_one(rows, 3))
    yield bad("negative column", ValueError, ("columns holds -1", "width_table", "4 entries"), columns=with_one(columns, -1))
    yield bad("indices as floats", ValueError, ("columns holds 3.0", "[0, 1]"), columns=columns.float())
    yield bad("negative share", ValueError, ("rows holds -0.5", "[0, 1]"), rows=with_one(rows / 2, -0.5))
    yield bad("empty table", ValueError, ("rows holds 2", "0 entries"), h=h[:0])
    yield bad("positions that require a gradient", ValueError, ("rows requires a gradient", "detach"), rows=(rows / 2).requires_grad_())


def _position_saved(sample: Sample) -> int:
    """The positions, as int64 or in the accumulation dtype."""
    return 2 * 8 * sample.args[0].shape[0]


def _gather(x: Tensor, height_table: Tensor, width_table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x + height_table[rows] + width_table[columns]


def _look_up(x: Tensor, height_table: Tensor, width_table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x + F.embedding(rows, height_table) + F.embedding(columns, width_table)


def _position_case(name: str, grids: _Grids, dim: int) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        return _position_sample("bench", grids, dtype=dtype, device=device, dim=dim, lengths=(64, 64))

    return BenchCase(name=name, make=make, flops=0, elements_moved=2 * dim * sum(height * width for height, width in grids))


# --- masked_pool ----------------------------------------------------------------------------------------------------------------------


def _pool_sample(
    name: str,
    lengths: Sequence[int],
    mode: str = "mean",
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    shape: tuple[int, ...] = (24,),
    arrange: Callable[[Tensor], Tensor] = as_it_is,
    capacity: int | None = None,
    max_sequences: int | None = None,
    used: Sequence[int] | None = None,
    queries: int | None = None,
    integers: bool = False,
) -> Sample:
    """One call. ``used`` rows of each sequence count; ``queries``: the layout is one of attention pooling; ``integers``: whole numbers, with ties."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    layout = PackedLayout.from_lengths(lengths, capacity=capacity, max_sequences=max_sequences)
    if used is not None:
        layout = PackedLayout.from_cu_seqlens(layout.cu_seqlens_k, seqused_k=torch.tensor(used), total_k=capacity, total_q=capacity)
    if queries is not None:
        layout = layout.cross(queries)
    x = torch.randn((layout.total_k, *shape), generator=generator, dtype=torch.float64)
    x = arrange((x.round() if integers else x).to(dtype))
    return Sample(name, (x.to(device).detach().requires_grad_(grad),), {"layout": layout.to(device), "mode": mode})


def _pool_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_pool_sample, dtype=dtype, device=device, grad=grad)
    yield make("5+16+1+9", (5, 16, 1, 9))
    yield make("3+0+2, tiny", (3, 0, 2), shape=(3,))
    for mode in ("max", "mean"):
        yield make(f"5+16+1+9 {mode}, heads", (5, 16, 1, 9), mode, shape=(3, 7))
        yield make(f"0+1+63+64+65 {mode}", (0, 1, 63, 64, 65), mode, shape=(33,))
        yield make(f"no sequence {mode}", (), mode)
        yield make(f"no sequence in 3 rows {mode}", (), mode, capacity=3)
        yield make(f"all empty {mode}", (0, 0, 0), mode)
        yield make(f"one token each {mode}", (1,) * 20, mode, shape=(5,))
        yield make(f"capacity {mode}", (6, 0, 11), mode, capacity=24, max_sequences=6)
        yield make(f"some in use {mode}", (10, 9, 8), mode, used=(4, 9, 0), capacity=30)
        yield make(f"of attention pooling {mode}", (7, 2, 5), mode, queries=1)
        yield make(f"channels first {mode}", (9, 3, 20), mode, arrange=_channels_first)
        yield make(f"heads strided {mode}", (9, 3, 20), mode, shape=(2, 10), arrange=with_gaps)
        yield make(f"part of wider rows {mode}", (9, 3, 20), mode, arrange=part_of_wider_rows, shape=(40,))
        for dim in (1, 8, 16, 30, 64, 100):
            yield make(f"dim {dim} {mode}", (9, 70), mode, shape=(dim,))
    yield make("one row", (9, 3, 20), arrange=first_for_all)
    if dtype is not torch.float64:  # in which gradients are differenced: a tie has none
        yield make("ties", (9, 30, 70, 2), "max", integers=True)
        yield make("all tied", (9, 3, 20), "max", arrange=first_for_all)
    if not small:
        for mode in ("mean", "max"):
            yield make(f"one long among many short {mode}", (3, 1, 7, 2, 1024, 1, 0, 16, 5, 49, 2, 50), mode, shape=(192,))
            yield make(f"4097 {mode}", (4097,), mode, shape=(100,))


def _pool_bad_inputs() -> Iterator[BadInput]:
    x, layout = torch.randn(9, 8), PackedLayout.from_lengths((4, 5))
    yield BadInput.of("x is a list", TypeError, ("x is a list", "[T, D]"), [1.0], layout)
    yield BadInput.of("integer x", TypeError, ("x has dtype torch.int64", "floating"), x.long(), layout)
    yield BadInput.of("sparse x", TypeError, ("x has layout torch.sparse_coo", "dense"), x.to_sparse(), layout)
    yield BadInput.of("x of a padded batch", ValueError, ("x has shape [1, 9, 8, 1]", "[T, H, D]"), x[None, :, :, None], layout)
    yield BadInput.of("x of one dimension", ValueError, ("x has shape [9]", "[T, D]"), x[:, 0], layout)
    yield BadInput.of("other rows than the layout", ValueError, ("x has 8 token rows", "9", "total_k"), x[:8], layout)
    yield BadInput.of("cu_seqlens for a layout", TypeError, ("layout is a Tensor", "PackedLayout"), x, layout.cu_seqlens_k)
    yield BadInput.of("layout on another device", ValueError, ("layout is on meta", "cpu"), x, layout.to("meta"))
    yield BadInput.of("unknown mode", ValueError, ("mode is 'sum'", "'mean'", "'max'"), x, layout, "sum")


def _pool_saved(sample: Sample) -> int:
    """The layout, for a maximum also its rows."""
    sequences, dim = sample.kwargs["layout"].sequences, sample.args[0].shape[1:].numel()
    return 4 * (2 * sequences + 1) + (4 * sequences * dim if sample.kwargs["mode"] == "max" else 0)


def _scatter(x: Tensor, layout: PackedLayout, mode: str) -> Tensor:
    """What people write today: every row's sequence, and a scatter."""
    sequence = torch.repeat_interleave(layout.cu_seqlens_k.diff(), output_size=x.shape[0])
    if mode == "mean":
        total = x.new_zeros((layout.sequences, x.shape[1])).index_add(0, sequence, x)
        return total / layout.cu_seqlens_k.diff()[:, None]
    return x.new_full((layout.sequences, x.shape[1]), -torch.inf).scatter_reduce(0, sequence[:, None].expand(x.shape), x, "amax")


def _segment_reduce(x: Tensor, layout: PackedLayout, mode: str) -> Tensor:
    return torch.segment_reduce(x, mode, offsets=layout.cu_seqlens_k, axis=0, unsafe=True)


def _per_image(x: Tensor, layout: PackedLayout, mode: str) -> Tensor:
    reduce = torch.mean if mode == "mean" else torch.amax
    return torch.stack([reduce(x[begin:end], dim=0) for _, _, begin, end in layout.segments])


def _pool_case(name: str, lengths: Sequence[int], dim: int, mode: str) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        return _pool_sample("bench", lengths, mode, dtype=dtype, device=device, shape=(dim,))

    return BenchCase(name=name, make=make, flops=0, elements_moved=dim * (sum(lengths) + len(lengths)))


_MIX = ((8, 8), (10, 10), (12, 12), (14, 14), (16, 16), (15, 20), (4, 103), (24, 24))  # 2048 tokens
_LENGTHS = tuple(height * width for height, width in _MIX)

SPECS = (
    OpSpec(
        name="factorized_position_embedding",
        family="tokens",
        function=op.factorized_position_embedding,
        reference=backends.backend("reference")(op.factorized_position_embedding),
        summary="embeddings of the row and the column of each patch, added (NaViT, arXiv 2307.06304)",
        samples=_position_samples,
        bad_inputs=_position_bad_inputs,
        bench_cases=(
            _position_case("T1024 d384", ((32, 32),), 384),
            _position_case("T2048 d768", (*_MIX[:-2], (8, 53), (24, 24)), 768),
            _position_case("T8192 d768", ((64, 64), (64, 64)), 768),
        ),
        gpu_cases=(_position_case("T8192 d768", ((64, 64), (64, 64)), 768), _position_case("T131072 d768", ((64, 64),) * 32, 768)),
        saved_bytes=_position_saved,
        peers={"index": _gather, "F.embedding": _look_up},
        kept_by_autocast=("rows", "columns"),
    ),
    OpSpec(
        name="masked_pool",
        family="tokens",
        function=op.masked_pool,
        reference=backends.backend("reference")(op.masked_pool),
        summary="mean or maximum of the tokens of each packed image (NaViT, arXiv 2307.06304)",
        samples=_pool_samples,
        bad_inputs=_pool_bad_inputs,
        bench_cases=(
            _pool_case("mean 8 images T2048 d384", _LENGTHS, 384, "mean"),
            _pool_case("max 8 images T2048 d768", _LENGTHS, 768, "max"),
            _pool_case("mean 32 images T8192 d768", _LENGTHS * 4, 768, "mean"),
        ),
        gpu_cases=(
            _pool_case("mean 32 images T8192 d768", _LENGTHS * 4, 768, "mean"),
            _pool_case("mean 512 images T131072 d768", _LENGTHS * 64, 768, "mean"),
            _pool_case("max 512 images T131072 d768", _LENGTHS * 64, 768, "max"),
        ),
        saved_bytes=_pool_saved,
        peers={"scatter": _scatter, "segment_reduce": _segment_reduce, "per image": _per_image},
    ),
)
