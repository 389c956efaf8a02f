"""Re-Attention beyond the contract: running statistics, the map that is asked for, memory, and who runs what the kernels do not take."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import ops
from vitkernels.ops.head_mixing.op import MOST_HEADS

OP = "re_attention"  # whose backends the fixture `backend` goes through
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def drawn(batch: int = 2, heads: int = 4, tokens: int = 17, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v and a mix."""
    generator = torch.Generator().manual_seed(seed)
    qkv = (torch.randn((batch, heads, tokens, dim), generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return (*qkv, (torch.randn((heads, heads), generator=generator, dtype=torch.float64) * heads**-0.5).to(dtype))


def test_the_identity_mixes_nothing(backend: str) -> None:
    q, k, v, _ = drawn(dtype=torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(ops.re_attention(q, k, v, torch.eye(4)), plain.float(), rtol=1e-5, atol=1e-6)


def test_a_permutation_hands_maps_to_other_heads(backend: str) -> None:
    q, k, v, _ = drawn(dtype=torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    got = ops.re_attention(q, k, v, torch.eye(4)[order])
    plain = torch.nn.functional.scaled_dot_product_attention(q[:, order].double(), k[:, order].double(), v.double())
    torch.testing.assert_close(got, plain.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics_are_batch_norms(backend: str, momentum: float) -> None:
    """After three steps of training with dropout off, in float32 beside ``nn.BatchNorm2d`` on the maps in float64."""
    norm = nn.BatchNorm2d(4, momentum=momentum).double()
    mean, var = torch.zeros(4), torch.ones(4)
    for seed in range(3):
        q, k, v, mix = drawn(seed=seed)
        maps = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        norm(torch.einsum("gh,bhij->bgij", mix, maps) + 0.5)
        arguments = (t.float() for t in (q, k, v, mix, torch.full((4,), 0.5)))
        ops.re_attention(*arguments, norm="batch", running_mean=mean, running_var=var, training=True, momentum=momentum)
    torch.testing.assert_close(mean, norm.running_mean.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, norm.running_var.float(), rtol=1e-5, atol=1e-9)


def test_evaluation_reads_the_statistics_and_leaves_them(backend: str) -> None:
    q, k, v, mix = drawn(dtype=torch.float32)
    mean, var = torch.full((4,), 0.1), torch.full((4,), 0.5)
    versions = mean._version, var._version
    out = ops.re_attention(q, k, v, mix, norm="batch", running_mean=mean, running_var=var)
    assert (mean._version, var._version) == versions
    folded = ops.re_attention(q, k, v, mix / (0.5 + 1e-5) ** 0.5, torch.full((4,), -0.1 / (0.5 + 1e-5) ** 0.5))
    torch.testing.assert_close(out, folded, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_leaves_the_statistics(backend: str) -> None:
    q, k, v, mix = (t[:0] if t.dim() == 4 else t for t in drawn(dtype=torch.float32))
    mean, var = torch.zeros(4), torch.ones(4)
    out = ops.re_attention(q, k, v, mix, norm="batch", running_mean=mean, running_var=var, training=True)
    assert out.shape == (0, 4, 17, 16) and mean.tolist() == [0.0] * 4 and var.tolist() == [1.0] * 4


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_the_map_that_was_applied(norm: str | None) -> None:
    q, k, v, mix = drawn()
    out, applied = ops.re_attention(q, k, v, mix, norm=norm, training=True, return_map=True)
    assert applied.shape == (2, 4, 17, 17)
    torch.testing.assert_close(applied @ v, out)
    torch.testing.assert_close(ops.re_attention(q, k, v, mix, norm=norm, training=True), out)


def test_a_kernel_asked_for_by_name_refuses_the_map_and_too_many_heads(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference refuses nothing")
    q, k, v, mix = drawn(dtype=torch.float32)
    with pytest.raises(vitkernels.BackendUnavailable, match="return_map"):
        ops.re_attention(q, k, v, mix, return_map=True)
    heads = MOST_HEADS[backend] + 1
    q, k, v, mix = drawn(1, heads, 3, 4, dtype=torch.float32)
    with pytest.raises(vitkernels.BackendUnavailable, match=f"{heads} heads"):
        ops.re_attention(q, k, v, mix)


def test_more_heads_than_the_kernels_take_run_on_the_reference() -> None:
    tensors = drawn(1, 65, 5, 4)
    with vitkernels.backend("reference"):
        expected = ops.re_attention(*tensors)
    assert torch.equal(ops.re_attention(*tensors), expected)


@pytest.mark.parametrize("heads", [32, 64])
def test_as_many_heads_as_the_kernels_take(backend: str, heads: int) -> None:
    if heads > MOST_HEADS.get(backend, heads):
        pytest.skip(f"{backend} takes {MOST_HEADS[backend]}")
    tensors = [t.requires_grad_() for t in drawn(1, heads, 9, 8, dtype=torch.float32)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out = ops.re_attention(*tensors, norm="layer")
    with vitkernels.backend("reference"):
        exact = ops.re_attention(*wide, norm="layer")
    grad = torch.ones_like(out)
    for a, b in zip((out, *torch.autograd.grad(out, tensors, grad)), (exact, *torch.autograd.grad(exact, wide, grad.double())), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is slow")
def test_statistics_of_nearly_flat_maps() -> None:
    """At initialisation the variance of the maps is below 1e-9: taken from second moments about zero nothing would be left of it in float32."""
    q, k, v, mix = drawn(1, 4, 197, 32)
    q = q * 1e-2
    mean, var = torch.zeros(4), torch.zeros(4)
    arguments: Any = [t.float() for t in (q, k, v, mix)]
    ops.re_attention(*arguments, norm="batch", running_mean=mean, running_var=var, training=True, momentum=1.0)
    maps = torch.einsum("gh,bhij->bgij", mix, (q @ k.transpose(-2, -1) * 32**-0.5).softmax(-1))
    exact = maps.var((0, 2, 3))
    assert exact.max() < 1e-8
    torch.testing.assert_close(var.double(), exact, rtol=1e-3, atol=0)


def test_no_map_is_ever_a_tensor(backend: str) -> None:
    """Nothing that reaches the allocator of PyTorch, in either direction, is as large as one head's map."""
    if backend == "reference":
        pytest.skip("the definition forms maps")

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.numel = max(self.numel, leaf.numel())
            return result

    tokens = 33 if INTERPRETING else 197
    for norm, training in itertools.product((None, "layer", "batch"), (False, True)):
        tensors = [t.requires_grad_() for t in drawn(1, 2, tokens, 4, dtype=torch.float32)]
        with Largest() as largest:
            out = ops.re_attention(*tensors, norm=norm, training=training)
            torch.autograd.grad(out, tensors, torch.ones_like(out))
        assert largest.numel < tokens * tokens
