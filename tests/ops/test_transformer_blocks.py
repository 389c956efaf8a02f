"""Transformer blocks in one call against their definition: every part they may have or lack, tokens and patches, and what the op refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.ops.blocks import op
from vitkernels.ops.blocks.reference import Block, Memory, Mixing, Pass, Softmax, transformer_blocks
from vitkernels.ops.bottleneck.reference import Affine, Norm

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not(op.NAME, "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]
_op = torch.ops.vitkernels.transformer_blocks.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Draw:
    """Random blocks, all from one generator, whose weights are numbers of ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(0), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def affine(self, out: int, inner: int, bias: bool = True) -> Affine:
        return Affine(self(out, inner, scale=inner**-0.5), self(out) if bias else None)

    def norm(self, channels: int, affine: bool = True) -> Norm:
        return Norm("token", self(channels) if affine else None, self(channels) if affine else None, 1e-5)

    def block(self, channels: int, heads: int, dim: int, hidden: int, *, mixed: bool = False, normed: bool = False, options: bool = False) -> Block:
        if mixed:
            attention: Any = Mixing(heads, 0.4, self(heads, heads), self.norm(heads))
        else:
            norms = (self.norm(dim), self.norm(dim, affine=False)) if normed else ()
            attention = Softmax(heads, 0.3 if options else None, *norms)
        inner = heads * dim
        return Block(
            Pass(self.affine(3 * inner, channels, bias=not options), self.norm(channels, affine=not options)),
            attention,
            Pass(self.affine(channels, inner), self.norm(inner) if options else None),
            Pass(self.affine(channels, hidden), self.norm(channels), self.affine(hidden, channels), "silu" if options else "gelu"),
        )


# x, patch, blocks
CASES: dict[str, tuple[tuple[int, ...], Any, list[dict[str, Any]]]] = {
    "tokens": ((2, 40, 1, 70), None, [{"heads": 5, "dim": 8, "hidden": 50}] * 2),
    "options": ((3, 24, 1, 9), None, [{"heads": 3, "dim": 20, "hidden": 33, "normed": True, "options": True}]),
    "mixed": ((2, 36, 1, 35), None, [{"heads": 3, "dim": 12, "hidden": 40, "mixed": True}] * 2),
    "mixed, then not": (
        (1, 17, 1, 5),
        None,
        [{"heads": 2, "dim": 7, "hidden": 9, "mixed": True}, {"heads": 4, "dim": 3, "hidden": 30, "normed": True}],
    ),
    "a map": ((2, 16, 5, 7), None, [{"heads": 2, "dim": 8, "hidden": 32}]),
    "patches": ((2, 18, 6, 8), (2, 4), [{"heads": 3, "dim": 6, "hidden": 20}] * 2),
    "patches, norms": ((1, 16, 4, 6), (2, 2), [{"heads": 1, "dim": 16, "hidden": 16, "normed": True, "options": True}]),
    "few tokens, shared out by outputs": (
        (2, 192, 1, 9),
        None,
        [{"heads": 4, "dim": 48, "hidden": 1200}, {"heads": 5, "dim": 41, "hidden": 1110, "normed": True}],
    ),
    "one token": ((1, 8, 1, 1), None, [{"heads": 1, "dim": 8, "hidden": 8}]),
}


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return type(value)(*(cast(part, dtype) for part in value))
    return value.to(dtype) if isinstance(value, Tensor) else value


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, list[Block], Any]:
    shape, patch, options = CASES[name]
    draw = Draw(dtype)
    return draw(*shape), [draw.block(shape[1], **one) for one in options], patch


def packed(blocks: list[Block], dtype: torch.dtype) -> op.Packed:
    accumulation = torch.float64 if dtype is torch.float64 else torch.float32
    return op.pack([cast(block, accumulation) for block in blocks], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    x, blocks, patch = drawn(name, dtype)
    before = x.clone()
    found = op.run(x, packed(blocks, dtype), patch)
    assert torch.equal(x, before) and found.dtype is dtype and found.is_contiguous(memory_format=torch.channels_last)
    exact = transformer_blocks(x.double(), [cast(block, torch.float64) for block in blocks], patch)
    if dtype is torch.float64:  # where eager is the truth itself: sums in another order
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * float(exact.abs().max()) if exact.numel() else 0)
        return
    verdict = compare_tensors("output", found, transformer_blocks(x, blocks, patch), exact)
    assert verdict.holds, verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, (_, patch, _) in CASES.items() if patch is None])
def test_the_first_tokens_alone(name: str, dtype: torch.dtype) -> None:
    x, blocks, _ = drawn(name, dtype)
    weights, exactly = packed(blocks, dtype), [cast(block, torch.float64) for block in blocks]
    for first in {1, min(2, x[0, 0].numel()), x[0, 0].numel()}:
        before, found = x.clone(), op.run(x, weights, None, first)
        assert torch.equal(x, before) and found.dtype is dtype and found.is_contiguous(memory_format=torch.channels_last)
        exact = transformer_blocks(x.double(), exactly, None, first)
        if dtype is torch.float64:
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * float(exact.abs().max()))
            continue
        verdict = compare_tensors("output", found, transformer_blocks(x, blocks, None, first), exact)
        assert verdict.holds, verdict


@pytest.mark.parametrize("first", [None, 3], ids=["all", "first 3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [(4,), (3, 0, 7, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("name", ["tokens", "few tokens, shared out by outputs", "three tokens"])
def test_tasks_beside_the_tokens(name: str, groups: tuple[int, ...], dtype: torch.dtype, first: int | None) -> None:
    """The tokens of tasks, of which the model's know nothing: these are the same to the bit without them, also where but the first three are made."""
    draw = Draw(dtype)
    channels, tokens, options = {
        "tokens": (40, 70, {"heads": 5, "dim": 8, "hidden": 50}),
        "few tokens, shared out by outputs": (192, 9, {"heads": 4, "dim": 48, "hidden": 1200}),
        "three tokens": (16, 3, {"heads": 2, "dim": 8, "hidden": 20}),
    }[name]
    x, blocks = draw(2, channels, 1, tokens + len(groups)), [draw.block(channels, **options) for _ in range(3)]
    memory = Memory(*(draw(3, sum(groups), options["heads"], options["dim"]) for _ in range(2)), groups)
    weights = packed(blocks, dtype)
    found = op.run(x, weights, first=first, memory=memory)
    assert found.shape[-1] == (first or tokens) + len(groups)
    exactly = Memory(memory.k.double(), memory.v.double(), groups)
    exact = transformer_blocks(x.double(), [cast(block, torch.float64) for block in blocks], first=first, memory=exactly)
    if dtype is torch.float64:
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * float(exact.abs().max()))
    else:
        verdict = compare_tensors("output", found, transformer_blocks(x, blocks, first=first, memory=memory), exact)
        assert verdict.holds, verdict
    assert torch.equal(found[..., : first or tokens], op.run(x[..., :tokens], weights, first=first))


@pytest.mark.parametrize("shape", [(0, 40, 1, 4), (2, 40, 1, 0), (2, 40, 0, 3)], ids=str)
@pytest.mark.parametrize("name", ["tokens", "mixed"])
def test_nothing_to_attend_to(name: str, shape: tuple[int, ...]) -> None:
    _, blocks, _ = drawn(name, torch.float32)
    x = torch.randn(shape[0], blocks[0].mlp.project.weight.shape[0], *shape[2:])
    assert op.run(x, packed(blocks, torch.float32)).shape == x.shape


def test_one_layer_that_makes_no_pairs() -> None:
    """In bfloat16, of an odd number of hidden channels: then all weights are float32."""
    x, draw = torch.randn(2, 16, 1, 9).bfloat16(), Draw(torch.bfloat16)
    blocks = [draw.block(16, 2, 8, 24), draw.block(16, 2, 8, 25)]
    weights = packed(blocks, torch.bfloat16)
    assert weights.matrices.dtype is torch.float32
    exact = transformer_blocks(x.double(), [cast(block, torch.float64) for block in blocks])
    verdict = compare_tensors("output", op.run(x, weights), transformer_blocks(x, blocks), exact)
    assert verdict.holds, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tokens", "mixed", "few tokens, shared out by outputs"])
def test_threads_and_callers_change_no_bit(name: str, dtype: torch.dtype) -> None:
    x, blocks, patch = drawn(name, dtype)
    weights, threads = packed(blocks, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, first = op.run(x, weights, patch), op.run(x, weights, patch, 1)
        torch.set_num_threads(3)
        assert torch.equal(op.run(x, weights, patch), alone) and torch.equal(op.run(x, weights, patch, 1), first)
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, alone) for found in pool.map(lambda _: op.run(x, weights, patch), range(16)))


def test_refusals() -> None:
    x, blocks, _ = drawn("tokens", torch.float32)
    x, weights = x.contiguous(memory_format=torch.channels_last), packed(blocks, torch.float32)
    matrices, vectors, numbers, program = weights
    none, memory = (None, None, ()), torch.randn(2, 7, 5, 8)
    bad: dict[str, tuple[Any, ...]] = {
        "needs more matrices": (x, matrices[:-32], vectors, numbers, program, 0, 0, 0, *none),
        "needs .* vectors, and there are": (x, matrices, torch.cat([vectors, vectors[:32]]), numbers, program, 0, 0, 0, *none),
        "ends within a block": (x, matrices, vectors, numbers, program[:-1], 0, 0, 0, *none),
        "the program holds": (x, matrices, vectors, numbers, (0, *program[1:]), 0, 0, 0, *none),
        "the program is empty": (x, matrices[:0], vectors[:0], numbers[:0], (), 0, 0, 0, *none),
        "the patch must divide": (x, *weights, 1, 3, 0, *none),
        "first must be from 0": (x, *weights, 0, 0, 71, *none),
        "of patches it must be 0": (x, *weights, 1, 7, 1, *none),
        "of the accumulation dtype": (x, matrices, vectors.double(), numbers, program, 0, 0, 0, *none),
        "for bfloat16 alone": (x, matrices.bfloat16(), vectors, numbers, program, 0, 0, 0, *none),
        "channels_last": (torch.randn(2, 40, 5, 7), *weights, 0, 0, 0, *none),
        "must all be given": (x, *weights, 0, 0, 0, memory, memory, ()),
        "cannot be negative": (x, *weights, 0, 0, 0, memory, memory, (8, -1)),
        r"contiguous \[blocks, M, H, D\]": (x, *weights, 0, 0, 0, memory, memory, (6,)),
        "with memory x must be": (x, *weights, 1, 1, 0, memory, memory, (7,)),
    }
    for words, arguments in bad.items():
        with pytest.raises(RuntimeError, match=words):
            _op(*arguments)
    with pytest.raises(NotImplementedError, match="no gradient"):
        op.run(x.requires_grad_(), weights).sum().backward()


def test_schema() -> None:
    x, blocks, patch = drawn("patches", torch.float32)
    torch.library.opcheck(_op, (x.contiguous(memory_format=torch.channels_last), *packed(blocks, torch.float32), *patch, 0, None, None, ()))
    x, blocks, _ = drawn("tokens", torch.float32)
    torch.library.opcheck(_op, (x.contiguous(memory_format=torch.channels_last), *packed(blocks, torch.float32), 0, 0, 2, None, None, ()))
    memory = torch.randn(2, 7, 5, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    for first in (0, 3):
        torch.library.opcheck(_op, (x, *packed(blocks, torch.float32), 0, 0, first, memory, memory, (4, 3)))
