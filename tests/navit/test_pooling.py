"""Attention pooling against a loop over the images. The mean and the maximum are ops, and tested as such."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitkernels
from vitkernels.navit import AttentionPooling
from vitkernels.ops import PackedLayout

LENGTHS = [3, 0, 1, 7, 0]
DIM = 12


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request: pytest.FixtureRequest) -> object:
    with vitkernels.backend(request.param):
        yield request.param


def packed() -> tuple[Tensor, PackedLayout]:
    """Tokens of LENGTHS with room for more; what is in the padding is nobody's business."""
    x = torch.randn(15, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[sum(LENGTHS) :] = 1e9
    return x, PackedLayout.from_lengths(LENGTHS, capacity=15, max_sequences=6)


def pieces(x: Tensor) -> list[Tensor]:
    return [*x[: sum(LENGTHS)].split(LENGTHS), x[:0]]


@pytest.mark.parametrize("qk_norm", [None, "layer", "rms", "l2"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention(qk_norm: str | None, bias: bool) -> None:
    x, layout = packed()
    x.requires_grad_()
    torch.manual_seed(0)
    pool = AttentionPooling(DIM, 3, qk_norm=qk_norm, bias=bias, dtype=torch.float64)  # type: ignore[arg-type]
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)

    def normalised(t: Tensor, weight: Tensor | None) -> Tensor:
        if qk_norm is None:
            return t
        if qk_norm == "layer":
            return F.layer_norm(t, t.shape[-1:], weight)
        scale = F.normalize(t, dim=-1) * t.shape[-1] ** 0.5 if qk_norm == "l2" else F.rms_norm(t, t.shape[-1:], eps=1e-6)
        return scale * weight

    rows = []
    for tokens in pieces(x):
        q = normalised(pool.to_q(pool.query).view(3, 1, -1), pool.q_norm)
        k, v = (t.view(len(tokens), 3, DIM // 3).transpose(0, 1) for t in pool.to_kv(tokens).chunk(2, dim=1))
        out = F.scaled_dot_product_attention(q, normalised(k, pool.k_norm), v) if len(tokens) else torch.zeros_like(q)
        rows.append(pool.proj(out.flatten()))
    expected, found = torch.stack(rows), pool(x, layout)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = [x, *pool.parameters()]
    for grad, truth in zip(torch.autograd.grad(found, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-10)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="dim is 12 and heads 5"):
        AttentionPooling(12, 5)
