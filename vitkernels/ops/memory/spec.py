"""Samples, bad inputs and benchmark shapes of attention with memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops._arrange import contiguous, of_one_projection, one_head_for_all, strided, tokens_first
from vitkernels.ops.memory import op
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample


def _sample(
    name: str,
    shape: tuple[int, int, int, int],
    memory: int | tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    keys: int | None = None,
    value_dim: int | None = None,
    own: bool = False,
    logits: float = 1.0,
    arrange: Callable[..., tuple[Tensor, ...]] = contiguous,
    frozen: bool = False,
    **kwargs: Any,
) -> Sample:
    """One call.

    Args:
        name: the sample's.
        shape: [B, H, N, D].
        memory: its length, or the lengths of groups.
        dtype: of all tensors.
        device: of all tensors.
        grad: whether they require a gradient.
        keys: K, if not N.
        value_dim: D_v, if not D.
        own: whether each query has a key of its own.
        logits: their standard deviation, about.
        arrange: puts q, k and v under other strides.
        frozen: q, k and v need no gradient, as under a frozen model.
        kwargs: more options of the op.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    batch, heads, queries, dim = shape
    keys, value_dim = queries if keys is None else keys, value_dim or dim
    groups = None if isinstance(memory, int) else memory
    memories = memory if isinstance(memory, int) else sum(memory)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def leaf(tensor: Tensor, wanted: bool = True) -> Tensor:
        return tensor.to(device).detach().requires_grad_(grad and wanted)

    tokens = arrange(draw(*shape, scale=logits), draw(batch, heads, keys, dim), draw(batch, heads, keys, value_dim))
    memory_kv = (draw(memories, heads, width).transpose(0, 1).contiguous().transpose(0, 1) for width in (dim, value_dim))
    if own:
        kwargs |= {"own_k": leaf(draw(*shape)), "own_v": leaf(draw(*shape[:3], value_dim))}
    if groups is not None:
        kwargs["groups"] = groups
    return Sample(name, (*(leaf(t, not frozen) for t in tokens), *map(leaf, memory_kv)), kwargs)


def _samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_sample, dtype=dtype, device=device, grad=grad)
    yield make("2x2x17x16, memory 5", (2, 2, 17, 16), 5)
    yield make("tiny", (1, 2, 3, 4), 2, return_lse=True)
    yield make("tiny, two tasks", (2, 1, 2, 3), (1, 2), keys=3, value_dim=2, own=True, return_lse=True)
    yield make("five tasks", (2, 3, 5, 16), (10, 10, 10, 10, 10), keys=21, own=True)
    yield make("no memory", (2, 2, 9, 16), 0, return_lse=True)
    yield make("tasks with memory, without, with much", (2, 2, 3, 20), (4, 0, 33), keys=18, own=True, return_lse=True)
    yield make("two queries a task, no own keys", (2, 2, 6, 16), (3, 2, 4), keys=9, value_dim=24)
    yield make("memory alone", (2, 2, 6, 16), (3, 2), keys=0, return_lse=True)
    yield make("own keys alone", (2, 2, 3, 16), (0, 0, 0), keys=0, own=True)
    yield make("nothing to see", (2, 2, 4, 16), 0, keys=0, return_lse=True)
    yield make("no image", (0, 2, 9, 16), 4, return_lse=True)
    yield make("no query", (2, 2, 0, 16), (3, 4), keys=5)
    yield make("70 queries and own keys", (1, 1, 70, 16), 20, keys=65, own=True, return_lse=True)
    # As in packed attention: one float32 for the logsumexp would leave more error than eager has.
    yield make("large logits", (2, 3, 20, 16), 7, logits=50.0)
    yield make("one projection", (2, 3, 20, 16), 3, arrange=of_one_projection, return_lse=True)
    yield make("tokens first", (2, 3, 4, 16), (6, 6), keys=20, arrange=tokens_first, value_dim=24, own=True)
    yield make("strided", (2, 3, 20, 16), 5, arrange=strided)
    yield make("expanded", (2, 3, 4, 16), (5, 1, 0, 2), keys=11, arrange=one_head_for_all, own=True)
    yield make("a frozen model", (2, 3, 4, 32), (5, 1, 0, 2), keys=50, own=True, frozen=True)
    for index, dim in enumerate((20, 33, 64) if small else (8, 20, 33, 64, 72, 80, 128)):
        yield make(f"head dim {dim}", (1, 2, 5, dim), (3,) * 5, keys=17, value_dim=(dim, 8, 64, 17)[index % 4], own=True)
    if small:
        return
    yield make("197 tokens", (2, 3, 197, 64), 10, arrange=of_one_projection)
    yield make("577 tokens, 20 tasks", (1, 2, 20, 64), tuple(range(20)), keys=577, own=True, return_lse=True)
    yield make("4200 tokens", (1, 1, 33, 16), 300, keys=4200, return_lse=True)


def _bad_inputs() -> Iterator[BadInput]:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 5)
    memory_k, memory_v = torch.randn(9, 4, 8), torch.randn(9, 4, 5)
    own_k = torch.randn(2, 4, 6, 8)

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], **changed: Any) -> BadInput:
        args = {"q": q, "k": k, "v": v, "memory_k": memory_k, "memory_v": memory_v} | changed
        return BadInput.of(name, exception, words, *(args.pop(a) for a in ("q", "k", "v", "memory_k", "memory_v")), **args)

    yield bad("q is a list", TypeError, ("q is a list", "[B, H, N, D]"), q=[1.0])
    yield bad("integer q", TypeError, ("q has dtype torch.int64", "floating"), q=q.long())
    yield bad("sparse v", TypeError, ("v has layout torch.sparse_coo", "dense"), v=v.to_sparse())
    yield bad("q of three dimensions", ValueError, ("q has shape [4, 6, 8]", "4-dimensional"), q=q[0])
    yield bad("k of another batch", ValueError, ("k has shape [1, 4, 7, 8]", "[2, 4, 7, 8]"), k=k[:1])
    yield bad("k of another head_dim", ValueError, ("k has shape [2, 4, 7, 7]", "[2, 4, 7, 8]"), k=k[..., :7])
    yield bad("v of other tokens", ValueError, ("v has shape [2, 4, 6, 5]", "[2, 4, 7, 5]"), v=v[:, :, :6])
    yield bad("v of another dtype", TypeError, ("v has dtype torch.float64", "torch.float32"), v=v.double())
    yield bad(
        "memory of a batch", ValueError, ("memory_k has shape [2, 9, 4, 8]", "3-dimensional, [M, H, D]"), memory_k=memory_k.expand(2, -1, -1, -1)
    )
    yield bad("memory of other heads", ValueError, ("memory_k has shape [9, 3, 8]", "[9, 4, 8]"), memory_k=memory_k[:, :3])
    yield bad("memory_v of another length", ValueError, ("memory_v has shape [8, 4, 5]", "[9, 4, 5]"), memory_v=memory_v[:8])
    yield bad("memory on another device", ValueError, ("memory_v is on meta", "cpu"), memory_v=memory_v.to("meta"))
    yield bad("own_k alone", ValueError, ("own_k is given", "own_v is None"), own_k=own_k)
    yield bad("own_v of the keys' tokens", ValueError, ("own_v has shape [2, 4, 7, 5]", "[2, 4, 6, 5]"), own_k=own_k, own_v=v)
    yield bad("groups is a number", TypeError, ("groups is 3", "sequence of integers"), groups=3)
    yield bad("groups that do not add up", ValueError, ("groups is (3, 3)", "M = 9"), groups=(3, 3))
    yield bad("a negative group", ValueError, ("groups is (-1, 10)", "none negative"), groups=(-1, 10))
    yield bad("groups that do not divide", ValueError, ("4 lengths", "divide N = 6"), groups=(3, 2, 2, 2))
    yield bad("no head", ValueError, ("q has shape [2, 0, 6, 8]", "at least 1"), **{
        name: tensor[:, :0] for name, tensor in (("q", q), ("k", k), ("v", v), ("memory_k", memory_k), ("memory_v", memory_v))
    })  # fmt: skip
    yield bad("dropout_p above 1", ValueError, ("dropout_p is 1.5", "[0, 1]"), dropout_p=1.5)


def _saved(sample: Sample) -> int:
    """The logsumexp and the seed."""
    return sample.args[0].shape[:3].numel() * 8 + 8


# What people write today, of the whole: everything concatenated for every sample, and a mask.


@functools.lru_cache(maxsize=4)
def _mask(queries: int, keys: int, groups: tuple[int, ...], own: bool, device: str) -> Tensor:
    """[N, K + M + N], True where a query sees a key. Made once, as a model keeps it."""
    group = torch.arange(queries)[:, None] // (queries // len(groups))
    memory = group == torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    mine = torch.eye(queries, dtype=torch.bool)[:, : queries if own else 0]
    return torch.cat((torch.ones(queries, keys, dtype=torch.bool), memory, mine), dim=1).to(device)


def _concatenated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    *,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    groups: tuple[int, ...] | None = None,
) -> Tensor:
    batch = q.shape[0]
    memory_k, memory_v = (m.transpose(0, 1).expand(batch, -1, -1, -1) for m in (memory_k, memory_v))
    all_k, all_v = ([k, memory_k], [v, memory_v]) if own_k is None or own_v is None else ([k, memory_k, own_k], [v, memory_v, own_v])
    mask = None if groups is None else _mask(q.shape[2], k.shape[2], groups, own_k is not None, str(q.device))
    return F.scaled_dot_product_attention(q, torch.cat(all_k, dim=2), torch.cat(all_v, dim=2), attn_mask=mask)


def _case(name: str, batch: int, queries: int, keys: int, memory: int | tuple[int, ...], heads: int = 6, dim: int = 64) -> BenchCase:
    tasks = not isinstance(memory, int)
    memories = sum(memory) if isinstance(memory, tuple) else memory

    def make(dtype: torch.dtype, device: str) -> Sample:
        arrange = contiguous if tasks else of_one_projection
        return _sample("bench", (batch, heads, queries, dim), memory, dtype=dtype, device=device, keys=keys, own=tasks, arrange=arrange)

    seen = queries * (keys + 1) + memories if isinstance(memory, tuple) else queries * (keys + memories)
    return BenchCase(
        name=name, make=make, flops=4 * batch * heads * dim * seen, elements_moved=2 * heads * dim * (batch * (keys + queries) + memories)
    )


SPECS = (
    OpSpec(
        name="memory_attention",
        family="memory",
        function=op.memory_attention,
        reference=backends.backend("reference")(op.memory_attention),
        summary="attention with a memory the batch shares, also of several tasks (Learnable Memory, arXiv 2203.15243)",
        samples=_samples,
        bad_inputs=_bad_inputs,
        bench_cases=(
            _case("B1 5 tasks, N197", 1, 5, 197, (10,) * 5),
            _case("B16 5 tasks, N197", 16, 5, 197, (10,) * 5),
            _case("B16 20 tasks, N197", 16, 20, 197, (10,) * 20),
            _case("B8 N197 memory 10", 8, 197, 197, 10),
        ),
        saved_bytes=_saved,
        peers={"SDPA, concatenated": _concatenated},
    ),
)
