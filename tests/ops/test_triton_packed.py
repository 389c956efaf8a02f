"""Attention over packed sequences in Triton's interpreter: what the contract's samples are too small for, or do not look at."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels
from vitkernels import accuracy, ops
from vitkernels.ops import PackedLayout
from vitkernels.ops.packed import reference
from vitkernels.registry import Sample

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process"),
    pytest.mark.usefixtures("poison"),
]


@dataclass(frozen=True)
class Call:
    """One call, of normal numbers."""

    name: str
    lengths: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    used: tuple[int, ...] | None = None
    capacity: int | None = None
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    bias: bool = False
    norm: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def layout(self) -> PackedLayout:
        layout = PackedLayout.from_lengths(self.lengths, self.keys, capacity=self.capacity)
        if self.used is None:
            return layout
        totals = {"total_q": layout.total_q, "total_k": layout.total_k}
        return PackedLayout.from_cu_seqlens(layout.cu_seqlens_q, layout.cu_seqlens_k, seqused_k=torch.tensor(self.used), **totals)

    def sample(self) -> Sample:
        generator = torch.Generator().manual_seed(0)
        layout, (heads, key_heads), (dim, value_dim) = self.layout(), self.heads, self.dims

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        tensors = draw(layout.total_q, heads, dim), draw(layout.total_k, key_heads, dim), draw(layout.total_k, key_heads, value_dim)
        options = dict(self.options)
        if self.bias:
            bias = draw(heads, layout.max_seqlen_q + 1, layout.max_seqlen_k).detach()
            bias[:, 0, 1:] = bias[:, 2] = -torch.inf  # one key left, none left
            options["bias"] = bias.requires_grad_()
        if self.norm is not None:
            options |= {"qk_norm": self.norm, "q_norm_weight": draw(heads, dim), "k_norm_weight": draw(dim)}
        if self.norm == "layer":
            options |= {"q_norm_bias": draw(dim), "k_norm_bias": draw(key_heads, dim)}
        return Sample(self.name, (*tensors, layout), options)


def _on(backend: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(1)
        with vitkernels.backend(backend):
            found = ops.varlen_attention(*args, **kwargs)
        if isinstance(found, Tensor):
            return found
        out, lse = found
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # the error of an infinity is not a number

    return run


ALL = {"dropout_p": 0.3, "return_lse": True}
CALLS = (
    # Blocks that every row sees, the rest of them, tiles of several sequences, sequences that begin at any row of a tile.
    Call("long", (150, 3, 0, 70, 1)),
    Call("long half", (130, 62, 1), dtype=torch.bfloat16, dims=(20, 40), heads=(4, 2)),
    Call("one row a tile", (1, 1, 1), keys=(70, 0, 130), dims=(24, 8), heads=(1, 1)),
    Call("nothing", (0, 0), capacity=70),
    # Everything at once: what a kernel does to scores it must do in the order of all others.
    Call("all", (66, 1, 5), heads=(2, 1), bias=True, norm="layer", options=ALL),
    Call("all, keys between", (30, 0, 40, 4), keys=(20, 3, 70, 9), used=(13, 3, 0, 9), capacity=110, bias=True, norm="l2", options=ALL),
    Call("all half", (67, 3), dtype=torch.float16, dims=(16, 20), bias=True, norm="rms", options={**ALL, "dropout_p": 0.7, "scale": -0.3}),
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_by_the_rule(call: Call) -> None:
    _assert_the_rule(call.sample())


def _assert_the_rule(sample: Sample) -> None:
    comparisons = accuracy.Judge(_on("reference"), sample, names=ops.varlen_attention)(_on("triton"))
    assert len(comparisons) == 1 + sample.kwargs.get("return_lse", False) + len(accuracy.leaves(sample))
    broken = [f"{c.name}: error {c.error:.3e}, eager's {c.eager_error:.3e}, floor {c.floor:.3e}" for c in comparisons if not c.holds]
    assert not broken, "\n".join(broken)


def test_dropout_keeps_what_the_reference_keeps() -> None:
    """With the unit matrix for v the output is the weights, and with one for its gradient so is that of v."""
    layout, seed, heads = PackedLayout.from_lengths([3, 70]), torch.tensor(2**61 + 12345), 2
    rows = torch.arange(73)
    sees = (rows[:, None] < 3) == (rows[None, :] < 3)
    expected = reference.keep_mask(seed, heads, rows, rows, 0.4) & sees
    unit = torch.eye(73)[:, None].expand(73, heads, 73)
    tensors = (*torch.randn(2, 73, heads, 16, generator=torch.Generator().manual_seed(0)), unit)
    where = (layout.cu_seqlens_q, layout.cu_seqlens_k, None, layout.work, None, *(None,) * 4)
    namespace = torch.ops.vitkernels_triton
    out, lse = namespace.varlen_attention(*tensors, *where, 0, 0.0, 0.25, 0.4, seed)
    assert torch.equal(out.transpose(0, 1) != 0, expected)
    grads = namespace.varlen_attention_backward(unit, None, *tensors, out, lse, *where, 0, 0.0, 0.25, 0.4, seed, False, False, True, False, False)
    assert torch.equal(grads[2].permute(1, 2, 0) != 0, expected)
    assert 0.55 < expected.sum() / (heads * sees.sum()) < 0.65


@pytest.mark.parametrize("norm", [None, "layer"])
def test_what_lies_between_sequences_does_not_matter(norm: str | None) -> None:
    """Rows that are no one's, of every tensor, may hold NaN: outputs and gradients are those with zeros there, and zero there."""
    layout = PackedLayout.from_image_ids(torch.tensor([0] * 70 + [-1] * 9 + [1] * 20 + [-1] * 3 + [2] * 5 + [-1] * 13))
    in_use = torch.zeros(120, dtype=torch.bool)
    for first, end, _, end_in_use in layout.segments:
        in_use[first:end] = end_in_use == end
    assert in_use.sum() == 95
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 120, 2, 16, generator=generator).masked_fill(~in_use[:, None, None], 0.0)
    weights = {} if norm is None else {"qk_norm": norm, "q_norm_weight": torch.randn(16, generator=generator).requires_grad_()}
    results = []
    for filling in (0.0, torch.nan):
        arguments = [t.masked_fill(~in_use[:, None, None], filling).requires_grad_() for t in (q, k, v)]
        out = _on("triton")(*arguments, layout, **weights)
        leaves = [*arguments, *(w for w in weights.values() if isinstance(w, Tensor))]
        results.append([out, *torch.autograd.grad(out, leaves, grad.masked_fill(~in_use[:, None, None], filling))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(t[~in_use].any() for t in results[0][:4])


def test_one_key_has_no_gradient() -> None:
    """The softmax of one score is 1 whatever the score: the gradient of q, k and what norms them is zero, not rounding."""
    sample = Call("ones", (1,) * 70, norm="rms").sample()
    q, k, v, layout = sample.args
    out = _on("triton")(q, k, v, layout, **sample.kwargs)
    assert torch.equal(out, v)
    weights = [w for w in sample.kwargs.values() if isinstance(w, Tensor)]
    for grad in torch.autograd.grad(out, [q, k, *weights], torch.randn(out.shape, generator=torch.Generator().manual_seed(1))):
        assert not grad.any()


def test_a_bias_on_all_keys_has_no_gradient() -> None:
    """It moves all scores of a query alike. What is left of the sum would be rounding."""
    sample = Call("moved", (9, 4), norm="layer").sample()
    out = _on("triton")(*sample.args, **sample.kwargs)
    (grad,) = torch.autograd.grad(out.square().sum(), [sample.kwargs["k_norm_bias"]])
    assert not grad.any()


def test_keys_of_zeros() -> None:
    """The l2 norm multiplies a key of zeros (a token of zeros and no bias make one) by more than float16 holds."""
    sample = Call("zeros", (5, 3), dtype=torch.float16, norm="l2", options={"norm_eps": 2e-5}).sample()
    q, k, v, layout = sample.args
    k = k.detach().clone()  # its gradient does overflow
    k[1] = k[6] = 0
    _assert_the_rule(Sample("zeros", (q, k, v, layout), sample.kwargs))


def test_only_the_needed_gradients() -> None:
    """Each gradient alone is what it is among all, bit for bit, and what is not needed is empty."""
    sample = Call("needed", (20, 3), heads=(4, 2), bias=True, norm="layer").sample()
    function, leaves = _on("triton"), accuracy.leaves(sample)
    out = function(*sample.args, **sample.kwargs)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    together = torch.autograd.grad(out, leaves, grad_out)
    for index, expected in enumerate(together):
        frozen = {id(leaf): leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(leaves)}
        args = [frozen.get(id(a), a) for a in sample.args]
        kwargs = {name: frozen.get(id(a), a) for name, a in sample.kwargs.items()}
        (alone,) = torch.autograd.grad(function(*args, **kwargs), [frozen[id(leaves[index])]], grad_out)
        assert torch.equal(alone, expected), f"gradient {index}"


def test_heads_that_are_too_wide() -> None:
    layout = PackedLayout.from_lengths([2])
    q, wide = torch.zeros(2, 1, 16), torch.zeros(2, 1, 257)
    with vitkernels.backend("triton"), pytest.raises(ValueError, match="v 257; the Triton kernels take at most 256"):
        ops.varlen_attention(q, q, wide, layout)
