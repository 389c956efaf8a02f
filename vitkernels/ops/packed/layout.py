"""Where each sequence lies in a packed batch: built once per batch, read by every layer and by the backward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check

TILE = 64  # rows of a work-list entry: what one Triton program takes

Lengths = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Sequences of any lengths, one after the other in the rows of q and of k and v. Query i of sequence s sees the keys of sequence s.

    Build it with :meth:`from_lengths`, :meth:`from_cu_seqlens` or :meth:`from_image_ids`, once per batch. The ops read no host number of it but the
    two totals, so that with a fixed ``capacity`` and ``max_sequences`` every batch looks the same to torch.compile and to a CUDA graph.

    Attributes:
        cu_seqlens_q: int32 [S + 1]: sequence s holds the query rows from ``cu_seqlens_q[s]`` up to ``cu_seqlens_q[s + 1]``.
        cu_seqlens_k: the same for keys and values; the same tensor in self-attention.
        max_seqlen_q: the longest sequence of queries, at least.
        max_seqlen_k: the longest sequence of keys, at least.
        total_q: rows of q. Rows beyond the last sequence are padding: they see nothing, their output is 0.
        total_k: rows of k and v.
        seqused_k: int32 [S], only the first ``seqused_k[s]`` keys of sequence s count; ``None``: all.
        work: what the Triton kernels read, int32 [2 total_q + 2 total_k + tiles_q + tiles_k], see :func:`work_list`; ``None`` on the CPU.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    total_q: int
    total_k: int
    seqused_k: Tensor | None = None
    work: Tensor | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths_q: Lengths,
        lengths_k: Lengths | None = None,
        *,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        max_sequences: int | None = None,
    ) -> PackedLayout:
        """Sequences of these lengths.

        Args:
            lengths_q: tokens of each sequence, S integers; 0 is a length like any other.
            lengths_k: of the keys, where they are not the queries' own tokens.
            device: where the tensors are to lie.
            capacity: rows of the token tensors, if more than the sum of the lengths: a token budget.
            max_sequences: as many sequences as the layout makes room for; those beyond S are empty.

        Raises:
            ValueError: a negative length, different numbers of sequences, a capacity or ``max_sequences`` that is too small.
            TypeError: lengths that are not integers, or are on a GPU (use :meth:`from_cu_seqlens`).
        """
        rows = [_host_lengths("lengths_q", lengths_q)]
        if lengths_k is not None:
            rows.append(_host_lengths("lengths_k", lengths_k))
            if len(rows[1]) != len(rows[0]):
                raise ValueError(f"PackedLayout: lengths_k holds {len(rows[1])} lengths; it must hold {len(rows[0])}, one for each of lengths_q")
        count = len(rows[0])
        if max_sequences is not None and max_sequences < count:
            raise ValueError(f"PackedLayout: max_sequences is {max_sequences}; it must be at least {count}, the number of sequences")
        ends = []
        for name, lengths in zip(("lengths_q", "lengths_k"), rows, strict=False):
            total = int(lengths.sum())
            if capacity is not None and capacity < total:
                raise ValueError(f"PackedLayout: capacity is {capacity}; it must be at least {total}, the sum of {name}")
            if total > torch.iinfo(torch.int32).max:
                raise ValueError(f"PackedLayout: {name} sums to {total}; it must be less than 2**31")
            padded = np.zeros(1 + max(count, max_sequences or 0), np.int32)
            padded[1 : count + 1] = np.cumsum(lengths)
            padded[count + 1 :] = total
            ends.append(torch.from_numpy(padded).to(device))
        longest = [int(lengths.max(initial=0)) for lengths in rows]
        totals = [int(lengths.sum()) if capacity is None else capacity for lengths in rows]
        return cls._with_work(ends[0], ends[-1], longest[0], longest[-1], totals[0], totals[-1], None)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        total_q: int | None = None,
        total_k: int | None = None,
        seqused_k: Tensor | None = None,
    ) -> PackedLayout:
        """From cumulative lengths, as flash-attn and ``torch.nn.attention.varlen`` take them.

        Args:
            cu_seqlens_q: int32 or int64 [S + 1], from 0, not decreasing.
            cu_seqlens_k: the same of the keys; default ``cu_seqlens_q``.
            max_seqlen_q: the longest sequence, at least; default: found out, and so is everything left out below.
            max_seqlen_k: the same of the keys.
            total_q: rows of q; default ``cu_seqlens_q[-1]``.
            total_k: rows of k; default ``cu_seqlens_k[-1]``.
            seqused_k: int [S], the keys in use of each sequence.

        Tensors on a GPU are checked here once, which waits for the GPU; inside a CUDA graph or a compiled region, where that cannot be, they are
        taken as they are and all four numbers must be given.

        Raises:
            ValueError: a wrong shape, not from 0, decreasing, beyond the rows, a longest length that is too small, a mix of devices.
            TypeError: a wrong dtype.
        """
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        check_cu_seqlens("PackedLayout", "cu_seqlens_q", cu_seqlens_q)
        check_cu_seqlens("PackedLayout", "cu_seqlens_k", cu_seqlens_k)
        _check.has_shape("PackedLayout", "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "[S + 1], as long as cu_seqlens_q,")
        if cu_seqlens_k.device != cu_seqlens_q.device:
            raise ValueError(f"PackedLayout: cu_seqlens_k is on {cu_seqlens_k.device}; it must be on {cu_seqlens_q.device}, with cu_seqlens_q")
        if seqused_k is not None:
            if seqused_k.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"PackedLayout: seqused_k has dtype {seqused_k.dtype}; it must be int32 or int64")
            _check.has_shape("PackedLayout", "seqused_k", seqused_k, (len(cu_seqlens_q) - 1,), "[S]")
        given = (max_seqlen_q, max_seqlen_k, total_q, total_k)
        if can_read(cu_seqlens_q):
            given = _checked_values(cu_seqlens_q, cu_seqlens_k, seqused_k, *given)
        elif None in given:
            raise ValueError(
                "PackedLayout: max_seqlen_q, max_seqlen_k, total_q and total_k must all be given where cu_seqlens cannot be read "
                "(in a compiled region or a CUDA graph)"
            )
        cu_seqlens_q, cu_seqlens_k, seqused_k = as_int32(cu_seqlens_q, cu_seqlens_k, seqused_k)
        return cls._with_work(cu_seqlens_q, cu_seqlens_k, *given, seqused_k)  # type: ignore[arg-type]

    @classmethod
    def from_image_ids(cls, image_ids: Tensor) -> PackedLayout:
        """From the image each token belongs to, for the padded-batch form.

        Args:
            image_ids: integers [R, S] (or [S]): tokens of one row with one id are one image and see each other; a negative id is padding. The tokens
                of an image are neighbours. Ids of different rows have nothing to do with each other.

        The layout is that of the [R * S] rows of the flattened batch; padding stays where it is and is no one's key. On a GPU, and while compiling,
        the ids are not looked at by the host: the layout makes room for R * S sequences, and that an image's tokens are neighbours is not checked.

        Raises:
            ValueError: a wrong shape, or an image in two pieces.
            TypeError: not integers.
        """
        _check.is_tensor("PackedLayout", "image_ids", image_ids, "[R, S]")
        if image_ids.is_floating_point() or image_ids.is_complex() or image_ids.dtype is torch.bool:
            raise TypeError(f"PackedLayout: image_ids has dtype {image_ids.dtype}; it must be an integer dtype")
        if image_ids.dim() not in (1, 2):
            raise ValueError(f"PackedLayout: image_ids has shape {_check.shape_of(image_ids)}; it must be [R, S] or [S]")
        ids = image_ids if image_ids.dim() == 2 else image_ids[None]
        rows, length = ids.shape
        total = rows * length
        if image_ids.device.type != "cpu" or not can_read(image_ids):
            first = torch.ones_like(ids, dtype=torch.bool)
            first[:, 1:] = ids[:, 1:] != ids[:, :-1]
            run = first.flatten().cumsum(0)  # 1 for the tokens of the first run
            cu_seqlens = torch.searchsorted(run, torch.arange(total + 1, device=ids.device), right=True).to(torch.int32)
            padding = torch.zeros(total + 1, dtype=torch.int32, device=ids.device).index_put((run,), (ids.flatten() < 0).to(torch.int32))[1:]
            return cls._with_work(cu_seqlens, cu_seqlens, length, length, total, total, cu_seqlens.diff() * (1 - padding))
        values = ids.numpy()
        starts = np.ones((rows, length), bool)
        starts[:, 1:] = values[:, 1:] != values[:, :-1]
        row, column = np.nonzero(starts)
        run_ids = values[row, column]
        _check_in_one_piece(row, run_ids)
        cu = np.append(row * length + column, total).astype(np.int32)
        lengths = np.diff(cu)
        cu_seqlens = torch.from_numpy(cu)
        used = torch.from_numpy(np.where(run_ids < 0, 0, lengths).astype(np.int32)) if (run_ids < 0).any() else None
        longest = int(lengths.max(initial=0))
        return cls._with_work(cu_seqlens, cu_seqlens, longest, longest, total, total, used)

    @classmethod
    def _with_work(
        cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int, total_q: int, total_k: int, seqused_k: Tensor | None
    ) -> PackedLayout:
        work = None
        if cu_seqlens_q.device.type != "cpu" or backends.interpreting():
            work = work_list(cu_seqlens_q, cu_seqlens_k, seqused_k, total_q, total_k)
        return cls(cu_seqlens_q, cu_seqlens_k, max_q, max_k, total_q, total_k, seqused_k, work)

    @property
    def sequences(self) -> int:
        """How many sequences there is room for, S."""
        return self.cu_seqlens_q.shape[0] - 1

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, int, int, int], ...]:
        """On the host, for each sequence: its first query row, the end, its first key row, the end of those in use. Waits for a GPU, once."""
        q, k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        used = [end - begin for begin, end in itertools.pairwise(k)] if self.seqused_k is None else self.seqused_k.tolist()
        return tuple((q[s], q[s + 1], k[s], k[s] + used[s]) for s in range(len(used)))

    def cross(self, queries: int) -> PackedLayout:
        """The layout of ``queries`` rows of q for each sequence against these keys: attention pooling.

        Raises:
            ValueError: ``queries`` is negative.
        """
        if queries < 0:
            raise ValueError(f"PackedLayout: queries is {queries}; it must not be negative")
        cu_seqlens_q = torch.arange(self.sequences + 1, dtype=torch.int32, device=self.cu_seqlens_k.device) * queries
        return self._with_work(cu_seqlens_q, self.cu_seqlens_k, queries, self.max_seqlen_k, self.sequences * queries, self.total_k, self.seqused_k)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        """The same layout on another device."""
        q = self.cu_seqlens_q.to(device, non_blocking=non_blocking)
        k = q if self.cu_seqlens_k is self.cu_seqlens_q else self.cu_seqlens_k.to(device, non_blocking=non_blocking)
        used = None if self.seqused_k is None else self.seqused_k.to(device, non_blocking=non_blocking)
        return self._with_work(q, k, self.max_seqlen_q, self.max_seqlen_k, self.total_q, self.total_k, used)


def sequence_of_rows(cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of each of ``rows`` rows the sequence it is in, int64 [rows], and whether it is in any, bool [rows]. No host sync."""
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    last = cu_seqlens.shape[0] - 2
    return sequence.clamp(0, max(last, 0)), (sequence >= 0) & (sequence <= last)


def row_ranges(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, total_q: int, total_k: int) -> tuple[Tensor, Tensor]:
    """What each query row sees and what sees each key row, both int32 [rows, 2]: first row and end, (0, 0) where there is nothing. No host sync."""
    if cu_seqlens_q.shape[0] == 1:
        return (cu_seqlens_q.new_zeros((total_q, 2)), cu_seqlens_q.new_zeros((total_k, 2)))
    used = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    sequence, inside = sequence_of_rows(cu_seqlens_q, total_q)
    begin = cu_seqlens_k[sequence]
    seen = torch.stack((begin, begin + used[sequence]), dim=1)
    seen = seen * (inside & (seen[:, 1] > seen[:, 0]))[:, None]
    sequence, inside = sequence_of_rows(cu_seqlens_k, total_k)
    counted = torch.arange(total_k, dtype=torch.int32, device=used.device) - cu_seqlens_k[sequence] < used[sequence]
    seeing = torch.stack((cu_seqlens_q[sequence], cu_seqlens_q[sequence + 1]), dim=1)
    seeing = seeing * (inside & counted & (seeing[:, 1] > seeing[:, 0]))[:, None]
    return seen.to(torch.int32), seeing.to(torch.int32)


def work_list(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, total_q: int, total_k: int) -> Tensor:
    """The Triton kernels' work list: both :func:`row_ranges`, then the order in which the tiles of :data:`TILE` query rows are taken, those with the
    most keys first, and the same of the tiles of key rows; flat int32, computed on the device without waiting for it.
    """
    ranges = row_ranges(cu_seqlens_q, cu_seqlens_k, seqused_k, total_q, total_k)
    return torch.cat([r.flatten() for r in ranges] + [_long_first(r) for r in ranges])


def _long_first(ranges: Tensor) -> Tensor:
    tiles = -(-ranges.shape[0] // TILE)
    padded = torch.nn.functional.pad(ranges, (0, 0, 0, tiles * TILE - ranges.shape[0])).view(tiles, TILE, 2)
    empty = padded[:, :, 1] == padded[:, :, 0]
    begin = padded[:, :, 0].masked_fill(empty, torch.iinfo(torch.int32).max).amin(1)
    extent = (padded[:, :, 1].amax(1) - begin).clamp_min(0)
    return extent.argsort(descending=True, stable=True).to(torch.int32)


def traced(tensor: Tensor) -> bool:
    """Whether the values stand for others now: compiled, traced, transformed or fake."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or isinstance(tensor, torch._subclasses.FakeTensor)
    )


def can_read(tensor: Tensor) -> bool:
    """Whether the host may look at the values now."""
    return not traced(tensor) and (tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing())


def _host_lengths(name: str, lengths: Lengths) -> np.ndarray:
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise TypeError(f"PackedLayout: {name} is on {lengths.device}; it must be on the CPU, or a list (cu_seqlens may be on a GPU)")
        lengths = lengths.numpy()
    values = np.asarray(lengths)
    if not values.size:
        values = values.astype(np.int64)
    if values.dtype.kind not in "iu":
        raise TypeError(f"PackedLayout: {name} has dtype {values.dtype}; it must hold integers")
    if values.ndim != 1:
        raise ValueError(f"PackedLayout: {name} has shape {list(values.shape)}; it must be 1-dimensional, [S]")
    if (values < 0).any():
        where = int((values < 0).argmax())
        raise ValueError(f"PackedLayout: {name}[{where}] is {values[where]}; a length must not be negative")
    return values.astype(np.int64)


def as_int32(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as kernels take them; in self-attention the second stays the first."""
    same = cu_seqlens_k is cu_seqlens_q
    cu_seqlens_q = cu_seqlens_q.to(torch.int32).contiguous()
    cu_seqlens_k = cu_seqlens_q if same else cu_seqlens_k.to(torch.int32).contiguous()
    return cu_seqlens_q, cu_seqlens_k, None if seqused_k is None else seqused_k.to(torch.int32).contiguous()


def check_cu_seqlens(op: str, name: str, value: Tensor) -> None:
    """Its shape and dtype; its values are another matter."""
    _check.is_tensor(op, name, value, "int32 [S + 1]")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} has dtype {value.dtype}; it must be int32 (or int64)")
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"{op}: {name} has shape {_check.shape_of(value)}; it must be [S + 1] for S sequences, at least [1]")


def _checked_values(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    total_q: int | None,
    total_k: int | None,
) -> tuple[int, int, int, int]:
    """The four numbers, found or checked."""
    found = []
    sides = [("q", cu_seqlens_q, max_seqlen_q, total_q), ("k", cu_seqlens_k, max_seqlen_k, total_k)]
    for side, cu_seqlens, longest, total in sides:
        values = cu_seqlens.cpu().numpy()
        name = f"cu_seqlens_{side}"
        if values[0] != 0:
            raise ValueError(f"PackedLayout: {name} starts at {values[0]}; it must start at 0")
        lengths = np.diff(values)
        if (lengths < 0).any():
            where = int((lengths < 0).argmax())
            raise ValueError(f"PackedLayout: {name} falls from {values[where]} to {values[where + 1]} at {where + 1}; it must not decrease")
        if total is not None and values[-1] > total:
            raise ValueError(f"PackedLayout: {name} ends at {values[-1]}; it must not go beyond total_{side} = {total}, the rows of {side}")
        most = int(lengths.max(initial=0))
        if longest is not None and longest < most:
            raise ValueError(f"PackedLayout: max_seqlen_{side} is {longest}; it must be at least {most}, the longest sequence")
        found.append((most if longest is None else longest, int(values[-1]) if total is None else total, lengths))
    if seqused_k is not None:
        used = seqused_k.cpu().numpy()
        wrong = (used < 0) | (used > found[1][2])
        if wrong.any():
            where = int(wrong.argmax())
            raise ValueError(
                f"PackedLayout: seqused_k[{where}] is {used[where]}; it must be between 0 and {found[1][2][where]}, the keys of that sequence"
            )
    return found[0][0], found[1][0], found[0][1], found[1][1]


def _check_in_one_piece(row: np.ndarray, run_ids: np.ndarray) -> None:
    """No id (other than padding) begins two runs of one row."""
    images = run_ids >= 0
    pairs = np.stack((row[images], run_ids[images]), axis=1)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    if (counts > 1).any():
        r, i = unique[counts > 1][0]
        raise ValueError(f"PackedLayout: image_ids of row {r} has image {i} in {counts.max()} pieces; the tokens of an image must be neighbours")
