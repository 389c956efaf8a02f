"""Cascaded group attention in Triton's interpreter, where the contract's samples are too small: windows of several tiles, programs that walk several
windows, sums in several parts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels import accuracy
from vitkernels.ops.cascaded_group import op, reference
from vitkernels.registry import Sample

pytest.importorskip("triton")

from vitkernels.ops import _triton as shared

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process"),
    pytest.mark.usefixtures("poison"),
]


@dataclass(frozen=True)
class Call:
    """One call of the packed op, of normal numbers scaled so that every layer's output is of order one."""

    shape: tuple[int, int, int, int]
    kernels: tuple[int, ...]
    window: int
    key_dim: int = 16
    value_dim: int | None = None
    bias: bool = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{''.join(map(str, self.kernels))}-w{self.window}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def options(self) -> tuple[Any, ...]:
        return list(self.kernels), self.key_dim, self.key_dim**-0.5, self.window

    def sample(self) -> Sample:
        generator = torch.Generator().manual_seed(0)
        heads, channels = len(self.kernels), self.shape[1]
        split = channels // heads
        dim = self.value_dim or split
        rows = 2 * self.key_dim + dim

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(self.dtype).requires_grad_()

        x = draw(*self.shape)
        if self.channels_last:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        dw_weight = torch.cat([draw(self.key_dim * k * k, scale=1 / k) for k in self.kernels]).detach().requires_grad_()
        biases = [draw(*size, scale=0.3) if self.bias else None for size in ((heads, rows), (heads, self.key_dim), (channels,))]
        table, proj = draw(heads, self.window**2), draw(channels, heads * dim, scale=(2 / (heads * dim)) ** 0.5)
        return Sample(str(self), (x, draw(heads, rows, split, scale=split**-0.5), biases[0], dw_weight, biases[1], table, proj, biases[2]))

    def eager(self, x: Tensor, *weights: Tensor | None) -> Tensor:
        kernels, key_dim, scale, window = self.options
        return reference.cascaded_group_attention(x, **op.unpack(op.Packed(*weights, kernels, key_dim)), scale=scale, window=window)

    def fast(self, *tensors: Tensor | None) -> Tensor:
        return torch.ops.vitkernels_triton.cascaded_group_attention(*tensors, *self.options)


# Kernels of different sizes, a window that divides the map one way only.
FIRST = Call((2, 24, 4, 6), (5, 3), 4)
CALLS = (
    # 81 tokens: two tiles of 64 or three of 32, the last one short; a key dim that is no power of two; a map that is filled up both ways.
    Call((1, 12, 10, 9), (7, 3), 9, key_dim=5),
    Call((1, 12, 9, 9), (3, 5), 9, key_dim=20, dtype=torch.bfloat16, channels_last=True),
    # The largest window the models have.
    Call((1, 6, 14, 14), (3,), 14, key_dim=4, value_dim=10, bias=False),
    # More value channels than one tile has, more qkv rows and input channels, too.
    Call((1, 72, 2, 2), (3,), 2, value_dim=70),
    Call((1, 80, 2, 3), (1,), 2, value_dim=70, dtype=torch.bfloat16, bias=False),
    # 36 windows: more than the interpreter's programs, so that each walks several and sums their scores' gradients.
    Call((1, 4, 11, 12), (3,), 2, key_dim=4),
    # More rows than one part of the weights' sums takes.
    Call((8, 2, 8, 8), (1,), 8, key_dim=1, dtype=torch.float16),
)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_by_the_rule(call: Call) -> None:
    sample = call.sample()
    comparisons = accuracy.Judge(call.eager, sample)(call.fast)
    assert len(comparisons) == 1 + len(accuracy.leaves(sample))
    broken = [f"{c.name}: error {c.error:.3e}, eager's {c.eager_error:.3e}, floor {c.floor:.3e}" for c in comparisons if not c.holds]
    assert not broken, "\n".join(broken)


def _programs(call: Call, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Programs of every kernel that forward and backward would start."""
    counts: dict[str, int] = {}
    monkeypatch.setattr(shared, "launch", lambda kernel, programs, *args, **options: counts.update({kernel.fn.__name__: programs}))
    sample = call.sample()
    torch.autograd.grad(call.fast(*sample.args).sum(), accuracy.leaves(sample))
    return counts


def test_the_calls_are_as_large_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = _programs(CALLS[5], monkeypatch)
    assert windows["cascaded_group_attention_bwd_kernel"] < windows["cascaded_group_attention_fwd_kernel"] == 36
    # One block of weights, so that every program but the first is a further part of the sum.
    assert _programs(CALLS[6], monkeypatch)["cascaded_group_attention_bwd_qkv_weight_kernel"] > 1


def test_input_and_weight_gradients_alone() -> None:
    """Each is what it is with the other, bit for bit, and what is not needed is empty."""
    *tensors, proj_bias = (None if t is None else t.detach() for t in FIRST.sample().args)
    y = FIRST.fast(*tensors, proj_bias)
    both, only_x, only_weights, neither = (
        torch.ops.vitkernels_triton.cascaded_group_attention_backward(y, *tensors, *FIRST.options, *needed)
        for needed in ((True, True), (True, False), (False, True), (False, False))
    )
    assert torch.equal(only_x[0], both[0])
    assert all(torch.equal(a, b) for a, b in zip(only_weights[1:], both[1:], strict=True))
    assert [g.numel() for g in (*only_x[1:], only_weights[0], *neither)] == [0] * 16


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_any_strides(layout: str) -> None:
    """Input and output gradient of other strides give the gradients of their contiguous copies, bit for bit."""

    def arranged(t: Tensor) -> Tensor:
        if layout == "expanded":
            return t[:1, :1].expand(t.shape)
        if layout == "transposed":
            return t.transpose(2, 3).contiguous().transpose(2, 3)
        return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]

    x, *weights = (t.detach() for t in FIRST.sample().args)
    grad = torch.randn(FIRST.shape, generator=torch.Generator().manual_seed(1))
    qkv_weight = weights[0].transpose(1, 2).contiguous().transpose(1, 2)
    proj_weight = weights[5].t().contiguous().t()
    tensors = arranged(x), qkv_weight, *weights[1:5], proj_weight
    results = []
    for grad_y, arguments in ((arranged(grad), tensors), (arranged(grad).contiguous(), [t.contiguous() for t in tensors])):
        y = FIRST.fast(*arguments, weights[6])
        grads = torch.ops.vitkernels_triton.cascaded_group_attention_backward(grad_y, *arguments, *FIRST.options, True, True)
        results.append((y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_batch() -> None:
    """No image: gradients of nothing are zero."""
    call = Call((0, 8, 3, 3), (3, 1), 3)
    sample = call.sample()
    y = call.fast(*sample.args)
    assert y.shape == (0, 8, 3, 3)
    for grad, tensor in zip(torch.autograd.grad(y.sum(), accuracy.leaves(sample)), accuracy.leaves(sample), strict=True):
        assert grad.shape == tensor.shape and not grad.any()
