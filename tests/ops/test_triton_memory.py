"""Attention with memory in Triton's interpreter: what the contract's samples are too small for, or do not look at."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels
from vitkernels import accuracy, ops
from vitkernels.ops.packed.reference import keep_maps
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
    queries: int
    keys: int
    memory: int | tuple[int, ...]
    batch: int = 1
    heads: int = 1
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    own: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def sample(self) -> Sample:
        generator = torch.Generator().manual_seed(0)
        (dim, value_dim), images = self.dims, (self.batch, self.heads)
        memories = self.memory if isinstance(self.memory, int) else sum(self.memory)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        tensors = draw(*images, self.queries, dim), draw(*images, self.keys, dim), draw(*images, self.keys, value_dim)
        memory = draw(memories, self.heads, dim), draw(memories, self.heads, value_dim)
        options = dict(self.options)
        if self.own:
            options |= {"own_k": draw(*images, self.queries, dim), "own_v": draw(*images, self.queries, value_dim)}
        if not isinstance(self.memory, int):
            options["groups"] = self.memory
        return Sample(self.name, (*tensors, *memory), options)


def _on(backend: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(1)
        with vitkernels.backend(backend):
            return ops.memory_attention(*args, **kwargs)

    return run


ALL = {"dropout_p": 0.3, "return_lse": True}
CALLS = (
    # Tiles that hold several groups and parts of one, ranges that begin anywhere in a tile, groups without a memory at both ends and between.
    Call("groups over tiles", 70, 37, (0, 5, 40, 0, 33, 1, 0), heads=2, dims=(20, 33)),
    Call("a group a query", 70, 0, tuple(i % 4 for i in range(70)), own=False),
    Call("one memory over tiles", 66, 35, 40, batch=2, own=False),
    # Images in several splits, of which the last has fewer.
    Call("images over splits", 4, 5, (3, 2), batch=9),
    Call("all", 35, 20, (9, 0, 1, 30, 4), batch=2, dims=(33, 16), options=ALL),
    Call("all, one memory", 18, 20, 9, batch=3, own=False, options=ALL),
    Call("half", 70, 37, (20, 20), dtype=torch.bfloat16, dims=(20, 40)),
    Call("all half", 35, 70, (9, 0, 1, 30, 4), batch=2, dtype=torch.float16, options={**ALL, "dropout_p": 0.7, "scale": -0.3}),
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_by_the_rule(call: Call) -> None:
    sample = call.sample()
    comparisons = accuracy.Judge(_on("reference"), sample, names=ops.memory_attention)(_on("triton"))
    assert len(comparisons) == 1 + call.options.get("return_lse", False) + len(accuracy.leaves(sample))
    broken = [f"{c.name}: error {c.error:.3e}, eager's {c.eager_error:.3e}, floor {c.floor:.3e}" for c in comparisons if not c.holds]
    assert not broken, "\n".join(broken)


def test_dropout_keeps_what_the_reference_keeps() -> None:
    """With unit vectors for v the output is the weights, with such for its gradient so is that of v. The second image begins inside a draw."""
    batch, heads, queries, keys, groups = 3, 2, 6, 18, (4, 1)
    memories, seed = sum(groups), torch.tensor(2**61 + 12345)
    columns = keys + memories + 1
    generator = torch.Generator().manual_seed(0)
    q, own_k = torch.randn(2, batch, heads, queries, 16, generator=generator)
    k, memory_k = torch.randn(batch, heads, keys, 16, generator=generator), torch.randn(memories, heads, 16, generator=generator)
    unit = torch.eye(columns)
    v = unit[:keys].expand(batch, heads, keys, columns)
    memory_v = unit[keys:-1, None].expand(memories, heads, columns)
    own_v = unit[-1].expand(batch, heads, queries, columns)
    tensors = (q, k, v, memory_k, memory_v, own_k, own_v)
    expected = keep_maps(seed, (batch, heads, queries, columns), 0.4, stride=keys + memories)
    expected[:, :, :3, keys + 4 : -1] = expected[:, :, 3:, keys : keys + 4] = False  # the other group's
    options = (list(groups), 0.25, 0.4, seed)
    out, lse = torch.ops.vitkernels_triton.memory_attention(*tensors, *options)
    assert torch.equal(out.transpose(1, 2) != 0, expected)
    # The gradient of query i of image b is the unit vector b N + i.
    grad_out = unit[: batch * queries].view(batch, queries, 1, columns).expand(batch, queries, heads, columns)
    grads = torch.ops.vitkernels_triton.memory_attention_backward(grad_out, None, *tensors, lse, *options, *[True] * 7)
    of_rows = torch.stack([grads[2][b, ..., b * queries : (b + 1) * queries] for b in range(batch)])  # [B, H, K, N]
    assert torch.equal(of_rows.transpose(2, 3) != 0, expected[..., :keys])
    of_rows = grads[4][..., : batch * queries].unflatten(-1, (batch, queries))  # [M, H, B, N]
    assert torch.equal(of_rows.permute(2, 1, 3, 0) != 0, expected[..., keys:-1])
    assert torch.equal(grads[6].any(-1), expected[..., -1])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_key_has_no_gradient(dropout_p: float, dtype: torch.dtype) -> None:
    """The softmax of one score is 1 whatever the score: the gradient of q and k is zero, not rounding; the key may be own, shared or the image's."""
    for call in (Call("own", 20, 0, (0, 0)), Call("memory", 20, 0, (1, 1), own=False), Call("image's", 20, 1, 0, own=False)):
        sample = Call(call.name, call.queries, call.keys, call.memory, dims=(16, 24), own=call.own, dtype=dtype).sample()
        out = _on("triton")(*sample.args, **sample.kwargs, dropout_p=dropout_p)
        wanted = [sample.args[0], sample.args[1], sample.args[3], *([sample.kwargs["own_k"]] if call.own else [])]
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert out.any()
        for grad in torch.autograd.grad(out, wanted, grad_out):
            assert not grad.any(), call.name


def test_a_task_is_the_same_to_the_bit_whatever_other_tasks_do() -> None:
    sample = Call("tasks", 8, 21, (3, 5, 0, 20), heads=2).sample()
    q, k, v, memory_k, memory_v = (t.detach().clone() for t in sample.args)
    before = _on("triton")(q, k, v, memory_k, memory_v, **sample.kwargs)
    memory_k[3:8] = torch.nan
    memory_v[3:8] = 1e4
    q[:, :, 2:4] = 1e4
    after = _on("triton")(q, k, v, memory_k, memory_v, **sample.kwargs)
    assert after[:, :, 2:4].isnan().all()
    assert torch.equal(after[:, :, [0, 1, 4, 5, 6, 7]], before[:, :, [0, 1, 4, 5, 6, 7]])


def test_infinite_logits() -> None:
    """As in the reference: -inf hides, +inf makes the row NaN and its logsumexp +inf."""
    q = torch.ones(1, 1, 4, 1)
    q[0, 0, 1] = -1
    k, own_k = torch.tensor([1.0, 0.0, 2.0]).view(1, 1, 3, 1), torch.zeros(1, 1, 4, 1)
    k[0, 0, 0] = -torch.inf  # hidden from all but query 1, to which it is +inf
    own_k[0, 0, 2] = torch.inf
    own_k[0, 0, 3] = -torch.inf
    arguments = (q, k, torch.randn(1, 1, 3, 2), torch.ones(2, 1, 1), torch.randn(2, 1, 2))
    options = {"own_k": own_k, "own_v": torch.randn(1, 1, 4, 2), "groups": (1, 1), "return_lse": True}
    for got, expected in zip(*(_on(name)(*arguments, **options) for name in ("triton", "reference")), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_only_the_needed_gradients() -> None:
    """Each gradient alone is what it is among all, bit for bit, and what is not needed is empty."""
    sample = Call("needed", 6, 9, (3, 4), batch=2).sample()
    tensors = [t.detach() for t in (*sample.args, sample.kwargs["own_k"], sample.kwargs["own_v"])]
    options = ([3, 4], 0.25, 0.0, None)
    out, lse = torch.ops.vitkernels_triton.memory_attention(*tensors, *options)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))

    def backward(*needed: bool) -> tuple[Tensor, ...]:
        return torch.ops.vitkernels_triton.memory_attention_backward(grad_out, None, *tensors, lse, *options, *needed)

    together = backward(*[True] * 7)
    for index, expected in enumerate(together):
        alone = backward(*(i == index for i in range(7)))
        assert torch.equal(alone[index], expected), f"gradient {index}"
        assert not any(grad.numel() for i, grad in enumerate(alone) if i != index)


def test_places() -> None:
    from vitkernels.ops.memory import triton

    places = triton._places((2, 0, 3), torch.empty(0))
    assert places is not None and places.tolist() == [0, 0, 2, 2, 2, 0, 2, 2, 5]
    assert triton._places((2, 0, 3), torch.empty(0)) is places
    assert triton._places((5,), torch.empty(0)) is None


def test_heads_that_are_too_wide() -> None:
    q, wide = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 257)
    with vitkernels.backend("triton"), pytest.raises(ValueError, match="v 257; the Triton kernels take at most 256"):
        ops.memory_attention(q, q, wide, torch.zeros(0, 1, 16), torch.zeros(0, 1, 257))
