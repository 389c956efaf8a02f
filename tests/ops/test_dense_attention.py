"""Attention of a batch beyond its contract: keys that all images share, padding that is never computed."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitkernels
from vitkernels import accuracy, backends, ops
from vitkernels.ops.dense import op
from vitkernels.ops.dense.op import run

BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif((why := backends.why_not("attention", name, torch.device("cpu"), torch.float32)) is not None, reason=why or "")
    )
    for name in ("native", "triton")
]


def _results(backend: str, tensors: dict[str, Tensor], **kwargs: object) -> dict[str, Tensor]:
    """Output, logsumexp and every gradient of a call with shared keys."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    torch.manual_seed(5)
    with vitkernels.backend(backend):
        out, lse = run("attention", leaves["q"], leaves["k"], leaves["v"], **{n: t for n, t in leaves.items() if n not in "qkv"}, **kwargs)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    seen = lse != -torch.inf
    grads = torch.autograd.grad((out.double().square().sum() + lse[seen].sum(),), list(wanted.values()))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
def test_shared_keys(backend: str, dtype: torch.dtype) -> None:
    """They stand behind every image's own, in the output, every gradient, the bias, the padding and dropout."""
    if backends.why_not("attention", backend, torch.device("cpu"), dtype):
        pytest.skip("not a dtype of this backend")
    sizes = ((2, 4, 2, 9, 9, 5, 16, 24), (3, 2, 2, 1, 50, 17, 8, 8), (2, 2, 1, 20, 0, 3, 20, 20), (1, 2, 1, 7, 300, 4, 16, 16))
    for size, with_bias, dropout_p in itertools.product(sizes, (False, True), (0.0, 0.4)):

        def compared(
            number: int, size: tuple[int, ...] = size, with_bias: bool = with_bias, dropout_p: float = dropout_p
        ) -> list[accuracy.Comparison]:
            given = _with_shared_keys(*size, dtype, with_bias, seed=number)
            exact = _results("reference", {n: t.double() if t.is_floating_point() else t for n, t in given.items()}, dropout_p=dropout_p)
            eager, ours = (_results(name, given, dropout_p=dropout_p) for name in ("reference", backend))
            if dtype is torch.float64:
                torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
            return [accuracy.compare_tensors(name, ours[name], eager[name], truth) for name, truth in exact.items()]

        found = compared(0)
        assert dtype is torch.float64 or all(c.holds for c in accuracy.settled(found, compared)), (
            f"{size}, bias {with_bias}, dropout {dropout_p}: {found}"
        )


def _with_shared_keys(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    keys: int,
    shared: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    with_bias: bool,
    *,
    seed: int,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    given = {
        "q": draw(batch, heads, tokens, dim),
        "k": draw(batch, kv_heads, keys, dim),
        "v": draw(batch, kv_heads, keys, value_dim),
        # Not contiguous: heads first in memory.
        "shared_k": draw(kv_heads, shared, dim).transpose(0, 1),
        "shared_v": draw(kv_heads, shared, value_dim).transpose(0, 1),
    }
    if with_bias:
        given["bias"] = draw(heads, tokens, keys + shared)
        given["key_padding"] = torch.rand(batch, keys, generator=generator) < 0.7
    return given


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_behind_the_last_key_is_the_shorter_call(backend: str) -> None:
    """To the bit, whatever lies there."""
    q, k, v = torch.randn(2, 3, 33, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    k[:, :, 25:] = v[:, :, 25:] = torch.nan
    shown = (torch.arange(40) < 25).expand(2, -1)
    with vitkernels.backend(backend):
        padded = ops.attention(q, k, v, key_padding=shown)
        short = ops.attention(q, k[:, :, :25], v[:, :, :25])
    if backend == "native":
        torch.testing.assert_close(padded, short, rtol=0, atol=0)
    else:
        assert not torch.isnan(ops.attention(q, k.nan_to_num(), v.nan_to_num(), key_padding=shown)).any()


def test_auto_hands_over_on_an_unproved_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the alternative is the definition, and for what PyTorch's kernels can do; never for a backend asked for by name."""
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    called = []

    def rule(chosen: str, *args: Tensor, **options: object) -> str | None:
        called.append((chosen, {name for name, value in options.items() if value is not None and value is not False}))
        return "for a test"

    monkeypatch.setattr(op, "_for_torch", rule)
    monkeypatch.setitem(backends._support, "attention", replace(backends._support["attention"], torch=rule))
    out = ops.attention(q, k, v, scale=0.3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True), rtol=0, atol=0)
    for bias in (torch.randn(9, 7), torch.rand(4, 9, 7) > 0.2):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        torch.testing.assert_close(ops.attention(q, k, v, bias=bias), expected)
    explanation = vitkernels.explain(ops.attention, q, k, v)
    assert explanation.chosen == backends.TORCH
    assert "-> torch" in str(explanation) and "for a test" in str(explanation)
    assert called and all(
        chosen == ("native" if backends.why_not("attention", "native", q.device, q.dtype) is None else "reference") for chosen, _ in called
    )
    called.clear()
    with vitkernels.backend("reference"):
        ops.attention(q, k, v)
        assert vitkernels.explain(ops.attention, q, k, v).chosen == "reference"
    assert not called


def test_a_captured_graph_reads_what_was_made_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work list of a size, so that it is not made again in each replay; and it stays, however many other sizes come."""
    pytest.importorskip("triton")
    triton = importlib.import_module("vitkernels.ops.dense.triton")

    def places(tokens: int, capturing: bool = False) -> tuple[Tensor, ...]:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        q: Any = SimpleNamespace(shape=(1, 2, tokens, 8), device=torch.device("cpu"), is_cuda=True)
        return triton._places(q, q)

    made = type(triton._made)()
    monkeypatch.setattr(triton, "_made", made)
    first = places(5)
    assert all(a is b for a, b in zip(places(5), first, strict=True))
    assert all(a is b for a, b in zip(places(5, capturing=True), first, strict=True))
    alone = places(6, capturing=True)
    assert places(6, capturing=True)[0] is not alone[0], "memory of one graph"
    for tokens in range(10, 10 + made.MOST):
        places(tokens)
    assert len(made.made) == made.MOST and places(5)[0] is not first[0]
    assert all(a is b for a, b in zip(places(5, capturing=True), first, strict=True))


def test_what_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, and of what PyTorch has a fused kernel for."""

    class OnGpu:
        device, dtype, shape = torch.device("cuda"), torch.bfloat16, (2, 4, 9, 16)

    q: Any = OnGpu()
    assert "PyTorch" in (op._for_torch("reference", q, q, q) or "")
    assert op._for_torch("triton", q, q, q) is None
    assert op._for_torch("reference", q, q, q, return_lse=True) is None
    assert op._for_torch("reference", q, q, q, bias=torch.ones(9, 9)) is None, "PyTorch would round it"
    assert "PyTorch" in (op._for_torch("reference", q, q, q, bias=torch.ones(9, 9, dtype=torch.bfloat16)) or "")
    assert "PyTorch" in (op._for_torch("reference", q, q, q, bias=torch.ones(9, 9, dtype=torch.bool)) or "")
    with monkeypatch.context() as autocast:
        autocast.setattr(OnGpu, "dtype", torch.float32)
        assert op._for_torch("reference", q, q, q, bias=torch.ones(9, 9)) is not None
        autocast.setattr(op._define, "autocast_of", lambda tensor: torch.bfloat16)
        assert op._for_torch("reference", q, q, q, bias=torch.ones(9, 9)) is None
    assert op._for_torch("reference", torch.ones(2, 4, 9, 16), q, q) is None


def test_few_logits_in_training_are_handed_over() -> None:
    """On a CPU, where autograd in Python would cost more than the kernels; not in inference, not when compiled, not where there is more to do."""
    q = torch.ones(1, 16, 16, 16, requires_grad=True)
    assert "autograd" in (op._for_torch("native", q, q, q) or "")
    assert op._for_torch("native", q.detach(), q.detach(), q.detach()) is None
    assert op._for_torch("native", *[q.detach().bfloat16().requires_grad_()] * 3) is None
    assert op._for_torch("native", q, q, q, dropout_p=0.1) is None
    assert op._for_torch("native", *[torch.ones(1, 16, 17, 16, requires_grad=True)] * 3) is None
    with torch.no_grad():
        assert op._for_torch("native", q, q, q) is None
