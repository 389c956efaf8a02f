"""Re-Attention in Triton's interpreter: what the contract's samples are too small for, or do not look at."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels
from vitkernels import accuracy, ops
from vitkernels.ops.head_mixing import reference
from vitkernels.registry import Sample

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process"),
    pytest.mark.usefixtures("poison"),
]


@dataclass(frozen=True)
class Call:
    """One call, of normal numbers."""

    name: str
    shape: tuple[int, int, int, int, int]  # B, H, N, D, D_v
    dtype: torch.dtype = torch.float32
    norm: str | None = None
    affine: bool = True  # with the biases and weights that there can be
    peaked: float = 1.0  # how far from each other the logits are
    options: dict[str, Any] = field(default_factory=dict)

    def sample(self) -> Sample:
        generator = torch.Generator().manual_seed(0)
        batch, heads, tokens, dim, value_dim = self.shape

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        q, k, v = draw(batch, heads, tokens, dim), draw(batch, heads, tokens, dim), draw(batch, heads, tokens, value_dim)
        options = dict(self.options)
        if self.affine:
            options["mix_bias"] = draw(heads)
            if self.norm is not None:
                options |= {"norm_weight": draw(heads), "norm_bias": draw(heads)}
        if self.norm == "batch" and not options.get("training"):
            options |= {"running_mean": draw(heads).detach(), "running_var": draw(heads).detach().square() + 0.1}
        options["scale"] = self.peaked * dim**-0.5
        return Sample(self.name, (q, k, v, draw(heads, heads)), {**options, "norm": self.norm})


def _on(backend: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(1)
        with vitkernels.backend(backend):
            return ops.re_attention(*args, **kwargs)

    return run


TRAINING = {"training": True}
DROPPED = {"training": True, "dropout_p": 0.3}
CALLS = (
    # Several tiles of queries and keys, samples that begin at any row of a draw of dropout, several steps of the head dims, rows to be padded.
    Call("plain", (2, 3, 35, 24, 48)),
    Call("plain bare", (1, 2, 17, 33, 16), affine=False),
    Call("plain dropped", (3, 3, 21, 16, 80), options=DROPPED),
    Call("layer", (2, 5, 18, 35, 8), norm="layer"),
    Call("layer bare", (1, 4, 18, 16, 16), norm="layer", affine=False),
    Call("layer dropped", (2, 3, 19, 16, 20), norm="layer", options=DROPPED),
    Call("batch", (2, 5, 18, 16, 40), norm="batch"),
    Call("batch bare", (1, 3, 18, 48, 16), norm="batch", affine=False),
    Call("batch live", (2, 3, 35, 16, 20), norm="batch", options=TRAINING),
    Call("batch live bare", (2, 3, 18, 16, 16), norm="batch", affine=False, options=TRAINING),
    Call("batch live dropped", (3, 3, 18, 20, 16), norm="batch", options=DROPPED),
    Call("batch live dropped at evaluation", (2, 3, 17, 16, 16), norm="batch", options={"dropout_p": 0.5}),
    # Heads beyond sixteen; flat maps, as at initialisation, and maps of one key.
    Call("many heads", (1, 17, 18, 16, 16), norm="layer"),
    Call("many heads live", (1, 18, 5, 16, 16), norm="batch", options=TRAINING),
    Call("flat live", (2, 3, 35, 16, 16), norm="batch", peaked=0.01, options=TRAINING),
    Call("peaked", (1, 2, 35, 16, 16), peaked=300.0),
    Call("layer bfloat16", (2, 3, 18, 33, 20), torch.bfloat16, "layer", options=DROPPED),
    Call("batch live bfloat16", (2, 3, 35, 20, 33), torch.bfloat16, "batch", options=DROPPED),
    Call("batch live flat float16", (2, 3, 35, 33, 20), torch.float16, "batch", peaked=0.01, options=TRAINING),
    Call("plain float16", (2, 3, 18, 48, 96), torch.float16),
    # The edges of what there is.
    Call("one head, one token", (1, 1, 1, 3, 2), norm="layer"),
    Call("no token", (2, 3, 0, 16, 16), norm="layer"),
    Call("no sample", (0, 3, 5, 16, 16), norm="batch", options=TRAINING),
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_by_the_rule(call: Call) -> None:
    sample = call.sample()
    comparisons = accuracy.Judge(_on("reference"), sample, names=ops.re_attention)(_on("triton"))
    assert len(comparisons) == 1 + len(accuracy.leaves(sample))
    broken = [f"{c.name}: error {c.error:.3e}, eager's {c.eager_error:.3e}, floor {c.floor:.3e}" for c in comparisons if not c.holds]
    assert not broken, "\n".join(broken)


def test_running_statistics() -> None:
    """After three steps they are PyTorch's, with dropout, in float64 buffers that show the difference."""
    q, k, v, mix = (t.detach() for t in Call("statistics", (2, 3, 18, 16, 16)).sample().args)
    bias = torch.tensor([0.5, -1.0, 2.0])
    buffers = {name: (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)) for name in ("triton", "reference")}
    for name, (mean, var) in buffers.items():
        wide = [t.double() if name == "reference" else t for t in (q, k, v)]
        torch.manual_seed(1)
        for _ in range(3):
            with vitkernels.backend(name):
                ops.re_attention(*wide, mix, bias, norm="batch", running_mean=mean, running_var=var, training=True, dropout_p=0.25)
    for ours, theirs in zip(buffers["triton"], buffers["reference"], strict=True):
        assert not torch.equal(ours, torch.zeros_like(ours))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [16, 17, 18, 19])
def test_dropout_keeps_what_the_reference_keeps(tokens: int) -> None:
    """With unit matrices for the mix and v the output is the maps, with one for its gradient so is that of v; a draw is of 4 queries."""
    seed = torch.tensor(2**61 + 12345)
    expected = reference.keep_maps(seed, torch.Size((3, 2, tokens, tokens)), 0.4)
    unit = torch.eye(tokens).expand(3, 2, tokens, tokens)
    tensors = (*torch.randn(2, 3, 2, tokens, 16, generator=torch.Generator().manual_seed(0)), unit)
    small = (torch.eye(2, dtype=torch.float64), None, 0, *(None,) * 4, False, 1e-5, 0.25, 0.4, seed)
    namespace = torch.ops.vitkernels_triton
    out, lse, _, _ = namespace.re_attention(*tensors, *small)
    assert torch.equal(out != 0, expected)
    grads = namespace.re_attention_backward(unit, *tensors, lse, *small, False, False, True)
    assert torch.equal(grads[2].transpose(-2, -1) != 0, expected)
    assert 0.5 < expected.double().mean() < 0.7


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"norm": "batch", "training": True, "dropout_p": 0.3}], ids=["layer", "live"])
def test_only_the_needed_gradients(options: dict[str, Any]) -> None:
    """Each gradient alone is what it is among all, bit for bit."""
    sample = Call("needed", (2, 3, 18, 16, 20)).sample()
    function, leaves = _on("triton"), accuracy.leaves(sample)
    kwargs = {**sample.kwargs, **options}
    out = function(*sample.args, **kwargs)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    together = torch.autograd.grad(out, leaves, grad_out)
    for index, expected in enumerate(together):
        frozen = {id(leaf): leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(leaves)}
        args = [frozen.get(id(a), a) for a in sample.args]
        alone = function(*args, **{name: frozen.get(id(a), a) for name, a in kwargs.items()})
        assert torch.equal(torch.autograd.grad(alone, [frozen[id(leaves[index])]], grad_out)[0], expected), f"gradient {index}"


def test_strides() -> None:
    """Slices of a packed projection, transposed and expanded inputs give what contiguous ones give, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 17, 3, 3, 16, generator=generator).permute(2, 0, 3, 1, 4)
    transposed = torch.randn(2, 3, 16, 17, generator=generator).transpose(-2, -1)
    expanded = torch.randn(1, 3, 17, 1, generator=generator).expand(2, 3, 17, 16)
    mix = torch.randn(3, 3, generator=generator)
    for tensors in (tuple(packed), (transposed, packed[1], expanded), (expanded, transposed, packed[2])):
        results = []
        for kind in (tensors, tuple(t.contiguous() for t in tensors)):
            leaves = [t.detach().requires_grad_() for t in kind]
            out = _on("triton")(*leaves, mix, norm="layer")
            results.append([out, *torch.autograd.grad(out, leaves, transposed if kind is tensors else transposed.contiguous())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_more_heads_than_the_kernels_take() -> None:
    q = torch.zeros(1, 33, 2, 16)
    with vitkernels.backend("triton"), pytest.raises(vitkernels.backends.BackendUnavailable, match="q has 33 heads, and its kernels take up to 32"):
        ops.re_attention(q, q, q, torch.zeros(33, 33))
