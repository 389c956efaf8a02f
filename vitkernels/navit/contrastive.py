"""The contrastive loss of image and text pairs over all processes, exact, without the B x B matrix (NaViT, arXiv 2307.06304, section 2.3).

The blocks of text features travel round the ring of processes, each with the running maximum and sum of its columns (backward: with its gradient). A
process keeps the maxima and sums of its own rows, and sees of the B x B logits one [B_local, chunk] piece at a time; backward computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["softmax", "sigmoid"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    kind: Kind = "softmax",
    bias: Tensor | float | None = None,
    chunk: int = 1024,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The contrastive loss of the global batch of B pairs, with ``logits[i, j] = logit_scale * image[i] @ text[j] (+ bias)``.

    ``"softmax"`` (CLIP) is ``(cross_entropy(logits, arange(B)) + cross_entropy(logits.T, arange(B))) / 2``; ``"sigmoid"`` (SigLIP, arXiv 2303.15343)
    is ``-sum(logsigmoid(z * logits)) / B``, z = 1 on the diagonal and -1 elsewhere. Sums and exponentials are float32 (float64 for float64 features).

    It is a collective call, and so is its backward: every process of the group makes both, with the same ``kind``, ``logit_scale`` and ``bias``.

    **Value**: the mean over the global batch, the same number on every process. **Gradients**: ``image`` and ``text`` get the exact gradient of that
    number with respect to the local features; ``logit_scale`` and ``bias`` get this process's part of theirs, and the parts *sum* to the exact one.
    So parameter gradients are to be summed over the processes. DDP and FSDP average them: call ``(loss * world_size).backward()`` there. Every
    process's loss must be given the same gradient (the same multiplier, the same GradScaler).

    Args:
        image: features [B_local, D], normalised by the caller if they are to be. B_local may differ between processes, and be 0 on some.
        text: features [B_local, D]; row i belongs to row i of ``image``.
        logit_scale: what the products are multiplied with: one element, already exponentiated where the parameter is its logarithm.
        kind: which loss.
        bias: added to every logit, one element; for ``"sigmoid"`` only (a softmax does not see it).
        chunk: columns of logits that exist at a time: the largest temporary has ``B_local * chunk`` elements (or those of the features).
        group: the processes; default all of them, or this one alone if torch.distributed is not initialised.

    Returns:
        A scalar, float32 (float64 for float64 features). Second derivatives raise.

    Raises:
        ValueError: shapes that do not fit, here or between the processes (then on all of them); ``bias`` with ``"softmax"``; an empty global batch;
            a process that is not in ``group``.
        TypeError: features that are no floating tensors of one dtype.
    """
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"contrastive_loss: kind is {kind!r}; it must be 'softmax' or 'sigmoid'")
    if kind == "softmax" and bias is not None:
        raise ValueError("contrastive_loss: bias is given with kind='softmax', whose value does not depend on it; leave it out")
    if chunk <= 0:
        raise ValueError(f"contrastive_loss: chunk is {chunk}; it must be positive")
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(f"contrastive_loss: image has shape {list(image.shape)} and text {list(text.shape)}; both must be [B_local, D]")
    if image.dtype not in _DTYPES or image.dtype is not text.dtype or image.device != text.device:
        raise TypeError(
            f"contrastive_loss: image is {image.dtype} on {image.device}, text {text.dtype} on {text.device}; they must be alike, of a floating dtype"
        )
    dtype = torch.promote_types(image.dtype, torch.float32)
    scale = _one_element("logit_scale", logit_scale, image, dtype)
    offset = None if bias is None else _one_element("bias", bias, image, dtype)
    ring = _Ring(image, text, kind, group)
    return _ContrastiveLoss.apply(image, text, scale, offset, ring, kind, chunk)


def _one_element(name: str, value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"contrastive_loss: {name} has shape {list(value.shape)}; it must have one element")
    return value.reshape(()).to(like.device, dtype)


class _Ring:
    """The processes in a circle: a block goes to the next one and comes from the one before, until it is home again."""

    def __init__(self, image: Tensor, text: Tensor, kind: Kind, group: dist.ProcessGroup | None) -> None:
        self.rank, self.sizes, self.text_wants_grad, self._group = 0, [image.shape[0]], text.requires_grad, group
        if group is not None or (dist.is_available() and dist.is_initialized()):
            self.rank = dist.get_rank(group)
            if self.rank < 0:
                raise ValueError("contrastive_loss: this process is not in the group it was given")
            numbers = [*image.shape, _DTYPES.index(image.dtype), kind == "sigmoid", text.requires_grad]
            mine = torch.tensor(numbers, device=image.device)
            gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, mine, group=group)
            every = torch.stack(gathered).tolist()
            if any(one[1:4] != every[0][1:4] for one in every):
                seen = ", ".join(f"[{n}, {d}] {_DTYPES[t]} {('softmax', 'sigmoid')[k]}" for n, d, t, k, _ in every)
                raise ValueError(f"contrastive_loss: the processes disagree: features by rank are {seen}; D, dtype and kind must be the same")
            self.sizes = [one[0] for one in every]
            self.text_wants_grad = any(one[4] for one in every)
        self.world, self.total = len(self.sizes), sum(self.sizes)
        if not self.total:
            raise ValueError("contrastive_loss: the batch is empty on every process; it needs at least one pair")

    def owners(self) -> Iterator[int]:
        """Whose block is here, step by step; the first is our own."""
        return ((self.rank - step) % self.world for step in range(self.world))

    def pass_on(self, owner: int, *blocks: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Start sending the blocks of ``owner`` (rows first) to the next process; call the result for those that come instead."""
        if self.world == 1:
            return lambda: blocks
        rows = self.sizes[(owner - 1) % self.world]
        coming = tuple(block.new_empty(rows, *block.shape[1:]) for block in blocks)
        after, before = (self._peer((self.rank + step) % self.world) for step in (1, -1))
        operations = [dist.P2POp(dist.isend, block, after, self._group) for block in blocks if self.sizes[owner]]
        operations += [dist.P2POp(dist.irecv, block, before, self._group) for block in coming if rows]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> tuple[Tensor, ...]:
            for work in works:
                work.wait()
            return coming

        return wait

    def _peer(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def sum(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value, group=self._group)
        return value


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ring: _Ring, kind: Kind, chunk: int) -> Tensor:
        ctx.ring, ctx.chunk = ring, chunk
        with torch.autocast(image.device.type, enabled=False):
            scaled = image.to(scale.dtype) * scale
            if kind == "softmax":
                rows, columns = _normalisers(scaled, text, ring, chunk)
                matching = (scaled * text.to(scale.dtype)).sum(1)
                (row_max, row_sum), (column_max, column_sum) = rows.unbind(1), columns.unbind(1)
                loss = ((row_max - matching + row_sum.log()).sum() + (column_max - matching + column_sum.log()).sum()) / 2
                ctx.save_for_backward(image, text, scale, bias, rows, columns)
            else:
                loss = scaled.new_zeros(())
                texts = text.contiguous()
                for owner in ring.owners():
                    coming = ring.pass_on(owner, texts)
                    for _, _, logits, diagonal in _pieces(scaled, texts, bias, chunk, owner == ring.rank):
                        diagonal.neg_()
                        loss += torch.nn.functional.softplus(logits).sum()
                    (texts,) = coming()
                ctx.save_for_backward(image, text, scale, bias, None, None)
            return ring.sum(loss) / ring.total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _Gradients.apply(grad, *ctx.saved_tensors, ctx.ring, ctx.chunk)
        return (*(one if wanted else None for one, wanted in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None)


class _Gradients(torch.autograd.Function):
    """A function of its own, so that autograd knows what the gradients depend on: their derivative is an error, and not zero."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        ring: _Ring,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(image.device.type, enabled=False):
            wide = image.to(scale.dtype)
            scaled = wide * scale
            grad_scaled, grad_bias = torch.zeros_like(wide), scale.new_zeros(())
            # What travels: the texts, with softmax the maxima and sums of their columns, and last their gradients, which are not whole until the end.
            block: tuple[Tensor, ...] = (text.contiguous(),) if columns is None else (text.contiguous(), columns)
            grad_text = torch.zeros_like(wide)
            for owner in ring.owners():
                coming = ring.pass_on(owner, *block)
                for part, texts, logits, diagonal in _pieces(scaled, block[0], bias, chunk, owner == ring.rank):
                    if rows is None:
                        diagonal.neg_()
                        grad_logits = logits.sigmoid_()
                        diagonal.neg_()
                    else:
                        grad_logits = torch.exp(logits - rows[:, :1]).div_(rows[:, 1:])
                        maximum, total = block[1][part].unbind(1)
                        grad_logits += logits.sub_(maximum).exp_().div_(total)
                        grad_logits[part.start : part.start + diagonal.shape[0]].diagonal().sub_(2)
                    grad_scaled.addmm_(grad_logits, texts)
                    grad_bias += grad_logits.sum()
                    if ring.text_wants_grad:
                        grad_text[part].addmm_(grad_logits.T, scaled)
                block = coming()
                if ring.text_wants_grad:
                    (grad_text,) = ring.pass_on(owner, grad_text)()
            factor = grad / (ring.total if rows is None else 2 * ring.total)
            grad_image = (grad_scaled * (scale * factor)).to(image.dtype)
            return grad_image, (grad_text * factor).to(text.dtype), (grad_scaled * wide).sum() * factor, grad_bias * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("contrastive_loss: its second derivatives are not implemented; differentiate once, or use a dense loss")


def _pieces(scaled: Tensor, text: Tensor, bias: Tensor | None, chunk: int, own: bool) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The logits of our images with a block of texts, ``chunk`` columns at a time: (which texts, their features, logits [B_local, chunk], the view of
    the matching pairs among them: empty if the block is not our own).
    """
    if not scaled.shape[0]:
        return
    for start in range(0, text.shape[0], chunk):
        texts = text[start : start + chunk].to(scaled.dtype)
        logits = scaled @ texts.T
        if bias is not None:
            logits += bias
        count = texts.shape[0]
        yield slice(start, start + count), texts, logits, logits[start : start + count if own else start].diagonal()


def _normalisers(scaled: Tensor, text: Tensor, ring: _Ring, chunk: int) -> tuple[Tensor, Tensor]:
    """Of the whole rows of our images and the whole columns of our texts the maximum and the sum of exp(logit - maximum), both [B_local, 2]. The two
    stay apart, as in a softmax: as one number, the logarithm of the sum, they would cost the gradients digits where the logits are large.
    """
    rows = scaled.new_tensor([-math.inf, 0.0]).repeat(len(scaled), 1)
    columns = rows.clone()
    texts = text.contiguous()
    for owner in ring.owners():
        coming = ring.pass_on(owner, texts)
        for part, _, logits, _ in _pieces(scaled, texts, None, chunk, False):
            _add(rows, logits)
            _add(columns[part], logits.T)
        (texts,) = coming()
        (columns,) = ring.pass_on(owner, columns)()
    return rows, columns


def _add(normaliser: Tensor, logits: Tensor) -> None:
    """Take the rows of ``logits`` [n, m] into the maxima and sums ``normaliser`` [n, 2]."""
    maximum, total = normaliser.unbind(1)
    larger = torch.maximum(maximum, logits.amax(1))
    total *= torch.exp(maximum - larger)
    total += torch.exp(logits - larger.unsqueeze(1)).sum(1)
    maximum.copy_(larger)
