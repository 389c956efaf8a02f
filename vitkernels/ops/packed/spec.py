"""Samples, bad inputs and benchmark shapes of the attention over packed sequences."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops._arrange import HEAD_DIMS, contiguous, long_in, strided
from vitkernels.ops.packed import op
from vitkernels.ops.packed.layout import TILE, PackedLayout
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample

_AUTOCAST_KEEPS = ("bias", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias")


def _of_one_projection(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """As a model has them: slices of one [T, 3, H, D]."""
    return torch.stack((q, k, v), dim=-3).unbind(-3)


def _of_three_projections(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Slices of one [T, H, 3 D], in another order."""
    wide = torch.cat((v, q, k), dim=-1)
    value, query, key = wide.split((v.shape[-1], q.shape[-1], k.shape[-1]), dim=-1)
    return query, key, value


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[H, T, D] in memory."""
    return tuple(t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in tensors)


def _expanded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One head's values for all."""
    return tuple(t[..., :1, :].expand(t.shape) for t in tensors)


def _sample(
    name: str,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    arrange: Callable[..., tuple[Tensor, ...]] = contiguous,
    bias: tuple[int, int] | None = None,
    hidden: bool = False,
    qk_norm: str | None = None,
    norm: str = "",
    logits: float = 1.0,
    capacity: int | None = None,
    max_sequences: int | None = None,
    used: Sequence[int] | None = None,
    as_cu_seqlens: bool = False,
    frozen: str = "",
    **kwargs: Any,
) -> Sample:
    """One call.

    Args:
        name: the sample's.
        lengths_q: of the sequences.
        lengths_k: of their keys, where those are not the queries' own.
        dtype: of all floating tensors.
        device: of all tensors.
        grad: whether they require a gradient.
        heads: of q.
        kv_heads: of k and v, if fewer.
        dim: of q's and k's heads.
        value_dim: of v's, if another.
        arrange: puts q, k and v under other strides.
        bias: heads of the bias, and how much longer than the longest sequence it is.
        hidden: whether -inf in the bias hides a key from all queries, and all keys from a query.
        qk_norm: as the op's.
        norm: which parameters the norm has: of ``"w"``, ``"b"`` for one head's, ``"W"``, ``"B"`` for every head its own.
        logits: their standard deviation.
        capacity: as :meth:`PackedLayout.from_lengths` has it.
        max_sequences: the same.
        used: keys in use.
        as_cu_seqlens: give plain cumulative lengths instead of a layout.
        frozen: which of q, k and v need no gradient.
        kwargs: more options of the op.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device).detach().requires_grad_(grad)

    layout = PackedLayout.from_lengths(lengths_q, lengths_k, capacity=capacity, max_sequences=max_sequences)
    if used is not None:
        layout = PackedLayout.from_cu_seqlens(layout.cu_seqlens_q, layout.cu_seqlens_k, seqused_k=torch.tensor(used))
    kv_heads, value_dim = kv_heads or heads, value_dim or dim
    q, k = draw(layout.total_q, heads, dim, scale=logits), draw(layout.total_k, kv_heads, dim)
    tensors = arrange(q, k, draw(layout.total_k, kv_heads, value_dim))
    if as_cu_seqlens:
        kwargs |= {"cu_seqlens_q": layout.cu_seqlens_q.to(device), "cu_seqlens_k": layout.cu_seqlens_k.long().to(device)}
        kwargs |= {"max_seqlen_q": layout.max_seqlen_q, "max_seqlen_k": layout.max_seqlen_k}
    else:
        kwargs["layout"] = layout.to(device)
    if bias is not None:
        table = draw(bias[0], layout.max_seqlen_q + bias[1], layout.max_seqlen_k + bias[1])
        if hidden:
            table[..., 1] = table[:, 2] = -torch.inf
        kwargs["bias"] = leaf(table)
    for letter in norm:
        name_of = "weight" if letter in "wW" else "bias"
        for side, count in (("q", heads), ("k", kv_heads)):
            shape = (dim,) if letter in "wb" else (count, dim)
            kwargs[f"{side}_norm_{name_of}"] = leaf(draw(*shape, scale=0.3) + (name_of == "weight"))
    if qk_norm is not None:
        kwargs["qk_norm"] = qk_norm
    args = (leaf(t).requires_grad_(grad and side not in frozen) for side, t in zip("qkv", tensors, strict=True))
    return Sample(name, tuple(args), kwargs)


def _samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_sample, dtype=dtype, device=device, grad=grad)
    yield make("5+16+1+9", (5, 16, 1, 9))
    yield make("3+0+2, tiny", (3, 0, 2), heads=1, dim=4, return_lse=True)
    yield make(
        "2+3, tiny, with everything", (2, 3), heads=2, kv_heads=1, dim=3, value_dim=2, bias=(2, 0), qk_norm="layer", norm="wb", return_lse=True
    )
    yield make("0+1+63+64+65", (0, 1, 63, 64, 65), return_lse=True)
    yield make("no sequence", ())
    yield make("all empty", (0, 0, 0), return_lse=True)
    # The gradients of q and k are zero here: what is computed of them is the rounding of what cancels, see tests/ops/test_packed_attention.py.
    yield make("all of one token", (1,) * 20, frozen="qk")
    yield make("one long among many short", (2, 1, 3, 130, 1, 0, 2, 5) if small else (3, 1, 7, 2, 1024, 1, 0, 16, 5, 49, 2, 50), return_lse=True)
    # Seven heads on one, two on two: programs that share keys.
    yield make("grouped heads", (7, 20, 1), heads=6, kv_heads=2, dim=24, value_dim=20)
    yield make("all heads on one", (70, 3), heads=3, kv_heads=1, dim=8)
    yield make("cross", (1, 9, 0, 4), (17, 0, 5, 66), return_lse=True)
    yield make("pooling by one query", (1, 1, 1), (49, 7, 64), value_dim=24)
    yield make("some keys in use", (6, 9, 3), (10, 9, 8), used=(4, 9, 0), return_lse=True)
    yield make("capacity", (6, 0, 11), capacity=24, max_sequences=6, return_lse=True)
    yield make("plain cumulative lengths", (6, 0, 30), as_cu_seqlens=True)
    yield make("plain cumulative lengths, cross", (6, 0, 30), (2, 4, 8), as_cu_seqlens=True)
    yield make("bias", (9, 3, 20), bias=(2, 0))
    yield make("bias, one for all heads, with hidden keys", (9, 3, 20), bias=(1, 3), hidden=True, return_lse=True)
    yield make("rms", (9, 3, 20), qk_norm="rms", dim=20, norm="w")
    yield make("rms of every head, grouped", (9, 3, 20), qk_norm="rms", heads=4, kv_heads=2, norm="W")
    yield make("l2, scale 1", (9, 3, 20), qk_norm="l2", norm="W", scale=1.0)
    yield make("layer", (9, 3, 20), qk_norm="layer", dim=33, norm="wb")
    yield make("layer of every head, without weights", (9, 3, 70), qk_norm="layer")
    yield make("layer of every head", (9, 3, 20), qk_norm="layer", norm="WB")
    # Logits with a standard deviation of 50: one float32 for the logsumexp would leave more error than eager has, whose softmax of one key that
    # outweighs all others is exactly 1.
    yield make("large logits", (9, 3, 20), logits=50.0)
    yield make("one projection", (9, 3, 20), arrange=_of_one_projection)
    yield make("three projections", (9, 3, 20), value_dim=8, arrange=_of_three_projections)
    yield make("heads first", (9, 3, 20), arrange=_heads_first, qk_norm="rms")
    yield make("strided", (9, 3, 20), arrange=strided)
    yield make("expanded", (9, 3, 20), arrange=_expanded)
    for index, dim in enumerate((20, 33, 64, 128) if small else HEAD_DIMS):
        other = (None, 8, 64, 17)[index % 4]
        yield make(
            f"head dim {dim}{'' if other is None else f' and {other}'}",
            (17, 3),
            heads=1,
            dim=dim,
            value_dim=other,
            qk_norm="rms" if index % 3 else None,
        )
    if small:
        return
    yield make("1024+577+196", (1024, 577, 196), dim=64)
    yield make("1025+50+257+198, bias", (1025, 50, 257, 198), dim=32, bias=(2, 0))
    if long_in(dtype, device):
        yield make("4097", (4097,), heads=1, return_lse=True)
    yield make("many", tuple(itertools.islice(itertools.cycle((16, 7, 49, 50, 0, 1, 197)), 60)), dim=32, qk_norm="l2")


def _image_ids(rows: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """[R, S] from each row's (id, tokens)."""
    return torch.tensor([[image for image, tokens in row for _ in range(tokens)] for row in rows], dtype=torch.int64)


_ROWS = _image_ids([[(0, 9), (1, 3), (2, 8)], [(0, 17), (-1, 3)], [(-1, 20)], [(5, 1), (-1, 2), (2, 10), (-1, 7)]])


def _packed_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    def make(
        name: str, image_ids: Tensor | PackedLayout, shape: tuple[int, int], arrange: Callable[..., tuple[Tensor, ...]], **options: Any
    ) -> Sample:
        flat = _sample(name, (shape[0] * shape[1],), dtype=dtype, device=device, **options)
        del flat.kwargs["layout"]
        rows = arrange(*(t.detach().unflatten(0, shape) for t in flat.args))
        kwargs = {key: value.detach().requires_grad_(grad) if isinstance(value, Tensor) else value for key, value in flat.kwargs.items()}
        return Sample(name, (*(t.detach().requires_grad_(grad) for t in rows), image_ids.to(device)), kwargs)

    yield make("4x20", _ROWS, (4, 20), contiguous)
    yield make("1x5, tiny", _image_ids([[(1, 3), (0, 1), (-1, 1)]]), (1, 5), contiguous, heads=1, dim=4, return_lse=True)
    yield make("4x20 with a layout, one projection", PackedLayout.from_image_ids(_ROWS), (4, 20), _of_one_projection, return_lse=True)
    yield make("4x20, grouped heads, l2", _ROWS, (4, 20), contiguous, heads=4, kv_heads=2, qk_norm="l2", norm="W", scale=1.0)
    yield make("4x20, heads first", _ROWS, (4, 20), _heads_first, value_dim=24)
    yield make("padding alone", _ROWS[2:3], (1, 20), contiguous)
    yield make("0x20", _ROWS[:0], (0, 20), contiguous)
    yield make("4x0", _ROWS[:, :0], (4, 0), contiguous, return_lse=True)
    if not small:
        rows = _image_ids([[(0, 577), (1, 196), (-1, 251)], [(0, 64), (1, 900), (2, 60)]])
        yield make("2x1024", rows, (2, 1024), _of_one_projection, dim=64)


def _bad_inputs() -> Iterator[BadInput]:
    q, k, v = (torch.randn(9, 4, 8) for _ in range(3))
    layout = PackedLayout.from_lengths((4, 5))
    cu = layout.cu_seqlens_q

    def with_layout(name: str, exception: type[Exception], words: tuple[str, ...], q: Any = q, k: Any = k, v: Any = v, **kwargs: Any) -> BadInput:
        return BadInput.of(name, exception, words, q, k, v, layout, **kwargs)

    def with_lengths(name: str, exception: type[Exception], words: tuple[str, ...], values: Any, **kwargs: Any) -> BadInput:
        return BadInput.of(name, exception, words, q, k, v, cu_seqlens_q=torch.tensor(values, dtype=torch.int32), **kwargs)

    yield with_layout("q is a list", TypeError, ("q is a list", "[T_q, H, D]"), q=[1.0])
    yield with_layout("integer q", TypeError, ("q has dtype torch.int64", "floating"), q=q.long())
    yield with_layout("sparse v", TypeError, ("v has layout torch.sparse_coo", "dense"), v=v.to_sparse())
    yield with_layout("q of a padded batch", ValueError, ("q has shape [1, 9, 4, 8]", "[T_q, H, D]"), q=q[None])
    yield with_layout("k of another head_dim", ValueError, ("k has head_dim 7", "D = 8"), k=k[..., :7])
    yield with_layout("k of heads that do not divide", ValueError, ("k has 3 heads", "divide H = 4"), k=k[:, :3], v=v[:, :3])
    yield with_layout("v of other heads", ValueError, ("v has shape [9, 2, 8]", "[9, 4, D_v >= 1]"), v=v[:, :2])
    yield with_layout("v of other rows", ValueError, ("v has shape [8, 4, 8]", "[9, 4, D_v >= 1]"), v=v[:8])
    yield with_layout("v of another dtype", TypeError, ("v has dtype torch.float64", "torch.float32"), v=v.double())
    yield with_layout("v on another device", ValueError, ("v is on meta", "cpu"), v=v.to("meta"))
    yield with_layout("q of other rows than the layout", ValueError, ("q has 8 token rows", "9", "total_q"), q=q[:8])
    yield with_layout("k of other rows than the layout", ValueError, ("k has 8 token rows", "9", "total_k"), k=k[:8], v=v[:8])
    yield with_layout("dropout_p above 1", ValueError, ("dropout_p is 1.5", "[0, 1]"), dropout_p=1.5)
    yield with_layout("unknown qk_norm", ValueError, ("qk_norm is 'batch'", "'rms'", "'layer'"), qk_norm="batch")
    yield with_layout("norm weight without a norm", ValueError, ("q_norm_weight is given", "qk_norm is None"), q_norm_weight=torch.ones(8))
    yield with_layout(
        "norm weight too long", ValueError, ("k_norm_weight has shape [9]", "[8]", "[4, 8]"), qk_norm="rms", k_norm_weight=torch.ones(9)
    )
    yield with_layout("integer norm bias", TypeError, ("q_norm_bias has dtype torch.int64",), qk_norm="layer", q_norm_bias=torch.ones(8).long())
    yield with_layout("bias of two dimensions", ValueError, ("bias has shape [5, 5]", "[H or 1, M_q, M_k]"), bias=torch.ones(5, 5))
    yield with_layout("bias of other heads", ValueError, ("bias has shape [2, 5, 5]", "H = 4"), bias=torch.ones(2, 5, 5))
    yield with_layout("bias too short", ValueError, ("bias has shape [4, 4, 5]", ">= 5"), bias=torch.ones(4, 4, 5))
    yield with_layout("layout and cu_seqlens", TypeError, ("both layout and cu_seqlens",), cu_seqlens_q=cu)
    yield BadInput.of("neither layout nor cu_seqlens", TypeError, ("neither layout nor cu_seqlens_q",), q, k, v)
    yield BadInput.of("cu_seqlens for a layout", TypeError, ("layout is a Tensor", "PackedLayout", "cu_seqlens_q="), q, k, v, cu)
    yield BadInput.of("layout on another device", ValueError, ("layout is on meta", "cpu"), q, k, v, layout.to("meta"))
    yield with_lengths("not from 0", ValueError, ("cu_seqlens_q starts at 1", "start at 0"), [1, 9])
    yield with_lengths("decreasing", ValueError, ("cu_seqlens_q falls from 6 to 5", "not decrease"), [0, 6, 5, 9])
    yield with_lengths("not to the end", ValueError, ("cu_seqlens_q ends at 8", "9"), [0, 4, 8])
    yield with_lengths("beyond the end", ValueError, ("cu_seqlens_q ends at 10", "9"), [0, 4, 10])
    yield with_lengths("nothing at all", ValueError, ("cu_seqlens_q has shape [0]", "[S + 1]"), [])
    yield with_lengths("two-dimensional", ValueError, ("cu_seqlens_q has shape [1, 2]", "[S + 1]"), [[0, 9]])
    yield with_lengths("cu_seqlens_k of other length", ValueError, ("cu_seqlens_k has shape [2]", "[3]"), [0, 4, 9], cu_seqlens_k=cu[:2] * 9 // 4)
    yield with_lengths("max_seqlen_q too small", ValueError, ("max_seqlen_q is 4", "at least 5"), [0, 4, 9], max_seqlen_q=4)
    yield with_lengths("more keys in use than there are", ValueError, ("seqused_k[1] is 6", "5"), [0, 4, 9], seqused_k=torch.tensor([4, 6]))
    yield BadInput.of("floating cu_seqlens", TypeError, ("cu_seqlens_q has dtype torch.float32", "int32"), q, k, v, cu_seqlens_q=cu.float())
    yield BadInput.of("cu_seqlens is a list", TypeError, ("cu_seqlens_q is a list",), q, k, v, cu_seqlens_q=[0, 9])
    yield BadInput.of("cu_seqlens on another device", ValueError, ("cu_seqlens_q is on meta", "cpu"), q, k, v, cu_seqlens_q=cu.to("meta"))
    yield BadInput.of("no cu_seqlens_k for other keys", ValueError, ("k has 8 token rows", "cu_seqlens_k"), q, k[:8], v[:8], cu_seqlens_q=cu)


def _packed_bad_inputs() -> Iterator[BadInput]:
    q, k, v = (torch.randn(2, 6, 4, 8) for _ in range(3))
    ids = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2]])

    def bad(
        name: str, exception: type[Exception], words: tuple[str, ...], q: Any = q, k: Any = k, v: Any = v, ids: Any = ids, **kwargs: Any
    ) -> BadInput:
        return BadInput.of(name, exception, words, q, k, v, ids, **kwargs)

    yield bad("q of flat tokens", ValueError, ("q has shape [6, 4, 8]", "[R, S, H, D]"), q=q[0])
    yield bad("k of another S", ValueError, ("k has shape [2, 5, 4, 8]", "[2, 6, 4, 8]"), k=k[:, :5])
    yield bad("v of another R", ValueError, ("v has shape [1, 6, 4, 8]", "[2, 6, 4, 8]"), v=v[:1])
    yield bad("image_ids of another S", ValueError, ("image_ids has shape [2, 5]", "[2, 6]"), ids=ids[:, :5])
    yield bad("image_ids is a list", TypeError, ("image_ids is a list",), ids=ids.tolist())
    yield bad("floating image_ids", TypeError, ("image_ids has dtype torch.float32", "integer"), ids=ids.float())
    yield bad("a mask for image_ids", TypeError, ("image_ids has dtype torch.bool", "integer"), ids=ids > 0)
    yield bad("image_ids on another device", ValueError, ("image_ids is on meta", "cpu"), ids=ids.to("meta"))
    yield bad(
        "an image in two pieces",
        ValueError,
        ("image_ids of row 1", "image 1 in 2 pieces", "neighbours"),
        ids=torch.tensor([[0] * 6, [0, 1, 1, 2, 2, 1]]),
    )
    yield bad("a layout of other rows", ValueError, ("q has 12 token rows", "9"), ids=PackedLayout.from_lengths((4, 5)))
    yield bad("dropout_p above 1", ValueError, ("dropout_p is 1.5", "[0, 1]"), dropout_p=1.5)


def _saved(sample: Sample) -> int:
    """The output and the logsumexp; what is converted for the kernels (a bias in another dtype, the norms' weights, tokens of a padded batch whose
    rows are not one dimension in memory); the layout's small integers, and on a GPU its list of tiles.
    """
    named = dict(sample.kwargs)
    q, k, v = sample.args[:3]
    heads, dim = q.shape[-2:]
    rows = q.shape[:-2].numel()
    wide = 8 if q.dtype is torch.float64 else 4
    layout = named.get("layout", sample.args[3] if len(sample.args) > 3 else None)
    sequences = layout.sequences if isinstance(layout, PackedLayout) else rows if layout is not None else named["cu_seqlens_q"].shape[0]
    bias = named.get("bias")
    return (
        rows * heads * v.shape[-1] * q.element_size()
        + rows * heads * 8
        + (0 if bias is None or bias.element_size() == wide else bias.numel() * wide)
        + 4 * heads * dim * wide
        + sum(t.nbytes for t in sample.args[:3] if t.dim() == 4 and t.flatten(0, 1).data_ptr() != t.data_ptr())
        + 3 * 4 * (sequences + 1)
        + 8
        + (sum(4 * (2 * n + -(-n // TILE)) for n in (rows, k.shape[:-2].numel())) if q.is_cuda else 0)
    )


# The contenders of the figures: what people write today. All take the op's arguments; the shapes timed have no options.


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention on [B, S, H, D]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).transpose(1, 2)


@functools.lru_cache(maxsize=4)
def _dense_mask(segments: tuple[tuple[int, int, int, int], ...], rows: int, device: str) -> Tensor:
    """[R, 1, S, S], True where a token sees another of its row. Built once per batch, as a layout is."""
    image = torch.cat([torch.full((end - begin,), i if keys > k else -1) for i, (begin, end, k, keys) in enumerate(segments)]).view(rows, -1)
    image = image.to(device)  # here: the mask of 65536 tokens takes a CPU ten seconds
    return (image[:, None, :, None] == image[:, None, None, :]) & (image >= 0)[:, None, None, :]


def _packed_with_dense_mask(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    mask = _dense_mask(layout.segments, q.shape[0], str(q.device))
    return _sdpa(q, k, v, mask)


def _with_dense_mask(q: Tensor, k: Tensor, v: Tensor, *, layout: PackedLayout) -> Tensor:
    return _packed_with_dense_mask(q[None], k[None], v[None], layout)[0]


def _per_image(q: Tensor, k: Tensor, v: Tensor, *, layout: PackedLayout) -> Tensor:
    def attend(q_begin: int, q_end: int, k_begin: int, k_end: int) -> Tensor:
        if k_begin == k_end:
            return v.new_zeros((q_end - q_begin, q.shape[1], v.shape[2]))
        return _sdpa(q[None, q_begin:q_end], k[None, k_begin:k_end], v[None, k_begin:k_end])[0]

    return torch.cat([attend(*segment) for segment in layout.segments])


def _packed_per_image(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    return _per_image(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout=layout).unflatten(0, q.shape[:2])


def _padded_to_the_longest(q: Tensor, k: Tensor, v: Tensor, *, layout: PackedLayout) -> Tensor:
    lengths = [end - begin for begin, end, _, _ in layout.segments]
    q, k, v = (torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True) for t in (q, k, v))
    valid = torch.arange(max(lengths), device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    out = _sdpa(q, k, v, valid[:, None, None])
    return torch.cat([image[:length] for image, length in zip(out, lengths, strict=True)])


def _even(first: int, last: int, count: int) -> tuple[int, ...]:
    """So many lengths from the first to the last in even steps."""
    return tuple(first + (last - first) * i // (count - 1) for i in range(count))


def _case(name: str, lengths: tuple[int, ...], heads: int = 12, dim: int = 64) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        return _sample("bench", lengths, dtype=dtype, device=device, heads=heads, dim=dim, arrange=_of_one_projection)

    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    return BenchCase(name=name, make=make, flops=4 * heads * dim * pairs, elements_moved=4 * heads * dim * tokens)


def _packed_case(name: str, rows: tuple[tuple[int, ...], ...], heads: int = 12, dim: int = 64) -> BenchCase:
    length = max(map(sum, rows))
    ids = _image_ids([[*enumerate(row), (-1, length - sum(row))] for row in rows])

    def make(dtype: torch.dtype, device: str) -> Sample:
        flat = _case(name, (len(rows) * length,), heads, dim).make(dtype, device)
        layout = PackedLayout.from_image_ids(ids).to(device)
        return Sample("bench", (*(t.unflatten(0, (len(rows), length)) for t in flat.args), layout))

    pairs = sum(n * n for row in rows for n in row)
    return BenchCase(name=name, make=make, flops=4 * heads * dim * pairs, elements_moved=4 * heads * dim * len(rows) * length)


_MIX_A, _MIX_B, _LARGE = (64, 100, 196, 284, 380), (64, 100, 144, 196, 256, 300, 412, 576), (576, 700, 820, 976, 1024)
_BATCH = ((64, 100, 144, 196, 256, 264), (380, 284, 196, 100, 64), (576, 256, 100, 92), (196, 196, 196, 196, 196, 44))


SPECS = (
    OpSpec(
        name="varlen_attention",
        family="packed",
        function=op.varlen_attention,
        reference=backends.backend("reference")(op.varlen_attention),
        summary="attention within packed sequences of any lengths (NaViT, arXiv 2307.06304)",
        samples=_samples,
        bad_inputs=_bad_inputs,
        bench_cases=(
            _case("small64 16x64", (64,) * 16),
            _case("mixA 5 images L1024", _MIX_A),
            _case("mixB 8 images L2048", _MIX_B),
            _case("large 5 images L4096", _LARGE),
            _case("batch4 22 images", tuple(itertools.chain(*_BATCH))),
        ),
        gpu_cases=(
            _case("mixB 8 images L2048", _MIX_B),
            _case("small64 512x64", (64,) * 512),
            _case("mixB 128 images L32768", _MIX_B * 16),
            _case("large 80 images L65536", _LARGE * 16),
        ),
        saved_bytes=_saved,
        peers={"SDPA, dense mask": _with_dense_mask, "SDPA per image": _per_image, "SDPA padded to the longest": _padded_to_the_longest},
        otherwise=("SDPA, dense mask", "SDPA padded to the longest"),
        kept_by_autocast=_AUTOCAST_KEEPS,
        tiles_span_images=("triton",),
    ),
    OpSpec(
        name="packed_attention",
        family="packed",
        function=op.packed_attention,
        reference=backends.backend("reference")(op.packed_attention),
        summary="the same on rows of several images and padding (NaViT, arXiv 2307.06304)",
        samples=_packed_samples,
        bad_inputs=_packed_bad_inputs,
        bench_cases=(_packed_case("small64 1x1024", ((64,) * 16,)), _packed_case("mixB 1x2048", (_MIX_B,)), _packed_case("batch4 4x1024", _BATCH)),
        gpu_cases=(_packed_case("mixB 1x2048", (_MIX_B,)), _packed_case("batch64 64x1024", _BATCH * 16)),
        saved_bytes=_saved,
        peers={"SDPA, dense mask": _packed_with_dense_mask, "SDPA per image": _packed_per_image},
        otherwise=("SDPA, dense mask",),
        kept_by_autocast=_AUTOCAST_KEEPS,
        tiles_span_images=("triton",),
        schema="varlen_attention",
    ),
)
