"""Attention with memory: the reference against what the paper writes, one matrix of all tokens and a mask, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitkernels
from vitkernels import ops


def whole(q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, own_k: Tensor, own_v: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Rows of the class tokens of T tasks out of softmax([q; ..] [own; k; memory]^T) under the mask of section 3.2."""
    batch, _, tasks, _ = q.shape
    expanded = [m.permute(1, 0, 2)[None].repeat(batch, 1, 1, 1) for m in (memory_k, memory_v)]
    keys, values = torch.cat((own_k, k, expanded[0]), dim=2), torch.cat((own_v, v, expanded[1]), dim=2)
    mask = torch.zeros(tasks, keys.shape[2], dtype=torch.bool)
    first = tasks + k.shape[2]
    for t, length in enumerate(groups):
        mask[t, t] = True
        mask[t, tasks : tasks + k.shape[2]] = True
        mask[t, first : first + length] = True
        first += length
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


@pytest.mark.parametrize("groups", [(4, 0, 9), (1,), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_tasks_are_rows_of_the_whole_matrix(groups: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    tasks, memories = len(groups), sum(groups)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    tensors = (draw(3, 2, tasks, 8), draw(3, 2, 11, 8), draw(3, 2, 11, 6), draw(memories, 2, 8), draw(memories, 2, 6))
    own = (draw(3, 2, tasks, 8), draw(3, 2, tasks, 6))
    expected = whole(*tensors, *own, groups)
    with vitkernels.backend(backend):
        got = ops.memory_attention(*tensors, own_k=own[0], own_v=own[1], groups=groups)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    weights = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (*tensors, *own)) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_one_memory_is_seen_by_every_token() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=torch.float64) for _ in range(3))
    memory = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    expanded = memory.permute(0, 2, 1, 3)[:, None].repeat(1, 2, 1, 1, 1)
    expected = F.scaled_dot_product_attention(q, torch.cat((k, expanded[0]), dim=2), torch.cat((v, expanded[1]), dim=2), scale=0.3)
    torch.testing.assert_close(ops.memory_attention(q, k, v, *memory, scale=0.3), expected, rtol=1e-12, atol=1e-13)


def test_a_task_is_the_same_to_the_bit_whatever_other_tasks_do() -> None:
    """Not how many there are: a tile's rows share products."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 50, 16), torch.randn(2, 3, 50, 16)
    memory_k, memory_v = torch.randn(12, 3, 16), torch.randn(12, 3, 16)
    groups = (3, 3, 3, 3)
    before = ops.memory_attention(q, k, v, memory_k, memory_v, groups=groups)
    memory_k[3:6] = torch.nan
    q[:, :, 1] = 1e4
    after = ops.memory_attention(q, k, v, memory_k, memory_v, groups=groups)
    assert after[:, :, 1].isnan().all()
    for t in (0, 2, 3):
        assert torch.equal(after[:, :, t], before[:, :, t])
