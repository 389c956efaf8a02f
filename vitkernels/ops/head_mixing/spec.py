"""Samples, bad inputs and benchmark shapes of Re-Attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops._arrange import HEAD_DIMS, contiguous, of_one_projection, one_head_for_all, strided, tokens_first
from vitkernels.ops.head_mixing import op
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample

_SMALL = ("mix_weight", "mix_bias", "norm_weight", "norm_bias", "running_mean", "running_var")


def _sample(
    name: str,
    shape: tuple[int, int, int, int],
    norm: str | None = None,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    value_dim: int | None = None,
    biases: bool = True,
    affine: bool = True,
    running: bool = False,
    logits: float = 1.0,
    convolution: bool = False,
    arrange: Callable[..., tuple[Tensor, ...]] = contiguous,
    **kwargs: Any,
) -> Sample:
    """One call.

    Args:
        name: the sample's.
        shape: [B, H, N, D].
        norm: as the op's.
        dtype: of all floating tensors.
        device: of all tensors.
        grad: whether they require a gradient, where they can have one.
        value_dim: of v, if another.
        biases: whether the mix has one.
        affine: whether the norm has weight and bias.
        running: whether a batch norm has running statistics.
        logits: their standard deviation, about.
        convolution: the mix as the weight of a 1x1 convolution.
        arrange: puts q, k and v under other strides.
        kwargs: more options of the op.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    batch, heads, tokens, dim = shape

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).detach().requires_grad_(grad)

    qkv = (draw(*shape, scale=logits), draw(*shape), draw(batch, heads, tokens, value_dim or dim))
    args = [leaf(t) for t in arrange(*(t.to(dtype) for t in qkv))]
    args.append(leaf(draw(heads, heads, *((1, 1) if convolution else ()), scale=heads**-0.5)))
    if biases:
        args.append(leaf(draw(heads)))
    if norm is not None:
        kwargs["norm"] = norm
        if affine:
            kwargs |= {"norm_weight": leaf(1 + draw(heads, scale=0.3)), "norm_bias": leaf(draw(heads, scale=0.3))}
        if running:
            mean, var = draw(heads, scale=1 / max(tokens, 1)), 0.1 + draw(heads).square()
            kwargs |= {"running_mean": leaf(mean).detach(), "running_var": leaf(var).detach()}
    return Sample(name, tuple(args), kwargs, ("running_mean", "running_var") if running and norm else ())


def _samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_sample, dtype=dtype, device=device, grad=grad)
    yield make("2x4x9", (2, 4, 9, 16))
    yield make("tiny", (1, 2, 3, 4), biases=False)
    yield make("tiny, layer", (1, 2, 3, 3), "layer", value_dim=2)
    yield make("tiny, batch", (2, 2, 3, 3), "batch", running=True, eps=0.1)
    yield make("tiny, batch in training", (2, 2, 3, 3), "batch", biases=False)
    yield make("2x3x20, layer", (2, 3, 20, 16), "layer")
    yield make("2x3x20, layer without bias or weight", (2, 3, 20, 16), "layer", biases=False, affine=False)
    yield make("2x3x20, batch", (2, 3, 20, 16), "batch", running=True)
    yield make("2x3x20, batch without bias or weight", (2, 3, 20, 16), "batch", biases=False, affine=False, running=True)
    yield make("2x3x20, batch in training", (2, 3, 20, 16), "batch", biases=False, eps=1e-3)
    yield make("2x5x9, batch in training, convolution", (2, 5, 9, 24), "batch", convolution=True, affine=False, eps=1e-3)
    for norm in (None, "layer", "batch"):
        running = norm == "batch"
        kind = norm or "no norm"
        yield make(f"no image, {kind}", (0, 3, 9, 16), norm, running=running)
        yield make(f"no token, {kind}", (2, 3, 0, 16), norm, running=running)
        # Of one token every map is 1, and the gradients of q and k are zero: what is computed of them is the rounding of what cancels.
        # A large eps: where a test asks for the statistics of few numbers, eager in float64, the truth there, loses ten digits to a small variance.
        yield _without_gradient(make(f"one token, {kind}", (2, 3, 1, 16), norm, running=running, eps=0.1), "qk")
    # Mixed by one head, a layer norm leaves its bias alone and nothing to differentiate.
    yield make("one head", (2, 1, 17, 16))
    yield make("one head, batch", (2, 1, 17, 16), "batch", running=True, biases=False, eps=0.1)
    yield make("12 heads, layer", (1, 12, 17, 32), "layer", biases=False)
    yield make("12 heads, batch", (1, 12, 17, 33), "batch", running=True)
    yield make("17 heads, batch in training", (1, 17, 7, 8), "batch", biases=False, eps=1e-3)
    yield make("large logits", (2, 3, 20, 16), logits=20.0)
    # Nearly flat maps, as at initialisation: what the norm divides by is about 1e-5.
    yield make("nearly flat, layer", (1, 4, 49, 16), "layer", logits=0.1)
    yield make("nearly flat, batch in training", (1, 4, 49, 16), "batch", logits=0.1, biases=False)
    yield make("one projection, layer", (2, 3, 20, 16), "layer", arrange=of_one_projection)
    yield make("one projection, batch", (2, 3, 20, 16), "batch", running=True, arrange=of_one_projection)
    yield make("tokens first", (2, 3, 20, 16), arrange=tokens_first, value_dim=24)
    yield make("strided, layer", (2, 3, 20, 16), "layer", arrange=strided)
    yield make("expanded", (2, 3, 20, 16), arrange=one_head_for_all)
    norms: tuple[str | None, ...] = (None, "layer", "batch")
    for index, dim in enumerate((20, 33, 64, 128) if small else HEAD_DIMS):
        norm, other = norms[index % 3], (dim, 8, 64, 17)[index % 4]
        yield make(f"head dims {dim} and {other}, {norm}", (1, 3, 17, dim), norm, value_dim=other, running=norm == "batch")
    if small:
        return
    for index, tokens in enumerate((7, 16, 49, 50, 63, 196, 197, 198, 257)):
        norm = norms[index % 3]
        yield make(f"{tokens} tokens, {norm}", (2, 4, tokens, 32), norm, running=norm == "batch")
    yield make("197 tokens, batch in training", (2, 12, 197, 32), "batch", biases=False)
    yield make("577 tokens, layer", (1, 3, 577, 32), "layer", biases=False, arrange=of_one_projection)
    yield make("1025 tokens, batch", (1, 3, 1025, 16), "batch", running=True)
    yield make("32 heads, layer", (1, 32, 65, 16), "layer")


def _without_gradient(sample: Sample, names: str) -> Sample:
    for tensor, name in zip(sample.args, ("q", "k", "v"), strict=False):
        tensor.requires_grad_(tensor.requires_grad and name not in names)
    return sample


def _bad_inputs() -> Iterator[BadInput]:
    q, k, v, w = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 6), torch.randn(4, 4)

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], q: Any = q, k: Any = k, v: Any = v, w: Any = w, **kwargs: Any) -> BadInput:
        return BadInput.of(name, exception, words, q, k, v, w, **kwargs)

    running = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    yield bad("q is a list", TypeError, ("q is a list", "[B, H, N, D]"), q=[1.0])
    yield bad("integer q", TypeError, ("q has dtype torch.int64", "floating"), q=q.long())
    yield bad("sparse v", TypeError, ("v has layout torch.sparse_coo", "dense"), v=v.to_sparse())
    yield bad("q of three dimensions", ValueError, ("q has shape [4, 9, 8]", "4-dimensional"), q=q[0])
    yield bad("k of another head_dim", ValueError, ("k has shape [2, 4, 9, 7]", "[2, 4, 9, 8]"), k=k[..., :7])
    yield bad("k of other tokens", ValueError, ("k has shape [2, 4, 8, 8]", "[2, 4, 9, 8]"), k=k[:, :, :8])
    yield bad("v of other heads", ValueError, ("v has shape [2, 2, 9, 6]", "[2, 4, 9, 6]"), v=v[:, :2])
    yield bad("v of another dtype", TypeError, ("v has dtype torch.float64", "torch.float32"), v=v.double())
    yield bad("v on another device", ValueError, ("v is on meta", "cpu"), v=v.to("meta"))
    yield bad("no head", ValueError, ("q has shape [2, 0, 9, 8]", "at least 1"), q=q[:, :0], k=k[:, :0], v=v[:, :0])
    yield bad("mix_weight is None", TypeError, ("mix_weight is a NoneType", "[H, H]"), w=None)
    yield bad("mix_weight of other heads", ValueError, ("mix_weight has shape [4, 3]", "[4, 4]"), w=w[:, :3])
    yield bad("integer mix_weight", TypeError, ("mix_weight has dtype torch.int64", "floating"), w=w.long())
    yield bad("mix_weight on another device", ValueError, ("mix_weight is on meta", "cpu"), w=w.to("meta"))
    yield bad("mix_bias too long", ValueError, ("mix_bias has shape [5]", "[4]"), mix_bias=torch.ones(5))
    yield bad("mix_bias is a number", TypeError, ("mix_bias is a float", "[H] or None"), mix_bias=0.5)
    yield bad("unknown norm", ValueError, ("norm is 'group'", "'batch'", "'layer'"), norm="group")
    yield bad("norm weight without a norm", ValueError, ("norm_weight is given", "norm is None"), norm_weight=torch.ones(4))
    yield bad("norm bias of two dimensions", ValueError, ("norm_bias has shape [1, 4]", "[4]"), norm="layer", norm_bias=torch.ones(1, 4))
    yield bad("statistics of a layer norm", ValueError, ("running_mean is given", "'layer'", "'batch'"), norm="layer", **running)
    yield bad("one of two statistics", ValueError, ("running_mean is given", "running_var is None"), norm="batch", running_mean=torch.zeros(4))
    yield bad("statistics too short", ValueError, ("running_var has shape [3]", "[4]"), norm="batch", **(running | {"running_var": torch.ones(3)}))
    yield bad("dropout_p above 1", ValueError, ("dropout_p is 1.5", "[0, 1]"), dropout_p=1.5)
    one = {name: t[:1, :, :1] for name, t in (("q", q), ("k", k), ("v", v))}
    yield bad("a batch of one value per head", ValueError, ("q has shape [1, 4, 1, 8]", "more than one value"), norm="batch", training=True, **one)


def _saved(sample: Sample) -> int:
    """The logsumexp in float64, the small matrices in float64, and the batch's statistics."""
    batch, heads, tokens, _ = sample.args[0].shape
    return 8 * (batch * heads * tokens + heads * heads + 7 * heads + 1)


def _attended(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Ordinary attention: no mix, no norm."""
    return F.scaled_dot_product_attention(q, k, v)


def _folded(q: Tensor, k: Tensor, v: Tensor, mix_weight: Tensor, mix_bias: Tensor | None = None, **kwargs: Any) -> Tensor:
    """What one can do by hand where the norm is affine: it goes into the mix, which is one matrix product on the maps."""
    bias = q.new_zeros(q.shape[1]) if mix_bias is None else mix_bias
    if kwargs.get("norm") is not None:
        if kwargs.get("running_var") is None:
            raise ValueError("only a batch norm outside training can be folded into the mix")
        factor = kwargs["norm_weight"] * (kwargs["running_var"] + 1e-5).rsqrt()
        mix_weight, bias = mix_weight * factor[:, None], (bias - kwargs["running_mean"]) * factor + kwargs["norm_bias"]
    maps = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    mixed = torch.baddbmm(bias[None, :, None], mix_weight.expand(q.shape[0], -1, -1), maps.flatten(2))
    return mixed.view(maps.shape) @ v


def _case(batch: int, tokens: int, dim: int, norm: str, training: bool = False, heads: int = 12) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        # As their authors have them: a layer norm without a mix bias (vit-pytorch), a batch norm with one (DeepViT).
        options: dict[str, Any] = {"biases": norm == "batch", "running": norm == "batch" and not training, "arrange": of_one_projection}
        return _sample("bench", (batch, heads, tokens, dim), norm, dtype=dtype, device=device, **options)

    pairs = batch * heads * tokens * tokens
    kind = f"{norm}{', training' if training else ''}"
    return BenchCase(
        name=f"B{batch} N{tokens} d{dim} {kind}", make=make, flops=pairs * (4 * dim + 2 * heads), elements_moved=4 * batch * heads * tokens * dim
    )


_SIZES = tuple((batch, tokens, dim) for dim in (32, 64) for tokens in (197, 577) for batch in (1, 8))

SPECS = (
    OpSpec(
        name="re_attention",
        family="head_mixing",
        function=op.re_attention,
        reference=backends.backend("reference")(op.re_attention),
        summary="attention maps mixed across heads and normalised (DeepViT, arXiv 2103.11886)",
        samples=_samples,
        bad_inputs=_bad_inputs,
        bench_cases=(
            *(_case(*size, "layer") for size in _SIZES),
            *(_case(*size, "batch") for size in _SIZES[:4]),
            *(_case(*size, "batch", training=True) for size in _SIZES[:4]),
        ),
        saved_bytes=_saved,
        peers={"eager, norm folded into the mix": _folded},
        yardsticks={"SDPA, without mix and norm": _attended},
        kept_by_autocast=_SMALL,
    ),
)
