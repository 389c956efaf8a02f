"""Position embeddings and pooling beyond the contract: exact values, ends, ties, NaN, guards of memory, and the kernels compiled for GPUs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels
from vitkernels import backends, ops
from vitkernels.ops import PackedLayout

OP = "masked_pool"  # whose backends the fixture `backend` goes through
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: their sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


# --- factorized_position_embedding ----------------------------------------------------------------------------------------------------


def test_indices_pick_rows(backend: str) -> None:
    x, h, w = whole(5, 19), whole(4, 19, seed=1), whole(6, 19, seed=2)
    rows, columns = [3, 0, 3, 1, 2], [5, 0, 2, 2, 4]
    out = ops.factorized_position_embedding(x, h, w, torch.tensor(rows), torch.tensor(columns))
    expected = torch.stack([x[t] + h[rows[t]] + w[columns[t]] for t in range(5)])
    assert torch.equal(out, expected)


def test_shares_interpolate_between_rows(backend: str) -> None:
    """Both ends of the table, an entry in between, and a quarter of the way from one entry to the next."""
    x, h, w = whole(5, 19), whole(5, 19, seed=1), whole(3, 19, seed=2)
    rows, columns = torch.tensor([0.0, 1.0, 0.25, 0.3125, 0.9375]), torch.tensor([1.0, 0.0, 0.5, 0.25, 0.875])
    expected_h = torch.stack([h[0], h[4], h[1], 0.75 * h[1] + 0.25 * h[2], 0.25 * h[3] + 0.75 * h[4]])
    expected_w = torch.stack([w[2], w[0], w[1], 0.5 * w[0] + 0.5 * w[1], 0.25 * w[1] + 0.75 * w[2]])
    assert torch.equal(ops.factorized_position_embedding(x, h, w, rows, columns), x + expected_h + expected_w)


def test_gradients_of_the_tables(backend: str) -> None:
    """An entry that nobody reads gets zero, one that is read by shares its share of every gradient."""
    x, h, w = (t.requires_grad_() for t in (whole(4, 19), whole(5, 19, seed=1), whole(3, 19, seed=2)))
    rows, columns = torch.tensor([0.3125, 1.0, 0.3125, 0.25]), torch.tensor([2, 0, 2, 2])
    g = whole(4, 19, seed=3)
    grad_x, grad_h, grad_w = torch.autograd.grad(ops.factorized_position_embedding(x, h, w, rows, columns), (x, h, w), g)
    assert torch.equal(grad_x, g)
    assert torch.equal(grad_h, torch.stack([0 * g[0], 0.75 * (g[0] + g[2]) + g[3], 0.25 * (g[0] + g[2]), 0 * g[0], g[1]]))
    assert torch.equal(grad_w, torch.stack([g[1], 0 * g[0], g[0] + g[2] + g[3]]))


def test_a_nan_position_is_seen_in_its_token_alone(backend: str) -> None:
    x, h, w = whole(3, 19), whole(4, 19, seed=1), whole(4, 19, seed=2)
    out = ops.factorized_position_embedding(x, h, w, torch.tensor([0.5, torch.nan, 1.0]), torch.tensor([0, 1, 2]))
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert not out[[0, 2]].isnan().any()


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 from the start of the process")
def test_a_position_that_nobody_checked_is_nan_in_triton() -> None:
    """On a GPU positions are not read by the host; one outside of its table is no silent wrong number, and no memory is read there."""
    x, h, w = whole(4, 19), whole(4, 19, seed=1), whole(4, 19, seed=2)
    inside, op = torch.zeros(4, dtype=torch.int64), torch.ops.vitkernels_triton.factorized_position_embedding
    for outside in (torch.tensor([0, 4, -1, 3]), torch.tensor([0.0, 1.5, -0.5, 1.0])):
        for positions in ((outside, inside), (inside, outside)):
            assert op(x, h, w, *positions).isnan().all(dim=1).tolist() == [False, True, True, False]
    g = whole(4, 19, seed=3)
    grad_h, grad_w = torch.ops.vitkernels_triton.factorized_position_embedding_backward(g, torch.tensor([0, 4, -1, 3]), inside, 4, 4, True, True)
    assert torch.equal(grad_h, torch.stack([g[0], 0 * g[0], 0 * g[0], g[3]]))
    assert torch.equal(grad_w[0], g.sum(0))


@pytest.mark.parametrize("positions", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.5]), torch.tensor([-0.5, 0.0])])
def test_compiled_code_reads_nothing_outside_a_table(positions: Tensor) -> None:
    """Where Python cannot look at the positions the kernel does."""
    if backends.why_not("masked_pool", "native", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("needs the native library")
    compiled = torch.compile(ops.factorized_position_embedding, fullgraph=True, backend="aot_eager")
    table, fine = whole(4, 8), torch.tensor([0, 3])
    with vitkernels.backend("native"):
        for rows, columns, name in ((positions, fine, "rows"), (fine, positions, "columns")):
            with pytest.raises(RuntimeError, match=f"{name} must lie within 0 and"):
                compiled(whole(2, 8), table, table, rows, columns)


def _results(threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, h, w, g = (torch.randn(n, 200, generator=generator).requires_grad_() for n in (1500, 32, 40, 1500))
    rows, columns = torch.rand(1500, generator=generator), torch.randint(40, (1500,), generator=generator)
    out = ops.factorized_position_embedding(x, h, w, rows, columns)
    results = [out, *torch.autograd.grad(out, (h, w), g)]
    layout = PackedLayout.from_lengths([700, 1, 0, 799])
    for mode in ("mean", "max"):
        pooled = ops.masked_pool(x, layout, mode)
        results += [pooled, *torch.autograd.grad(pooled, x, torch.randn(pooled.shape, generator=generator))]
    return results


def test_the_number_of_threads_changes_no_bit(backend: str) -> None:
    if backend != "native":
        pytest.skip("of the native kernels")
    before = torch.get_num_threads()
    try:
        one, *others = (_results(threads) for threads in (1, 2, 3, 7))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


# --- masked_pool ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("shape", [(19,), (3, 5)])
def test_each_sequence_by_itself(backend: str, mode: Any, shape: tuple[int, ...]) -> None:
    """Rows that count for nothing are NaN: padding behind a sequence's rows in use and behind the last sequence."""
    lengths, used = [4, 0, 1, 8, 2], [4, 0, 1, 3, 0]
    layout = PackedLayout.from_lengths(lengths, capacity=18)
    layout = PackedLayout.from_cu_seqlens(layout.cu_seqlens_k, seqused_k=torch.tensor(used), total_q=18, total_k=18)
    x, ends = whole(18, *shape) * 12, layout.cu_seqlens_k.tolist()
    images = [x[begin : begin + n] for begin, n in zip(ends, used, strict=False)]
    counts = torch.cat([torch.arange(begin, begin + n) for begin, n in zip(ends, used, strict=False)])
    padded = torch.full_like(x, torch.nan)
    padded[counts] = x[counts]
    expected = [torch.zeros(shape) if not len(i) else i.mean(0) if mode == "mean" else i.amax(0) for i in images]
    torch.testing.assert_close(ops.masked_pool(padded, layout, mode), torch.stack(expected), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(ops.masked_pool(padded.requires_grad_(), layout, mode).sum(), padded)
    assert counts.tolist() == grad.flatten(1).any(dim=1).nonzero().flatten().tolist() if mode == "mean" else not grad.isnan().any()
    torch.testing.assert_close(grad.sum(0), torch.full(shape, 3.0))


def test_ties_nan_and_infinity(backend: str) -> None:
    """The gradient goes to the first of equals, to the first NaN, and to the first row where all are -inf."""
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[1.0, 2, nan, -inf, 0], [3.0, 2, 5, -inf, -0.0], [3.0, 1, nan, -inf, 0], [0.0, 2, 9, -inf, 0]]).requires_grad_()
    layout = PackedLayout.from_lengths([3, 0, 1])
    out = ops.masked_pool(x, layout, "max")
    torch.testing.assert_close(out, torch.tensor([[3.0, 2, nan, -inf, 0], [0] * 5, [0.0, 2, 9, -inf, 0]]), rtol=0, atol=0, equal_nan=True)
    weight = torch.tensor([[1.0, 2, 3, 4, 5], [9] * 5, [6.0, 7, 8, 9, 10]])
    (grad,) = torch.autograd.grad(out, x, weight)
    assert grad.tolist() == [[0, 2, 3, 4, 5], [1, 0, 0, 0, 0], [0] * 5, [6, 7, 8, 9, 10]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_many_is_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    """In the dtype itself the sum of 5000 ones stops at 256 (bfloat16) or 2048 (float16)."""
    x = torch.ones(5000, 3, dtype=dtype)
    assert torch.equal(ops.masked_pool(x, PackedLayout.from_lengths([5000])), torch.ones(1, 3, dtype=dtype))


def test_raw_ops_guard_memory() -> None:
    """Whoever calls ``torch.ops`` directly gets an error for lengths and rows that lie elsewhere."""
    if backends.why_not("masked_pool", "native", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("needs the native library")
    x, lengths = whole(6, 8), torch.tensor([0, 4, 6], dtype=torch.int32)
    vitkernels.ops.masked_pool(x, PackedLayout.from_cu_seqlens(lengths))  # loads the library
    op, backward = torch.ops.vitkernels.masked_pool, torch.ops.vitkernels.masked_pool_backward
    for wrong, words in (([0, 4, 7], "not go beyond the 6 rows"), ([1, 4, 6], "must start at 0"), ([0, 5, 4], "not decrease")):
        with pytest.raises(RuntimeError, match=words):
            op(x, torch.tensor(wrong, dtype=torch.int32), None, True)
    with pytest.raises(RuntimeError, match=r"seqused\[1\] must be between 0 and 2"):
        op(x, lengths, torch.tensor([4, 3], dtype=torch.int32), False)
    with pytest.raises(RuntimeError, match="contiguous int32"):
        op(x, lengths.long(), None, False)
    with pytest.raises(RuntimeError, match="indices must be the forward's"):
        backward(whole(2, 8), torch.full((2, 8), 5, dtype=torch.int32), lengths, None, 6, True)


@pytest.mark.skipif(INTERPRETING, reason="kernels made for the interpreter cannot be compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [48, 768])
def test_every_kernel_fits_every_gpu(dim: int, dtype: torch.dtype) -> None:
    """Compiled ahead of time: shared memory within the limit, no register spilled."""
    pytest.importorskip("triton")
    from vitkernels import aot
    from vitkernels.ops.tokens import triton as tokens

    def launches() -> list[aot.Launch]:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, h, w, cu, used = empty(1000, dim), empty(32, dim), empty(48, dim), empty(9, dtype=torch.int32), empty(8, dtype=torch.int32)
        kinds = [empty(1000, dtype=kind) for kind in (torch.int64, torch.float32)]
        with aot.recorded() as found:
            for rows, columns in ((kinds[0], kinds[0]), (kinds[1], kinds[1])):
                tokens.factorized_position_embedding(x, h, w, rows, columns)
                tokens.factorized_position_embedding_backward(x, rows, columns, 32, 48, True, True)
            for seqused in (None, used):
                for largest in (False, True):
                    out, indices = tokens.masked_pool(x, cu, seqused, largest)
                    tokens.masked_pool_backward(out, indices, cu, seqused, 1000, largest)
        return list(dict.fromkeys(found))

    table = aot.budgets(launches, "")
    assert {b.kernel for b in table} == {f"{op}_{way}_kernel" for op in ("factorized_position_embedding", "masked_pool") for way in ("fwd", "bwd")}
    misfits = [f"{b.kernel} on {b.target}: {b.shared} of {b.shared_limit} bytes shared, {b.spills} spilled" for b in table if not b.fits]
    assert not misfits, "\n".join(misfits)
