"""What the Triton kernels of every family share: small pieces of kernels, tile sizes, and the launch."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)

# The interpreter's tl.dot is wrong on bf16 operands and its conversions to bf16 truncate; a GPU has neither fault, and the flag is off there.
INTERPRET = bool(triton.knobs.runtime.interpret)
_T = TypeVar("_T")


# --- pieces of kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def wide(index, WIDE: tl.constexpr):
    """An index in 64 bit where offsets can pass 2**31."""
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def cast(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """``value.to(dtype)``, to nearest even also where the interpreter would truncate."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``acc + a @ b``."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``acc + a @ b``, a tile of a long sum.

    In fp32 the tile's product is a sum of its own: exact products are added one at a time, and thousands in a row round as a random walk, three times
    as far off as a sum of sums. (``acc + dot(a, b)`` Triton would make that one long sum again.)
    """
    if a.dtype == tl.float32:
        return acc - dot(-a, b, tl.zeros(acc.shape, dtype=tl.float32), PRECISION, INTERPRET)
    return dot(a, b, acc, PRECISION, INTERPRET)


@triton.jit
def relu(value):
    """Relu that keeps NaN, as PyTorch's does."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def load_rows(x, start, m_row, stride_t, o_d, m_d, stride_d, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """[BLOCK, columns]: the rows from ``start`` on, 0 where not wanted."""
    o_x = wide(tl.arange(0, BLOCK), WIDE)[:, None] * stride_t + wide(o_d, WIDE)[None, :] * stride_d
    return tl.load(x + tl.cast(start, tl.int64) * stride_t + o_x, mask=m_row[:, None] & m_d[None, :], other=0.0)


@triton.jit
def load_lse(lse, o_m, m_m):
    """The logsumexp of queries in two fp32 pieces, +inf for those that see nothing (theirs is -inf), so that their weights come out as 0.

    In one piece the rounding of a large one would be an error of 1e-6 in every weight.
    """
    b_lse = tl.load(lse + o_m, mask=m_m, other=float("-inf"))  # fp64
    b_high = b_lse.to(tl.float32)
    m_blind = b_high == float("-inf")
    b_low = tl.where(m_blind, 0.0, (b_lse - b_high.to(tl.float64)).to(tl.float32))
    return tl.where(m_blind, float("inf"), b_high), b_low


@triton.jit
def philox(seed, o_q, o_k, i_h, limit):
    """Which weights four queries keep, one bit each: packed attention's ``reference.keep_mask`` at query rows 4 o_q to 4 o_q + 3 and key rows o_k."""
    limit = tl.cast(limit, tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), o_k, o_q, i_h, 0)
    return (a > limit).to(tl.int32) | (b > limit).to(tl.int32) << 1 | (c > limit).to(tl.int32) << 2 | (d > limit).to(tl.int32) << 3


@triton.jit
def sum_parts_kernel(
    parts,  # [rows, columns] fp32
    out,  # [columns], written
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sum of partial results in a fixed order, in the dtype of ``out``."""
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for r in range(0, rows, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        b_sum += tl.load(parts + o_r[:, None] * columns + o_c[None, :], mask=(o_r < rows)[:, None] & m_c[None, :], other=0.0)
    tl.store(out + o_c, cast(tl.sum(b_sum, axis=0), out.dtype.element_ty, INTERPRET), mask=m_c)


# --- tiles -------------------------------------------------------------------------------------------------------------------------


# Triton's functions of these names can be called in kernels, too, which makes them twenty times as slow on the host.
def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def power(n: int, lowest: int, highest: int) -> int:
    """The power of two at or above ``n``, between two powers of two."""
    return min(max(next_power_of_2(n), lowest), highest)


class Tile(NamedTuple):
    """Block sizes of one kernel, as its constexpr arguments, and how it is compiled.

    ``registers`` is what a thread may have. Left to itself ptxas now and then spills a word to reach the next step of occupancy.
    """

    blocks: dict[str, int]
    num_warps: int
    registers: int | None = None
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """All of it, as a kernel's keyword arguments. The register limit is an option of CUDA's compiler only."""
        limit = {} if self.registers is None or torch.version.hip is not None else {"maxnreg": self.registers}
        return {**self.blocks, **limit, "num_warps": self.num_warps, "num_stages": self.num_stages}


def fill(tile: Tile, edge: str, rows: int, beside: int, device: torch.device) -> Tile:
    """The tile with as few as 16 rows, while the GPU would not be filled by so many rows ``beside`` each other."""
    block = tile.blocks[edge]
    while block > 16 and cdiv(rows, block) * beside < processors(device):
        block //= 2
    return tile._replace(blocks={**tile.blocks, edge: block})


# --- launches ----------------------------------------------------------------------------------------------------------------------


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Every kernel is started here, on a one-dimensional grid (its other axes hold only 65535).

    Triton finds the kernel it compiled before by looking at each argument in Python, some forty of them, which takes longer than many kernels run. So
    it is asked once for every kind of call, and what it answers with is started directly from then on.
    """
    if programs <= 0:
        return
    if INTERPRET or torch.version.hip is not None:  # for ROCm Triton tells tensors of more than 2 GB apart, too
        kernel[(programs,)](*args, **options)
        return
    # It compiles anew for another dtype or alignment, and for other properties of a number, which are the same for the same number.
    kinds = [(a.dtype if a.data_ptr() % 16 == 0 else (a.dtype,)) if isinstance(a, Tensor) else a for a in args]
    key = (kernel, torch.cuda.current_device(), *options, *options.values(), *kinds)
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(programs, 1, 1)](*args, *constants)
        return
    if len(_compiled) >= _MOST_COMPILED:  # lengths that are never the same
        _compiled.clear()
    compiled = kernel[(programs,)](*args, **options)
    _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST_COMPILED = 4096


@functools.cache
def processors(device: torch.device) -> int:
    """Programs to have in flight: the GPU's multiprocessors; an A100's when compiling ahead of time (meta); few under the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 108 if device.type == "meta" else 8


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def reaches_64_bit(*tensors: Tensor) -> bool:
    """Whether an offset within one entry of the first axis of any of these passes 2**31."""
    return any(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31 for t in tensors)


def splits(pieces: int, units: int, wanted: int, least: int) -> tuple[int, int]:
    """Cut ``units`` of work, of which ``pieces`` like it run beside each other, into (splits, units per split).

    Enough splits to have ``wanted`` programs, each of at least ``least`` units where there are that many; none is empty.
    """
    count = max(1, min(cdiv(wanted, pieces), units // least))
    length = cdiv(units, count)
    return cdiv(units, length), length


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Sum of ``parts`` over its first axis, written to ``out`` (contiguous)."""
    rows, columns = parts.shape[0], out.numel()
    block_r = power(rows, 1, 32)
    block_c = power(columns, 16, 2048 // block_r)
    launch(
        sum_parts_kernel,
        cdiv(columns, block_c),
        parts,
        out,
        rows,
        columns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        INTERPRET=INTERPRET,
        num_warps=4,
    )
    return out


class Made:
    """Small tensors that all calls of a kind read: of the last few kinds, and of those in a CUDA graph, which reads them whenever it is replayed."""

    MOST = 64

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}
        self._captured: dict[Any, Any] = {}
        self._making = threading.Lock()

    def get(self, key: Any, like: Tensor, make: Callable[[], _T]) -> _T:
        """What is kept under ``key``, or else made; for a call on tensors like this one."""
        capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
        found = self.made.get(key)
        if found is None:
            found = make()
            if not capturing:  # what is made while a graph is captured is memory of that graph
                with self._making:
                    while len(self.made) >= self.MOST:
                        del self.made[next(iter(self.made))]
                    self.made[key] = found
        elif capturing:  # it stays
            found = self._captured.setdefault(key, found)
        return found
