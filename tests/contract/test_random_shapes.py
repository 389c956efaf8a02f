"""Shapes, layouts and options drawn by Hypothesis: the corners nobody thought to put into the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitkernels.ops import PackedLayout, TargetLayout
from vitkernels.registry import Sample

from .oracle import Target, assert_obeys_the_rule

pytestmark = [pytest.mark.fused, pytest.mark.kernel]

_LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded", "offset")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _arranged(tensor: Tensor, layout: str) -> Tensor:
    """The tensor's values (its first image's, for ``expanded``) under other strides or another offset."""
    if layout == "channels_last":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        tensor = tensor.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "strided":
        tensor = torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    elif layout == "expanded":
        tensor = tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
    elif layout == "offset":
        padded = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)
        padded[3:] = tensor.flatten()
        tensor = padded[3:].view(tensor.shape)  # not aligned to any vector
    return tensor


@st.composite
def _attention(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 20 if small else 40)))
    return {
        "shape": shape,
        "layouts": draw(st.tuples(*[st.sampled_from(_LAYOUTS)] * 3)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


@st.composite
def _self_attention(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    patch = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    side = st.integers(0, 4 if small else 9)
    grid = draw(st.tuples(side, side))
    return {
        "shape": (draw(st.integers(0, 3)), draw(st.integers(1, 40)), *(g * p for g, p in zip(grid, patch or (1, 4), strict=True))),
        "patch_size": patch,
        "biases": draw(st.tuples(st.booleans(), st.booleans())),
        "convolution": draw(st.booleans()),
        "layout": draw(st.sampled_from(_LAYOUTS)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_attention(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    batch, dim, positions, patches = drawn["shape"]
    tensors = (torch.randn(batch, channels, positions, patches, generator=generator).to(drawn["dtype"]) for channels in (1, dim, dim))
    return Sample(str(drawn), tuple(_arranged(t, layout).to(device).requires_grad_() for t, layout in zip(tensors, drawn["layouts"], strict=True)))


def _make_self_attention(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    dim = drawn["shape"][1]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(drawn["dtype"])

    tail = (1, 1) if drawn["convolution"] else ()
    args = [
        _arranged(draw(*drawn["shape"]), drawn["layout"]),
        draw(1 + 2 * dim, dim, *tail) * dim**-0.5,
        draw(1 + 2 * dim) if drawn["biases"][0] else None,
        draw(dim, dim, *tail) * dim**-0.5,
        draw(dim) if drawn["biases"][1] else None,
    ]
    return Sample(str(drawn), tuple(None if a is None else a.to(device).requires_grad_() for a in args), {"patch_size": drawn["patch_size"]})


@st.composite
def _cascaded(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    window = draw(st.integers(1, 5 if small else 9))
    kernels = tuple(draw(st.lists(st.sampled_from((1, 3, 5, 7, 9)), min_size=1, max_size=2 if small else 4)))
    beyond = st.integers(0, min(window, 3) if small else 12)
    split = draw(st.integers(4, 12 if small else 24))  # of a tensor of one or two numbers a largest error says little
    return {
        "size": (draw(st.integers(0, 1 if small else 3)), len(kernels) * split, *(window + draw(beyond) for _ in range(2))),
        "window": window,
        "kernels": kernels,
        "key_dim": draw(st.integers(4, 20)),
        "value_dim": split if len(kernels) > 1 else draw(st.integers(4, 40)),
        "biases": draw(st.lists(st.booleans(), min_size=2 * len(kernels) + 1, max_size=2 * len(kernels) + 1)),
        "convolution": draw(st.booleans()),
        "layout": draw(st.sampled_from(_LAYOUTS)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_cascaded(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    kernels, key_dim, channels, window = drawn["kernels"], drawn["key_dim"], drawn["size"][1], drawn["window"]
    split, inner = channels // len(kernels), len(kernels) * drawn["value_dim"]
    rows = 2 * key_dim + drawn["value_dim"]
    tail = (1, 1) if drawn["convolution"] else ()

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(drawn["dtype"])

    has_bias = iter(drawn["biases"])
    args = (
        _arranged(draw(*drawn["size"]), drawn["layout"]),
        [draw(rows, split, *tail, scale=split**-0.5) for _ in kernels],
        [draw(rows) if next(has_bias) else None for _ in kernels],
        [draw(key_dim, 1, k, k, scale=1 / k) for k in kernels],
        [draw(key_dim) if next(has_bias) else None for _ in kernels],
        draw(len(kernels), window * window),
        draw(channels, inner, *tail, scale=inner**-0.5),
        draw(channels) if next(has_bias) else None,
    )
    return Sample(str(drawn), args, {"key_dim": key_dim, "window": window}).mapped(lambda t: t.to(device).requires_grad_())


@st.composite
def _cascaded_norm(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    drawn = draw(_cascaded(small))
    # Enough values a channel, and an eps, for statistics that are no accident of two or three numbers; no kernel of one pixel (see the op's samples).
    kernels = tuple(max(k, 3) for k in drawn["kernels"])
    return drawn | {"size": (draw(st.integers(3, 5)), *drawn["size"][1:]), "kernels": kernels, "eps": draw(st.sampled_from((0.1, 1.0)))}


def _make_cascaded_norm(drawn: dict[str, Any], device: str) -> Sample:
    sample = _make_cascaded(drawn, device)
    x, qkv_weights, _, dw_weights, _, attention_bias, proj_weight, _ = sample.args
    generator = torch.Generator().manual_seed(drawn["seed"])

    def norm(weight: Tensor) -> tuple[Tensor, Tensor]:
        pair = (torch.randn(weight.shape[0], generator=generator) for _ in range(2))
        gamma, beta = (t.to(dtype=weight.dtype, device=device).requires_grad_() for t in pair)
        return gamma, beta

    norms = [norm(w) for w in qkv_weights], [norm(w) for w in dw_weights], norm(proj_weight)
    args = (x, qkv_weights, norms[0], dw_weights, norms[1], attention_bias, proj_weight, norms[2])
    return Sample(sample.name, args, sample.kwargs | {"eps": drawn["eps"]})


@st.composite
def _batch_norm(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    return {
        # Enough values a channel for statistics that are no accident of two or three numbers.
        "shape": (draw(st.integers(2, 5)), draw(st.integers(1, 70)), draw(st.integers(3, 20)), draw(st.integers(3, 20))),
        "layout": draw(st.sampled_from(_LAYOUTS)),
        "activation": draw(st.sampled_from(("none", "relu", "silu"))),
        "mean": draw(st.sampled_from((0.0, 0.5, 20.0))),
        "eps": draw(st.sampled_from((1e-5, 0.1))),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "wide": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_batch_norm(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    x = drawn["mean"] + torch.randn(drawn["shape"], generator=generator)
    kept = torch.float32 if drawn["wide"] else drawn["dtype"]
    weight, bias = (torch.randn(x.shape[1], generator=generator).to(kept) for _ in range(2))
    args = tuple(t.to(device).requires_grad_() for t in (_arranged(x.to(drawn["dtype"]), drawn["layout"]), weight, bias))
    return Sample(str(drawn), args, {"activation": drawn["activation"], "eps": drawn["eps"]})


@st.composite
def _varlen(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 2 if small else 4))
    length = st.integers(0, 40 if small else 90)
    lengths = draw(st.lists(length, max_size=4 if small else 9))
    return {
        "lengths": lengths,
        "keys": draw(st.none() | st.lists(length, min_size=len(lengths), max_size=len(lengths))),
        "heads": kv_heads * draw(st.integers(1, 2 if small else 3)),
        "kv_heads": kv_heads,
        "dim": draw(st.integers(1, 80)),
        "value_dim": draw(st.integers(1, 80)),
        "arrange": draw(st.sampled_from(tuple(_PACKED_LAYOUTS))),
        "qk_norm": draw(st.sampled_from((None, "rms", "l2", "layer"))),
        "norm": draw(st.sampled_from(("", "w", "W", "wb", "WB"))),
        "bias": draw(st.none() | st.tuples(st.booleans(), st.integers(0, 5))),
        "spare": draw(st.integers(0, 70)),
        "return_lse": draw(st.booleans()),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


# Of [T, H, D]; "one long row" is a slice of something wider, at an offset that no vector is aligned to.
_PACKED_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "heads first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0],
    "one long row": lambda t: torch.cat([torch.full_like(t[..., :1], torch.nan), t], dim=-1)[..., 1:],
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


def _make_varlen(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    heads, kv_heads, dim, arrange = drawn["heads"], drawn["kv_heads"], drawn["dim"], _PACKED_LAYOUTS[drawn["arrange"]]
    longest = max((0, *drawn["lengths"], *(drawn["keys"] or ())))
    total = max(sum(drawn["lengths"]), sum(drawn["keys"] or ())) + drawn["spare"]
    layout = PackedLayout.from_lengths(drawn["lengths"], drawn["keys"], capacity=total).to(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=drawn["dtype"])

    kwargs: dict[str, Any] = {"layout": layout, "return_lse": drawn["return_lse"], "qk_norm": drawn["qk_norm"]}
    if drawn["bias"] is not None:
        per_head, spare = drawn["bias"]
        kwargs["bias"] = draw(heads if per_head else 1, longest + spare, longest + spare)
    for letter in drawn["norm"] if drawn["qk_norm"] else "":
        for side, count in (("q", heads), ("k", kv_heads)):
            kwargs[f"{side}_norm_{'weight' if letter in 'wW' else 'bias'}"] = draw(*(() if letter in "wb" else (count,)), dim)
    args = (arrange(draw(total, heads, dim)), arrange(draw(total, kv_heads, dim)), arrange(draw(total, kv_heads, drawn["value_dim"])))
    return Sample(str(drawn), args, kwargs).mapped(lambda t: t.requires_grad_())


@st.composite
def _packed(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    """Rows of runs: an id, or padding, and how many tokens it has."""
    runs = st.lists(st.tuples(st.booleans(), st.integers(1, 20 if small else 40)), max_size=3 if small else 5)
    return {
        "rows": draw(st.lists(runs, max_size=3)),
        "heads": draw(st.integers(1, 3)),
        "dim": draw(st.integers(1, 40)),
        "with_layout": draw(st.booleans()),
        "of_one_projection": draw(st.booleans()),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_packed(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    rows = [[i if image else -1 for i, (image, tokens) in enumerate(row) for _ in range(tokens)] for row in drawn["rows"]]
    length = max(map(len, rows), default=3)
    image_ids = torch.tensor([row + [-1] * (length - len(row)) for row in rows], dtype=torch.int64).view(len(rows), length).to(device)
    qkv = torch.randn(len(rows), length, 3, drawn["heads"], drawn["dim"], generator=generator).to(device=device, dtype=drawn["dtype"])
    tensors = (t if drawn["of_one_projection"] else t.contiguous() for t in qkv.unbind(2))
    where = PackedLayout.from_image_ids(image_ids) if drawn["with_layout"] else image_ids
    return Sample(str(drawn), (*tensors, where)).mapped(lambda t: t.detach().requires_grad_())


@st.composite
def _positions(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    return {
        "tokens": draw(st.integers(0, 60 if small else 200)),
        "dim": draw(st.integers(4, 150)),
        "lengths": draw(st.tuples(*[st.integers(1, 40)] * 2)),
        "fractional": draw(st.tuples(st.booleans(), st.booleans())),
        "layouts": draw(st.tuples(*[st.sampled_from(tuple(_ROW_LAYOUTS))] * 3)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


# Of [T, D].
_ROW_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0],
    "part of wider rows": lambda t: torch.cat([torch.full_like(t[:, :1], torch.nan), t], dim=1)[:, 1:],
    "expanded": lambda t: t[:1].expand(t.shape),
}


def _make_positions(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    tensors = (torch.randn(n, drawn["dim"], generator=generator).to(drawn["dtype"]) for n in (drawn["tokens"], *drawn["lengths"]))
    arranged = [_ROW_LAYOUTS[layout](t).to(device).requires_grad_() for t, layout in zip(tensors, drawn["layouts"], strict=True)]
    # Shares up to 0.8: a redraw moves them by a quarter.
    positions = [
        0.8 * torch.rand(drawn["tokens"], generator=generator) if fractional else torch.randint(n, (drawn["tokens"],), generator=generator)
        for n, fractional in zip(drawn["lengths"], drawn["fractional"], strict=True)
    ]
    return Sample(str(drawn), (*arranged, *(p.to(device) for p in positions)))


@st.composite
def _pool(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(0, 150), max_size=4 if small else 9))
    return {
        "lengths": lengths,
        "used": draw(st.none() | st.tuples(*(st.integers(0, n) for n in lengths))),
        "spare": draw(st.integers(0, 70)),
        "shape": draw(st.tuples(st.integers(4, 150)) | st.tuples(st.integers(2, 5), st.integers(2, 40))),
        "mode": draw(st.sampled_from(("mean", "max"))),
        "ties": draw(st.booleans()),
        "arrange": draw(st.sampled_from(("contiguous", "strided", "expanded"))),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_pool(drawn: dict[str, Any], device: str) -> Sample:
    total = sum(drawn["lengths"]) + drawn["spare"]
    layout = PackedLayout.from_lengths(drawn["lengths"], capacity=total)
    if drawn["used"] is not None:
        used = torch.tensor(drawn["used"], dtype=torch.int64)
        layout = PackedLayout.from_cu_seqlens(layout.cu_seqlens_k, seqused_k=used, total_q=total, total_k=total)
    x = torch.randn(total, *drawn["shape"], generator=torch.Generator().manual_seed(drawn["seed"]))
    x = _ROW_LAYOUTS[drawn["arrange"]]((x.round() if drawn["ties"] else x).to(drawn["dtype"]))
    return Sample(str(drawn), (x.to(device).requires_grad_(),), {"layout": layout.to(device), "mode": drawn["mode"]})


@st.composite
def _re_attention(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    # Statistics of a batch, and of the heads of a layer norm, that are no accident of two or three numbers.
    return {
        "shape": (
            draw(st.integers(0, 3)),
            draw(st.integers(4, 8 if small else 20)),
            draw(st.integers(4, 20 if small else 80)),
            draw(st.integers(4, 80)),
        ),
        "value_dim": draw(st.integers(4, 80)),
        "norm": draw(st.sampled_from((None, "layer", "batch", "batch in training"))),
        "biases": draw(st.tuples(st.booleans(), st.booleans())),
        "layouts": draw(st.tuples(*[st.sampled_from(_LAYOUTS)] * 3)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_re_attention(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    shape, (with_bias, affine) = drawn["shape"], drawn["biases"]
    heads = shape[1]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(drawn["dtype"])

    args = [_arranged(draw(*shape[:3], dim), how) for dim, how in zip((shape[3], shape[3], drawn["value_dim"]), drawn["layouts"], strict=True)]
    args += [draw(heads, heads) * heads**-0.5, *([draw(heads)] if with_bias else [])]
    kwargs: dict[str, Any] = {"eps": 1e-3}
    if drawn["norm"]:
        kwargs |= {"norm": drawn["norm"].partition(" ")[0]}
        kwargs |= {"norm_weight": draw(heads), "norm_bias": draw(heads)} if affine else {}
    sample = Sample(str(drawn), tuple(args), kwargs).mapped(lambda t: t.to(device).requires_grad_())
    if drawn["norm"] == "batch":
        sample.kwargs.update(running_mean=draw(heads).to(device), running_var=(0.1 + draw(heads).square()).to(device))
    return sample


@st.composite
def _dense(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    shape = (draw(st.integers(0, 3)), kv_heads * draw(st.integers(1, 3)), draw(st.integers(0, 40 if small else 90)), draw(st.integers(1, 80)))
    keys = draw(st.integers(0, 40 if small else 90))
    return {
        "shape": shape,
        "keys": keys,
        "kv_heads": kv_heads,
        "value_dim": draw(st.integers(1, 80)),
        "bias": draw(st.none() | st.tuples(*(st.sampled_from((1, n)) for n in (*shape[:3], keys)))),
        "mask": draw(st.booleans()),
        "padding": draw(st.booleans()),
        "layouts": draw(st.tuples(*[st.sampled_from(_LAYOUTS)] * 3)),
        "return_lse": draw(st.booleans()),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_dense(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    (batch, _, _, dim), keys, kv_heads = drawn["shape"], drawn["keys"], drawn["kv_heads"]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(drawn["dtype"])

    qkv = (draw(*drawn["shape"]), draw(batch, kv_heads, keys, dim), draw(batch, kv_heads, keys, drawn["value_dim"]))
    kwargs: dict[str, Any] = {"return_lse": drawn["return_lse"]}
    if drawn["bias"] is not None:
        kwargs["bias"] = draw(*drawn["bias"])
        if drawn["mask"]:
            kwargs["bias"] = (kwargs["bias"] > -0.5).to(device)
    if drawn["padding"]:
        kwargs["key_padding"] = (torch.rand(batch, keys, generator=generator) < 0.8).to(device)
    args = tuple(_arranged(t, how) for t, how in zip(qkv, drawn["layouts"], strict=True))
    return Sample(str(drawn), args, kwargs).mapped(lambda t: t.to(device).requires_grad_())


@st.composite
def _patch(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    patch, heads = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(st.integers(1, 3))
    side = st.integers(0, 4 if small else 9)
    return {
        "shape": (draw(st.integers(0, 3)), heads * draw(st.integers(1, 40)), *(draw(side) * p for p in patch)),
        "value_channels": heads * draw(st.integers(1, 40)),
        "patch": patch,
        "heads": heads,
        "layouts": draw(st.tuples(*[st.sampled_from(_LAYOUTS)] * 3)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_patch(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    batch, channels, *size = drawn["shape"]
    tensors = (torch.randn(batch, c, *size, generator=generator).to(drawn["dtype"]) for c in (channels, channels, drawn["value_channels"]))
    args = (_arranged(t, layout).to(device).requires_grad_() for t, layout in zip(tensors, drawn["layouts"], strict=True))
    return Sample(str(drawn), tuple(args), {"patch": drawn["patch"], "num_heads": drawn["heads"]})


@st.composite
def _memory(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    groups = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3 if small else 6))
    return {
        "batch": draw(st.integers(0, 3)),
        "heads": draw(st.integers(1, 3)),
        "groups": groups,
        "queries": draw(st.integers(0, 2 if small else 9)) * len(groups),
        "keys": draw(st.integers(0, 20 if small else 90)),
        "dims": (draw(st.integers(1, 80)), draw(st.integers(1, 80))),
        "own": draw(st.booleans()),
        "in_one": draw(st.booleans()),
        "layouts": draw(st.tuples(*[st.sampled_from(_LAYOUTS)] * 5)),
        "return_lse": draw(st.booleans()),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_memory(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    (dim, value_dim), groups, layouts = drawn["dims"], drawn["groups"], iter(drawn["layouts"])

    def draw(tokens: int, width: int) -> Tensor:
        tensor = torch.randn(drawn["batch"], drawn["heads"], tokens, width, generator=generator).to(drawn["dtype"])
        return _arranged(tensor, next(layouts)).to(device)

    q, k, v = draw(drawn["queries"], dim), draw(drawn["keys"], dim), draw(drawn["keys"], value_dim)
    memory = (torch.randn(sum(groups), drawn["heads"], width, generator=generator).to(device, drawn["dtype"]) for width in (dim, value_dim))
    kwargs: dict[str, Any] = {"return_lse": drawn["return_lse"]}
    if drawn["own"]:
        kwargs |= {"own_k": draw(drawn["queries"], dim), "own_v": draw(drawn["queries"], value_dim)}
    if not drawn["in_one"]:
        kwargs["groups"] = tuple(groups)
    return Sample(str(drawn), (q, k, v, *memory), kwargs).mapped(lambda t: t.requires_grad_())


@st.composite
def _detection(draw: st.DrawFn, small: bool) -> dict[str, Any]:
    sizes = draw(st.lists(st.integers(0, 9 if small else 30), max_size=4))
    shape = (len(sizes), draw(st.integers(0, 9 if small else 40)), draw(st.integers(2, 9 if small else 40)))
    layers = draw(st.none() | st.integers(0, 3))
    return {
        "sizes": sizes,
        "shape": shape if layers is None else (layers, *shape),
        "kind": draw(st.sampled_from(("softmax", "focal"))),
        "layouts": draw(st.tuples(*[st.sampled_from(_LAYOUTS)] * 2)),
        "gamma": draw(st.sampled_from((0.0, 1.0, 2.0, 2.5))),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _predictions(drawn: dict[str, Any], device: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, TargetLayout, torch.Generator]:
    """logits, boxes and labels, target boxes and their layout."""
    generator = torch.Generator().manual_seed(drawn["seed"])
    layout, shape = TargetLayout.from_sizes(drawn["sizes"], device=device), drawn["shape"]
    tensors = (torch.randn(shape, generator=generator), 0.1 + 0.8 * torch.rand(*shape[:-1], 4, generator=generator))
    arranged = ((_arranged if t.dim() == 4 else lambda t, _: t)(t.to(drawn["dtype"]), how) for t, how in zip(tensors, drawn["layouts"], strict=True))
    labels = torch.randint(shape[-1], (layout.total,), generator=generator).to(device)
    targets = (0.1 + 0.8 * torch.rand(layout.total, 4, generator=generator)).to(device, drawn["dtype"])
    logits, boxes = (t.to(device) for t in arranged)
    return (logits, boxes, labels), targets, layout, generator


def _make_cost(drawn: dict[str, Any], device: str) -> Sample:
    args, targets, layout, _ = _predictions(drawn, device)
    return Sample(str(drawn), args, {"target_boxes": targets, "layout": layout, "kind": drawn["kind"], "gamma": drawn["gamma"]})


def _make_set_loss(drawn: dict[str, Any], device: str) -> Sample:
    (logits, boxes, labels), targets, layout, generator = _predictions(drawn, device)
    matches = torch.randint(-1, layout.total, logits.shape[:-1], generator=generator).to(device)
    kwargs = {"target_boxes": targets, "matches": matches, "num_boxes": 3.0, "kind": drawn["kind"], "gamma": drawn["gamma"]}
    return Sample(str(drawn), (logits.requires_grad_(), boxes.requires_grad_(), labels), kwargs)


# How to draw a call of each op, a small one for Triton's interpreter; a new op writes its own here.
_DRAWN = {
    "separable_attention": (_attention, _make_attention),
    "separable_self_attention": (_self_attention, _make_self_attention),
    "cascaded_group_attention": (_cascaded, _make_cascaded),
    "cascaded_group_attention_batch_norm": (_cascaded_norm, _make_cascaded_norm),
    "batch_norm_act": (_batch_norm, _make_batch_norm),
    "varlen_attention": (_varlen, _make_varlen),
    "packed_attention": (_packed, _make_packed),
    "factorized_position_embedding": (_positions, _make_positions),
    "masked_pool": (_pool, _make_pool),
    "re_attention": (_re_attention, _make_re_attention),
    "attention": (_dense, _make_dense),
    "patch_attention": (_patch, _make_patch),
    "memory_attention": (_memory, _make_memory),
    "pairwise_box_cost": (_detection, _make_cost),
    "detection_set_loss": (_detection, _make_set_loss),
}


def test_random_calls_obey_the_rule(target: Target) -> None:
    strategy, make = _DRAWN[target.spec.name]

    examples = 8 if target.backend == "triton" else 80  # each compiles its kernels, or is interpreted

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy(target.interpreted))
    def check(drawn: dict[str, Any]) -> None:
        torch.manual_seed(drawn["seed"])  # the cotangent's
        assert_obeys_the_rule(target, make(drawn, target.device))

    check()
