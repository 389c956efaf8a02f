"""Attention over packed sequences beyond the contract: how a layout is built and refused, masks written out, memory, compilation, dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels import backends, ops
from vitkernels.ops import PackedLayout
from vitkernels.ops.packed import reference

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            backends.why_not("varlen_attention", name, torch.device("cpu"), torch.float64) is not None, reason=f"{name} cannot run here"
        ),
    )
    for name in ("reference", "native")
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with vitkernels.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def same(a: PackedLayout, b: PackedLayout) -> None:
    assert a.segments == b.segments
    assert (a.total_q, a.total_k, a.max_seqlen_q, a.max_seqlen_k) == (b.total_q, b.total_k, b.max_seqlen_q, b.max_seqlen_k)
    assert a.cu_seqlens_q.dtype is b.cu_seqlens_q.dtype is torch.int32


def tokens(rows: int, *heads_and_dims: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(rows, heads, dim, dtype=dtype, requires_grad=True) for heads, dim in heads_and_dims]


# --- layouts --------------------------------------------------------------------------------------------------------------------------


def test_lengths_of_any_kind_make_one_layout() -> None:
    made = PackedLayout.from_lengths([3, 0, 5])
    assert made.cu_seqlens_q.tolist() == [0, 3, 3, 8]
    assert made.cu_seqlens_k is made.cu_seqlens_q
    assert (made.sequences, made.total_q, made.total_k, made.max_seqlen_q, made.max_seqlen_k) == (3, 8, 8, 5, 5)
    assert made.seqused_k is None
    assert made.segments == ((0, 3, 0, 3), (3, 3, 3, 3), (3, 8, 3, 8))
    for other in ((3, 0, 5), np.array([3, 0, 5], np.int16), torch.tensor([3, 0, 5]), np.array([3, 0, 5], np.uint64)):
        same(PackedLayout.from_lengths(other), made)
    for lengths in (torch.tensor([0, 3, 3, 8]), torch.tensor([0, 3, 3, 8], dtype=torch.int32)):
        same(PackedLayout.from_cu_seqlens(lengths), made)
    same(PackedLayout.from_image_ids(torch.tensor([7, 7, 7, 2, 2, 2, 2, 2])), PackedLayout.from_lengths([3, 5]))


def test_no_sequence_and_empty_ones() -> None:
    nothing = PackedLayout.from_lengths([])
    assert (nothing.sequences, nothing.total_q, nothing.max_seqlen_q, nothing.segments) == (0, 0, 0, ())
    empty = PackedLayout.from_lengths([0, 0])
    assert (empty.sequences, empty.total_q, empty.segments) == (2, 0, ((0, 0, 0, 0),) * 2)


def test_capacity_and_max_sequences_leave_room() -> None:
    made = PackedLayout.from_lengths([3, 5], capacity=12, max_sequences=4)
    assert made.cu_seqlens_q.tolist() == [0, 3, 8, 8, 8]
    assert (made.sequences, made.total_q, made.total_k, made.max_seqlen_q) == (4, 12, 12, 5)


def test_cross_layouts() -> None:
    made = PackedLayout.from_lengths([2, 0], [4, 3])
    assert made.segments == ((0, 2, 0, 4), (2, 2, 4, 7))
    assert (made.total_q, made.total_k, made.max_seqlen_q, made.max_seqlen_k) == (2, 7, 2, 4)
    pooling = made.cross(3)
    assert pooling.segments == ((0, 3, 0, 4), (3, 6, 4, 7))
    assert (pooling.total_q, pooling.max_seqlen_q, pooling.total_k) == (6, 3, 7)
    used = PackedLayout.from_cu_seqlens(made.cu_seqlens_q, made.cu_seqlens_k, seqused_k=torch.tensor([1, 0]))
    assert used.segments == ((0, 2, 0, 1), (2, 2, 4, 4))
    assert used.cross(1).segments == ((0, 1, 0, 1), (1, 2, 4, 4))


def test_image_ids_by_row() -> None:
    """Runs of one id; ids of another row are another image; padding is a run that no one sees."""
    made = PackedLayout.from_image_ids(torch.tensor([[4, 4, 1, -1], [1, 1, -1, -1], [-1, -1, -1, 4]]))
    assert made.segments == ((0, 2, 0, 2), (2, 3, 2, 3), (3, 4, 3, 3), (4, 6, 4, 6), (6, 8, 6, 6), (8, 11, 8, 8), (11, 12, 11, 12))
    assert (made.total_q, made.max_seqlen_q) == (12, 3)


def test_a_layout_is_not_changed_and_moves_whole() -> None:
    made = PackedLayout.from_lengths([2, 1], [4, 3])
    with pytest.raises(FrozenInstanceError):
        made.total_q = 4  # type: ignore[misc]
    moved = made.to("meta")
    assert moved.cu_seqlens_q.is_meta
    assert moved.cu_seqlens_k.is_meta
    assert (moved.total_q, moved.max_seqlen_k) == (3, 4)


def cu(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_LAYOUTS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "negative length": (lambda: PackedLayout.from_lengths([3, -1]), ValueError, ("lengths_q[1] is -1", "negative")),
    "fractional lengths": (lambda: PackedLayout.from_lengths([3.0, 1.0]), TypeError, ("lengths_q has dtype float64", "integers")),
    "lengths in two dimensions": (lambda: PackedLayout.from_lengths(np.ones((2, 2), int)), ValueError, ("lengths_q has shape [2, 2]", "[S]")),
    "lengths elsewhere": (lambda: PackedLayout.from_lengths(cu(1).to("meta")), TypeError, ("lengths_q is on meta", "CPU")),
    "other number of keys": (lambda: PackedLayout.from_lengths([3, 1], [2]), ValueError, ("lengths_k holds 1", "must hold 2")),
    "capacity too small": (lambda: PackedLayout.from_lengths([3, 4], capacity=6), ValueError, ("capacity is 6", "at least 7", "lengths_q")),
    "capacity too small for keys": (lambda: PackedLayout.from_lengths([3], [9], capacity=6), ValueError, ("at least 9", "lengths_k")),
    "max_sequences too small": (lambda: PackedLayout.from_lengths([3, 4], max_sequences=1), ValueError, ("max_sequences is 1", "at least 2")),
    "more rows than 32 bits count": (lambda: PackedLayout.from_lengths([2**31]), ValueError, ("lengths_q sums to 2147483648", "2**31")),
    "cu_seqlens not from 0": (lambda: PackedLayout.from_cu_seqlens(cu(1, 4)), ValueError, ("cu_seqlens_q starts at 1", "start at 0")),
    "cu_seqlens decreasing": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4, 3)), ValueError, ("cu_seqlens_q falls from 4 to 3 at 2",)),
    "cu_seqlens of keys decreasing": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), cu(0, -1)), ValueError, ("cu_seqlens_k falls from 0 to -1",)),
    "cu_seqlens beyond the rows": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), total_q=3), ValueError, ("cu_seqlens_q ends at 4", "total_q = 3")),
    "cu_seqlens empty": (lambda: PackedLayout.from_cu_seqlens(cu()), ValueError, ("cu_seqlens_q has shape [0]", "[S + 1]")),
    "cu_seqlens floating": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4).float()), TypeError, ("cu_seqlens_q has dtype torch.float32", "int32")),
    "cu_seqlens a list": (lambda: PackedLayout.from_cu_seqlens([0, 4]), TypeError, ("cu_seqlens_q is a list", "[S + 1]")),
    "cu_seqlens of other lengths": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), cu(0, 1, 2)), ValueError, ("cu_seqlens_k has shape [3]", "[2]")),
    "cu_seqlens elsewhere": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), cu(0, 4).to("meta")), ValueError, ("cu_seqlens_k is on meta", "cpu")),
    "max_seqlen too small": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), max_seqlen_k=3), ValueError, ("max_seqlen_k is 3", "at least 4")),
    "too many keys in use": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), seqused_k=cu(5)), ValueError, ("seqused_k[0] is 5", "between 0 and 4")),
    "negative keys in use": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), seqused_k=cu(-1)), ValueError, ("seqused_k[0] is -1",)),
    "floating keys in use": (lambda: PackedLayout.from_cu_seqlens(cu(0, 4), seqused_k=cu(1).float()), TypeError, ("seqused_k has dtype",)),
    "keys in use of other length": (
        lambda: PackedLayout.from_cu_seqlens(cu(0, 4), seqused_k=cu(1, 2)),
        ValueError,
        ("seqused_k has shape [2]", "[1]"),
    ),
    "floating image_ids": (lambda: PackedLayout.from_image_ids(torch.zeros(2, 3)), TypeError, ("image_ids has dtype torch.float32", "integer")),
    "a mask for image_ids": (lambda: PackedLayout.from_image_ids(torch.ones(3) > 0), TypeError, ("image_ids has dtype torch.bool", "integer")),
    "image_ids is a list": (lambda: PackedLayout.from_image_ids([[0, 1]]), TypeError, ("image_ids is a list", "[R, S]")),
    "image_ids in three dimensions": (
        lambda: PackedLayout.from_image_ids(cu(0)[None, None]),
        ValueError,
        ("image_ids has shape [1, 1, 1]", "[R, S]"),
    ),
    "an image in two pieces": (
        lambda: PackedLayout.from_image_ids(torch.tensor([[0, 0, 1], [5, 2, 5]])),
        ValueError,
        ("image_ids of row 1", "image 5 in 2 pieces", "neighbours"),
    ),
    "negative queries": (lambda: PackedLayout.from_lengths([3]).cross(-1), ValueError, ("queries is -1", "negative")),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_a_bad_layout_is_refused_in_words(name: str) -> None:
    make, exception, words = BAD_LAYOUTS[name]
    with pytest.raises(exception) as caught:
        make()
    message = str(caught.value)
    assert type(caught.value) is exception
    assert message.startswith("PackedLayout: ")
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# --- against a mask written out -------------------------------------------------------------------------------------------------------


def mask_of(layout: PackedLayout) -> Tensor:
    mask = torch.zeros(layout.total_q, layout.total_k, dtype=torch.bool)
    for q_begin, q_end, k_begin, k_end in layout.segments:
        mask[q_begin:q_end, k_begin:k_end] = True
    return mask


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's own attention with the dense mask that the op never builds: an oracle that shares no code with it."""
    heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


LAYOUTS = {
    "self": PackedLayout.from_lengths([5, 70, 1, 0, 33]),
    "cross": PackedLayout.from_lengths([3, 40, 0, 2], [60, 7, 9, 0]),
    "room": PackedLayout.from_lengths([9, 20], capacity=40, max_sequences=5),
    "some keys": PackedLayout.from_cu_seqlens(cu(0, 9, 20), cu(0, 30, 50), seqused_k=cu(21, 0)),
    "pooling": PackedLayout.from_lengths([64, 3, 0]).cross(2),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_sdpa_with_a_dense_mask(backend: str, name: str, kv_heads: int) -> None:
    layout = LAYOUTS[name]
    (q,) = tokens(layout.total_q, (4, 24))
    k, v = tokens(layout.total_k, (kv_heads, 24), (kv_heads, 20))
    out = ops.varlen_attention(q, k, v, layout)
    expected = masked_sdpa(q, k, v, mask_of(layout))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["rms", "l2", "layer"])
def test_norms_are_those_of_the_models(backend: str, kind: str) -> None:
    """F.rms_norm, vit_pytorch's RMSNorm with a gamma for each head and scale 1, F.layer_norm."""
    layout = LAYOUTS["self"]
    q, k, v = tokens(layout.total_q, *[(3, 16)] * 3)
    gammas = [torch.randn(3, 16, dtype=torch.float64) for _ in range(2)]
    shared = [torch.randn(16, dtype=torch.float64) for _ in range(4)]
    if kind == "l2":
        normed = [F.normalize(t, dim=-1) * 16**0.5 * gamma for t, gamma in zip((q, k), gammas, strict=True)]
        options = {"q_norm_weight": gammas[0], "k_norm_weight": gammas[1], "scale": 1.0}
    elif kind == "rms":
        normed = [F.rms_norm(t, (16,), weight, 1e-6) for t, weight in zip((q, k), shared, strict=False)]
        options = {"q_norm_weight": shared[0], "k_norm_weight": shared[1]}
    else:
        normed = [F.layer_norm(t, (16,), weight, bias, 1e-5) for t, weight, bias in ((q, *shared[:2]), (k, *shared[2:]))]
        options = dict(zip(("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias"), shared, strict=True))
    out = ops.varlen_attention(q, k, v, layout, qk_norm=kind, **options)
    torch.testing.assert_close(out, masked_sdpa(*normed, v, mask_of(layout), scale=options.get("scale")))


def test_bias_goes_by_the_position_in_the_sequence(backend: str) -> None:
    layout = PackedLayout.from_lengths([4, 9, 2])
    q, k, v = tokens(layout.total_q, *[(2, 8)] * 3)
    table = torch.randn(2, 12, 11, dtype=torch.float64, requires_grad=True)
    out = ops.varlen_attention(q, k, v, layout, bias=table)
    dense = torch.full((2, 15, 15), -torch.inf, dtype=torch.float64)
    for begin, end, _, _ in layout.segments:
        dense = dense.clone()
        dense[:, begin:end, begin:end] = table[:, : end - begin, : end - begin]
    expected = masked_sdpa(q, k, v, dense)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), table)[0] for x in (out, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours[:, 9:].count_nonzero() == 0, "the part of the table that no sequence reaches has a gradient"


def test_logsumexp_and_what_sees_nothing(backend: str) -> None:
    layout = LAYOUTS["some keys"]
    (q,) = tokens(layout.total_q, (2, 8))
    k, v = tokens(layout.total_k, (2, 8), (2, 5))
    out, lse = ops.varlen_attention(q, k, v, layout, return_lse=True)
    logits = torch.einsum("nhd,mhd->hnm", q, k) * 8**-0.5
    torch.testing.assert_close(lse, logits.masked_fill(~mask_of(layout), -torch.inf).logsumexp(-1))
    assert lse[:, 9:].isneginf().all()
    assert out[9:].count_nonzero() == 0
    (out.sum() + lse[:, :9].sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))
    assert q.grad is not None and q.grad[9:].count_nonzero() == 0
    assert k.grad is not None and k.grad[21:].count_nonzero() == 0


def test_cumulative_lengths_as_flash_attention_has_them(backend: str) -> None:
    q, k, v = tokens(9, *[(2, 8)] * 3)
    expected = ops.varlen_attention(q, k, v, PackedLayout.from_lengths([4, 5]))
    for dtype in (torch.int32, torch.int64):
        lengths = cu(0, 4, 9).to(dtype)
        got = ops.varlen_attention(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=5, max_seqlen_k=5)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_token_alone_has_no_gradient_but_rounding(backend: str, dtype: torch.dtype) -> None:
    """A softmax of one logit is 1 whatever the logit is: dS = dO v - dO out, and both products are the same sum of D_v terms.

    Each of its terms may be off by one rounding step of the output and its sum by half a step of the accumulator a term.
    """
    if backends.why_not("varlen_attention", backend, torch.device("cpu"), dtype) is not None:
        pytest.skip(f"{backend} has no {dtype}")
    q, k, v = (torch.randn(40, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    out = ops.varlen_attention(q, k, v, PackedLayout.from_lengths([1] * 40))
    torch.testing.assert_close(out, v, rtol=0, atol=0)
    grad = torch.randn_like(out)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(grad_v, grad, rtol=0, atol=0)
    terms = (grad * v).double().abs().sum(-1, keepdim=True)
    rounding = terms * (torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * 16**-0.5
    assert bool((grad_q.double().abs() <= rounding * k.double().abs()).all())
    assert bool((grad_k.double().abs() <= rounding * q.double().abs()).all())


# --- rows of several images -----------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[0, 0, 0, 1, 1, -1], [3, 3, 3, 3, 3, 3], [-1, -1, 2, 2, -1, -1]])


@pytest.mark.parametrize("of_layout", [False, True], ids=["ids", "layout"])
def test_packed_rows_equal_a_dense_mask_and_padding_is_nothing(backend: str, of_layout: bool) -> None:
    q, k, v = (torch.randn(3, 6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = ops.packed_attention(q, k, v, PackedLayout.from_image_ids(IDS) if of_layout else IDS)
    mask = ((IDS[:, :, None] == IDS[:, None, :]) & (IDS >= 0)[:, None, :])[:, None]
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert out[IDS < 0].count_nonzero() == 0
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(g[IDS < 0].count_nonzero() == 0 and g[IDS >= 0].count_nonzero() for g in grads)


def test_what_lies_in_the_padding_reaches_nobody(backend: str) -> None:
    """Padding is often memory that nobody wrote."""
    clean = [torch.randn(3, 6, 2, 8, dtype=torch.float64) for _ in range(3)]
    dirty = [t.masked_fill((IDS < 0)[..., None, None], torch.nan).requires_grad_() for t in clean]
    out = ops.packed_attention(*dirty, IDS)
    torch.testing.assert_close(out, ops.packed_attention(*clean, IDS), rtol=0, atol=0)
    for grad in torch.autograd.grad(out.sum(), dirty):
        assert grad.isfinite().all()
    layout = PackedLayout.from_lengths([3, 4], capacity=12)
    clean = [torch.randn(12, 2, 8, dtype=torch.float64) for _ in range(3)]
    dirty = [torch.cat((t[:7], torch.full_like(t[7:], torch.nan))) for t in clean]
    torch.testing.assert_close(ops.varlen_attention(*dirty, layout), ops.varlen_attention(*clean, layout), rtol=0, atol=0)


# --- memory ---------------------------------------------------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(
    backends.why_not("varlen_attention", "native", torch.device("cpu"), torch.float32) is not None, reason="native cannot run here"
)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any op returns, and the ops' names."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # A change of dtype stays on the device; a copy to another one waits.
        self.names.add("copy between devices" if name == "_to_copy" and (kwargs or {}).get("device") is not None else name)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


@needs_native
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}, {"qk_norm": "rms"}, {"return_lse": True}], ids=str)
def test_nothing_is_as_large_as_a_mask_and_nothing_waits(options: dict[str, Any]) -> None:
    """No tensor above T x H x D in forward or backward, and no value of one is read by the host."""
    layout = PackedLayout.from_lengths([300, 500, 1, 200])
    q, k, v = tokens(1001, *[(2, 16)] * 3, dtype=torch.float32)
    with vitkernels.backend("native"), Largest() as seen:
        out = ops.varlen_attention(q, k, v, layout, **options)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert seen.numel <= 1001 * 2 * 16
    assert "varlen_attention_backward" in seen.names
    assert not seen.names & {"_local_scalar_dense", "item", "copy between devices", "is_nonzero", "equal"}


@needs_native
def test_saved_bytes_grow_with_the_tokens_alone() -> None:
    """Beside q, k, v: the output and one float64 for each query and head, whatever the lengths are, with dropout and norms, too."""

    def saved(lengths: list[int], **options: Any) -> int:
        layout = PackedLayout.from_lengths(lengths)
        q, k, v = tokens(sum(lengths), *[(4, 32)] * 3, dtype=torch.bfloat16)
        given = {t.untyped_storage().data_ptr() for t in (q, k, v, layout.cu_seqlens_q)}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with vitkernels.backend("native"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ops.varlen_attention(q, k, v, layout, **options)
        assert out.grad_fn is not None
        return sum(size for pointer, size in kept.items() if pointer not in given)

    def of(rows: int) -> int:
        return rows * 4 * (32 * 2 + 8)

    assert saved([1024]) == saved([512, 512]) == saved([1] * 1024) == of(1024)
    assert saved([4096]) == of(4096)
    assert saved([1024], qk_norm="rms") == of(1024)
    assert saved([1024], dropout_p=0.1) == of(1024) + 8, "with dropout, the seed"


# --- compilation ----------------------------------------------------------------------------------------------------------------------


@needs_native
def test_twenty_batches_of_one_capacity_compile_once() -> None:
    torch._dynamo.reset()
    generator = np.random.default_rng(0)
    counter = CompileCounter()
    function = torch.compile(lambda q, k, v, layout: ops.varlen_attention(q, k, v, layout, qk_norm="rms"), fullgraph=True, backend=counter)
    with vitkernels.backend("native"):
        for batch in range(20):
            lengths = generator.integers(0, 40, generator.integers(1, 13))
            layout = PackedLayout.from_lengths(lengths, capacity=500, max_sequences=12)
            q, k, v = tokens(500, *[(2, 16)] * 3, dtype=torch.float32)
            with torch._dynamo.config.patch(error_on_recompile=batch > 0):
                out = function(q, k, v, layout)
            expected = ops.varlen_attention(q, k, v, layout, qk_norm="rms")
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
            grad = torch.randn_like(out)
            for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert counter.frame_count == 1


@needs_native
def test_twenty_batches_of_image_ids_compile_once() -> None:
    """The layout is built inside the graph, without a look at the ids."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    counter = CompileCounter()
    function = torch.compile(lambda q, k, v, ids: ops.packed_attention(q, k, v, ids), fullgraph=True, backend=counter)
    with vitkernels.backend("native"):
        for batch in range(20):
            ids = torch.randint(-1, 6, (3, 50), generator=generator).sort(dim=1, descending=True).values
            q, k, v = (torch.randn(3, 50, 2, 8) for _ in range(3))
            with torch._dynamo.config.patch(error_on_recompile=batch > 0):
                out = function(q, k, v, ids)
            torch.testing.assert_close(out, ops.packed_attention(q, k, v, ids), rtol=0, atol=0)
    assert counter.frame_count == 1


# --- dropout --------------------------------------------------------------------------------------------------------------------------


def weights_kept(layout: PackedLayout, heads: int, dropout_p: float) -> Tensor:
    """What one call's dropout keeps, [H, T_q, T_k]. Of equal logits and values that are rows of the identity, the output is the mask itself."""
    total = layout.total_k
    q, k = torch.zeros(layout.total_q, heads, 4), torch.zeros(total, heads, 4)
    out = ops.varlen_attention(q, k, torch.eye(total)[:, None].expand(total, heads, total), layout, dropout_p=dropout_p)
    kept = torch.zeros(heads, layout.total_q, total, dtype=torch.bool)
    for q_begin, q_end, k_begin, k_end in layout.segments:
        weights = out[q_begin:q_end, :, k_begin:k_end] * ((k_end - k_begin) * (1 - dropout_p))  # 0 or 1
        torch.testing.assert_close(weights, weights.round(), rtol=0, atol=1e-3)
        kept[:, q_begin:q_end, k_begin:k_end] = weights.round().bool().transpose(0, 1)
    return kept


def test_philox_is_the_published_one() -> None:
    """The known answers of Random123 (kat_vectors, philox4x32 with 10 rounds)."""

    def words(seed: int, counter: tuple[int, ...]) -> list[str]:
        found = reference._philox(torch.tensor(seed), [torch.tensor([c]) for c in counter])
        return [f"{int(w):08x}" for w in found]

    assert words(0, (0, 0, 0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(0x299F31D0A4093822 - 2**64 if 0x299F31D0A4093822 >= 2**63 else 0x299F31D0A4093822, pi) == [
        "d16cfe09",
        "94fdcceb",
        "5001e420",
        "24126ea1",
    ]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_mask_is_the_references_and_has_the_right_rate(backend: str, dropout_p: float) -> None:
    layout = PackedLayout.from_lengths([65, 130, 1, 0, 40])
    torch.manual_seed(5)
    kept = weights_kept(layout, 3, dropout_p)
    torch.manual_seed(5)
    seed = torch.randint(2**62, ())
    rows = torch.arange(layout.total_q)
    expected = reference.keep_mask(seed, 3, rows, rows, dropout_p) & mask_of(layout)
    assert torch.equal(kept, expected)
    visible = int(mask_of(layout).sum())
    for head in kept:
        # Five standard deviations of a binomial: one false alarm in a million.
        assert abs(int(head.sum()) - visible * (1 - dropout_p)) < 5 * (visible * dropout_p * (1 - dropout_p)) ** 0.5


def test_heads_rows_columns_and_calls_drop_independently(backend: str) -> None:
    layout = PackedLayout.from_lengths([256])
    first, second = (weights_kept(layout, 2, 0.5) for _ in range(2))
    pairs = {
        "two heads": (first[0], first[1]),
        "two calls": (first, second),
        "neighbouring rows": (first[:, :-1], first[:, 1:]),
        "rows four apart": (first[:, :-4], first[:, 4:]),
        "neighbouring columns": (first[:, :, :-1], first[:, :, 1:]),
        "transposed": (first.triu(1), first.transpose(1, 2).triu(1)),
    }
    for name, (a, b) in pairs.items():
        where = torch.ones_like(a).triu(1) if name == "transposed" else torch.ones_like(a)
        agree, of = int(((a == b) & where).sum()), int(where.sum())
        assert abs(agree - of / 2) < 5 * (of / 4) ** 0.5, name


def test_dropout_keeps_the_mean(backend: str) -> None:
    layout = PackedLayout.from_lengths([30, 34])
    q, k, v = (t.detach().float() for t in tokens(64, (2, 16), (2, 16), (2, 16)))
    plain = ops.varlen_attention(q, k, v, layout)
    draws = torch.stack([ops.varlen_attention(q, k, v, layout, dropout_p=0.3) for _ in range(400)])
    error = (draws.mean(0) - plain).abs()
    assert bool((error < 6 * draws.std(0) / 20).all())
