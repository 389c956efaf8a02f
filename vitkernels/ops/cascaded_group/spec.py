"""Samples, bad inputs and benchmark shapes of cascaded group attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops._arrange import with_gaps
from vitkernels.ops.cascaded_group import op, reference
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample

Arrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call. One kernel size per head; ``value_dim`` None is the split C / heads; ``window`` None is the whole map."""

    batch: int
    channels: int
    height: int
    width: int
    key_dim: int
    kernels: tuple[int, ...]
    window: int | None = None
    value_dim: int | None = None

    @property
    def heads(self) -> int:
        return len(self.kernels)

    @property
    def split(self) -> int:
        return self.channels // self.heads

    @property
    def d(self) -> int:
        return self.value_dim or self.split

    @property
    def rows(self) -> int:
        """Output channels of one head's qkv projection."""
        return 2 * self.key_dim + self.d

    @property
    def w(self) -> int:
        return self.window or self.height

    @property
    def tiles(self) -> int:
        """Windows in the batch."""
        return self.batch * -(-self.height // self.w) * -(-self.width // self.w)

    def __str__(self) -> str:
        kernels = "".join(map(str, self.kernels))
        return f"{self.batch}x{self.channels}x{self.height}x{self.width} k{self.key_dim} d{self.d} dw{kernels} w{self.window}"


# The first is used alone by many tests: two heads, two kernel sizes, a batch, windows that fit one way and not the other.
_BASE = _Shape(2, 24, 8, 9, 8, (5, 3), 4)
_TINY = _Shape(1, 4, 3, 3, 1, (3, 3), 2)
# The same in a tenth of the interpreter's time, which goes by the windows and by the taps of the depthwise kernels.
_SHORT = _Shape(2, 8, 4, 5, 4, (3, 1), 4)
# What the interpreter gets is the first part, with the first one short: one of each kind.
_SHAPES = (
    _BASE,
    _Shape(0, 24, 8, 9, 8, (5, 3), 4),
    _TINY,
    _Shape(1, 3, 1, 1, 1, (1,), None, value_dim=2),
    _Shape(1, 40, 7, 7, 16, (5, 3), 7),
    _Shape(2, 48, 3, 3, 16, (9, 3, 1), None),
    _Shape(1, 5, 6, 11, 5, (3,), 6, value_dim=7),
    _Shape(1, 64, 4, 4, 16, (7, 5, 3, 3), 4),
    # One pixel windows; kernels much larger than the window.
    _Shape(3, 6, 2, 3, 5, (3, 1, 5), 1),
    _Shape(1, 32, 2, 2, 16, (7, 5), None),
    # EfficientViT's own, and its other value dims.
    _Shape(2, 64, 14, 14, 16, (5, 5, 5, 5), 7),
    _Shape(1, 144, 7, 7, 16, (7, 5, 3), 7),
    _Shape(1, 224, 4, 4, 16, (7, 5), 4),
    # Value dims and key dims that are no multiple of a vector; maps that do not divide; long and tall.
    _Shape(1, 66, 10, 10, 8, (3, 3), 7),
    _Shape(1, 96, 5, 17, 20, (5, 7), 5),
    _Shape(1, 80, 9, 4, 16, (3, 5, 7, 9), 4),
    _Shape(2, 16, 13, 13, 1, (9,), 13),
    _Shape(1, 20, 14, 14, 16, (7,), 14, value_dim=20),
    # Every window from 5 to 14 that is not above.
    _Shape(1, 8, 6, 6, 4, (3, 5), 6),
    _Shape(1, 8, 8, 15, 4, (3, 5), 8),
    _Shape(1, 8, 9, 9, 4, (3, 5), 9),
    _Shape(1, 8, 10, 11, 4, (3, 5), 10),
    _Shape(1, 8, 11, 11, 4, (3, 5), 11),
    _Shape(1, 8, 13, 12, 4, (3, 5), 12),
)
_SMALL = 8
_LAYOUTS = ("channels_last", "transposed", "strided", "expanded")


def _arranged(x: Tensor, layout: str) -> Tensor:
    """The same values (for ``expanded`` the first image's) under other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        return with_gaps(x)
    return x[:1].expand(3, *x.shape[1:])


def _draws(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)


def _weights(shape: _Shape, draw: Callable[..., Tensor], conv: bool) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """qkv_weights, dw_weights, attention_bias and proj_weight, scaled so that every layer's output is of order one."""
    tail = (1, 1) if conv else ()
    qkv = [draw(shape.rows, shape.split, *tail) * shape.split**-0.5 for _ in shape.kernels]
    dw = [draw(shape.key_dim, 1, k, k) / k for k in shape.kernels]
    inner = shape.heads * shape.d
    return qkv, dw, draw(shape.heads, shape.w**2), draw(shape.channels, inner, *tail) * (2 / inner) ** 0.5


def _finished(sample: Sample, dtype: torch.dtype, device: str, grad: bool) -> Sample:
    """The sample in its dtype, on its device, under the same strides; every tensor a leaf of its own."""
    return sample.mapped(lambda tensor: tensor.to(dtype).to(device).detach().requires_grad_(grad))


def _sample(
    name: str,
    shape: _Shape,
    dtype: torch.dtype,
    device: str,
    *,
    grad: bool = False,
    biases: str = "all",
    conv: bool = False,
    arrange: Arrange = lambda x: x,
    seed: int = 0,
    **options: Any,
) -> Sample:
    """A call of :func:`op.cascaded_group_attention`. ``biases`` is "all", "none", or "some": every other one."""
    draw = _draws(seed)
    x = draw(shape.batch, shape.channels, shape.height, shape.width)
    qkv, dw, table, proj = _weights(shape, draw, conv)

    def drawn(length: int, index: int) -> Tensor | None:
        return None if biases == "some" and index % 2 else draw(length) * 0.3

    qkv_biases, dw_biases = (None if biases == "none" else [drawn(n, i) for i in range(shape.heads)] for n in (shape.rows, shape.key_dim))
    proj_bias = draw(shape.channels) * 0.3 if biases == "all" else None
    arguments = (x.to(dtype), qkv, qkv_biases, dw, dw_biases, table, proj, proj_bias)
    sample = Sample(name, arguments, {"key_dim": shape.key_dim, "window": shape.window, **options})
    sample = replace(sample, args=(arrange(sample.args[0]), *sample.args[1:]))
    return _finished(sample, dtype, device, grad)


def _samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_sample, dtype=dtype, device=device, grad=grad)
    for index, shape in enumerate((_SHORT, *_SHAPES[1:_SMALL]) if small else _SHAPES):
        yield make(str(shape), shape, biases=("all", "some", "none")[index % 3], conv=index % 2 == 1, seed=index)
    yield make("scale given", _SHORT if small else _BASE, scale=0.21, seed=1)
    cut = _SHORT if small else _Shape(2, 24, 9, 10, 8, (5, 3), 7)
    for layout in _LAYOUTS[:1] if small else _LAYOUTS:
        yield make(layout, cut, arrange=functools.partial(_arranged, layout=layout), biases="some", seed=2)
    yield make("large logits", _Shape(1, 32, 7, 7, 16, (3, 3), 7), arrange=lambda x: x * 4, seed=3)


def _norm_sample(
    name: str,
    shape: _Shape,
    dtype: torch.dtype,
    device: str,
    *,
    grad: bool = False,
    conv: bool = False,
    arrange: Arrange = lambda x: x,
    gamma: float = 1.0,
    wide_norms: bool = False,
    seed: int = 0,
    **options: Any,
) -> Sample:
    """A call of :func:`op.cascaded_group_attention_batch_norm`. ``gamma`` scales the last norm's weight; ``wide_norms`` leaves norms in float32."""
    draw = _draws(seed)
    x = draw(shape.batch, shape.channels, shape.height, shape.width)
    qkv, dw, table, proj = _weights(shape, draw, conv)

    def norm(length: int) -> tuple[Tensor, Tensor]:
        weight, bias = 1 + 0.3 * draw(length), 0.3 * draw(length)
        return (weight.float(), bias.float()) if wide_norms else (weight, bias)

    qkv_norms = [norm(shape.rows) for _ in shape.kernels]
    dw_norms = [norm(shape.key_dim) for _ in shape.kernels]
    weight, bias = norm(shape.channels)
    arguments = (arrange(x.to(dtype)), qkv, qkv_norms, dw, dw_norms, table, proj, (weight * gamma, bias))
    sample = Sample(name, arguments, {"key_dim": shape.key_dim, "window": shape.window, **options})
    if not wide_norms:
        return _finished(sample, dtype, device, grad)
    return sample.mapped(lambda t: (t if t.dtype is torch.float32 else t.to(dtype)).to(device).detach().requires_grad_(grad))


def _norm_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    """Enough tokens, and kernels that mix several pixels: before a norm the gradient of a scale is a difference of two equal sums, and where that is
    all there is (a depthwise kernel of one pixel) any two ways to compute it differ by all of it. A large eps brings those kernels back.
    """
    make = functools.partial(_norm_sample, dtype=dtype, device=device, grad=grad)
    shapes = (
        _Shape(3, 24, 8, 9, 8, (5, 3), 4),
        _Shape(2, 64, 14, 14, 16, (5, 5, 5, 5), 7),
        _Shape(2, 48, 7, 7, 16, (7, 5, 3), 7),
        _Shape(6, 64, 4, 4, 16, (7, 5, 3, 3), 4),
        _Shape(2, 33, 10, 10, 8, (3,), 7),
        _Shape(1, 40, 14, 14, 20, (5, 3), 14),
        _Shape(4, 18, 5, 11, 5, (3,), 5, value_dim=23),
    )
    for index, shape in enumerate(shapes[:3] if small else shapes):
        yield make(str(shape), shape, conv=index % 2 == 1, seed=index)
    yield make("tiny", replace(_TINY, batch=2), eps=0.3, seed=1)
    yield make("one pixel windows", _Shape(4, 12, 3, 4, 5, (3, 1), 1), eps=0.3, seed=2)
    yield make("scale given", _Shape(3, 24, 8, 9, 8, (5, 3), 4), scale=0.21, seed=3)
    yield make("norms in float32", _Shape(3, 24, 8, 9, 8, (5, 3), 4), wide_norms=dtype is not torch.float64, seed=4)
    yield make("far from zero", _Shape(3, 24, 8, 8, 8, (5, 3), 4), arrange=lambda x: x + 10, seed=5)
    yield make("last norm's weight zero", _Shape(3, 24, 8, 8, 8, (5, 3), 4), gamma=0.0, seed=6)
    for layout in _LAYOUTS:
        yield make(layout, _Shape(3, 24, 9, 10, 8, (5, 3), 7), arrange=functools.partial(_arranged, layout=layout), seed=7)


def _bad_inputs() -> Iterator[BadInput]:
    yield from _common_bad_inputs(_sample("good", _BASE, torch.float32, "cpu"), op.cascaded_group_attention)
    good = _sample("good", _BASE, torch.float32, "cpu").named_arguments(op.cascaded_group_attention)
    bad = functools.partial(_bad, good)
    qkv_biases, dw_biases = good["qkv_biases"], good["dw_biases"]
    yield bad("qkv_biases of one head", ValueError, ("qkv_biases has 1 entries", "2"), qkv_biases=qkv_biases[:1])
    yield bad("qkv_biases is a tensor", TypeError, ("qkv_biases is a Tensor", "list"), qkv_biases=torch.stack(qkv_biases))
    yield bad("qkv_biases too long", ValueError, ("qkv_biases[1] has shape [29]", "[28]"), qkv_biases=[qkv_biases[0], torch.randn(29)])
    yield bad("qkv_biases holds a number", TypeError, ("qkv_biases[0] is a float",), qkv_biases=[1.0, None])
    yield bad("qkv_biases of another dtype", TypeError, ("qkv_biases[0] has dtype torch.float64",), qkv_biases=[qkv_biases[0].double(), None])
    yield bad("dw_biases of three heads", ValueError, ("dw_biases has 3 entries", "2"), dw_biases=[*dw_biases, None])
    yield bad("dw_biases too short", ValueError, ("dw_biases[0] has shape [7]", "[8]"), dw_biases=[torch.randn(7), None])
    yield bad("dw_biases on another device", ValueError, ("dw_biases[1] is on meta", "cpu"), dw_biases=[None, dw_biases[1].to("meta")])
    yield bad("proj_bias two-dimensional", ValueError, ("proj_bias has shape [24, 1]", "[24]"), proj_bias=torch.randn(24, 1))
    yield bad("proj_bias is a list", TypeError, ("proj_bias is a list",), proj_bias=[0.0])
    yield bad("proj_bias of another dtype", TypeError, ("proj_bias has dtype torch.bfloat16", "torch.float32"), proj_bias=torch.randn(24).bfloat16())


def _norm_bad_inputs() -> Iterator[BadInput]:
    sample = _norm_sample("good", _BASE, torch.float32, "cpu")
    yield from _common_bad_inputs(sample, op.cascaded_group_attention_batch_norm)
    good = sample.named_arguments(op.cascaded_group_attention_batch_norm)
    bad = functools.partial(_bad, good)
    first, second = good["qkv_norms"]
    yield bad("qkv_norms of one head", ValueError, ("qkv_norms has 1 entries", "2"), qkv_norms=[first])
    yield bad("qkv_norms without biases", TypeError, ("qkv_norms[1] is a Tensor", "pair"), qkv_norms=[first, second[0]])
    yield bad("qkv_norms too short", ValueError, ("weight of qkv_norms[0] has shape [27]", "[28]"), qkv_norms=[(torch.ones(27), first[1]), second])
    yield bad(
        "qkv_norms of another dtype", TypeError, ("qkv_norms", "torch.float16", "torch.float32"), qkv_norms=[(first[0].half(), first[1]), second]
    )
    yield bad("qkv_norms on another device", ValueError, ("qkv_norms is on meta", "cpu"), qkv_norms=[(first[0].to("meta"), first[1]), second])
    yield bad("dw_norms is a tensor", TypeError, ("dw_norms is a Tensor", "list"), dw_norms=torch.ones(2, 2, 8))
    yield bad(
        "dw_norms too long", ValueError, ("bias of dw_norms[1] has shape [9]", "[8]"), dw_norms=[good["dw_norms"][0], (torch.ones(8), torch.ones(9))]
    )
    yield bad("dw_norms without a weight", TypeError, ("weight of dw_norms[0] is a NoneType",), dw_norms=[(None, torch.ones(8)), good["dw_norms"][1]])
    yield bad("proj_norm missing", TypeError, ("proj_norm is a NoneType", "pair"), proj_norm=None)
    yield bad("proj_norm too short", ValueError, ("weight of proj_norm has shape [23]", "[24]"), proj_norm=(torch.ones(23), torch.ones(24)))
    one = _norm_sample("good", _Shape(1, 4, 1, 1, 1, (1,), None), torch.float32, "cpu").named_arguments(op.cascaded_group_attention_batch_norm)
    yield _bad(one, "one value a channel", ValueError, ("x has shape [1, 4, 1, 1]", "more than one value"))
    yield bad("batch of none", ValueError, ("x has shape [0, 24, 8, 9]", "more than one value"), x=torch.randn(0, 24, 8, 9))


def _bad(good: dict[str, Any], name: str, exception: type[Exception], words: tuple[str, ...], **changes: Any) -> BadInput:
    return BadInput.of(name, exception, words, **(good | changes))


def _common_bad_inputs(sample: Sample, function: Callable[..., Any]) -> Iterator[BadInput]:
    """What both functions refuse, on :data:`_BASE`."""
    good = sample.named_arguments(function)
    bad = functools.partial(_bad, good)
    x, qkv, dw, proj = good["x"], good["qkv_weights"], good["dw_weights"], good["proj_weight"]
    yield bad("x of three dimensions", ValueError, ("x has shape [24, 8, 9]", "[B, C, H, W]"), x=x[0])
    yield bad("x is a list", TypeError, ("x is a list",), x=[1.0])
    yield bad("integer x", TypeError, ("x has dtype torch.int64", "floating"), x=x.long())
    yield bad("sparse x", TypeError, ("x has layout torch.sparse_coo", "dense"), x=x.to_sparse())
    yield bad("heads that do not divide the channels", ValueError, ("qkv_weights has 2 entries", "25 channels"), x=torch.randn(2, 25, 8, 9))
    yield bad("no heads", ValueError, ("qkv_weights has 0 entries",), qkv_weights=[])
    yield bad("qkv_weights is a tensor", TypeError, ("qkv_weights is a Tensor", "list"), qkv_weights=torch.stack(qkv))
    yield bad("qkv_weights holds a number", TypeError, ("qkv_weights[0] is a int",), qkv_weights=[3, qkv[1]])
    yield bad(
        "a value dim that breaks the cascade",
        ValueError,
        ("qkv_weights[0] has shape [27, 12]", "value dim is 11", "C / heads = 12", "[28, 12]"),
        qkv_weights=[weight[:27] for weight in qkv],
    )
    yield bad("key_dim of another model", ValueError, ("qkv_weights[0] has shape [28, 12]", "key_dim 4", "value dim is 20"), key_dim=4)
    yield bad("key_dim too large", ValueError, ("qkv_weights[0] has shape [28, 12]", "key_dim 16"), key_dim=16)
    yield bad("key_dim zero", ValueError, ("key_dim is 0", "positive"), key_dim=0)
    yield bad("key_dim a float", ValueError, ("key_dim is 8.0", "int"), key_dim=8.0)
    yield bad("heads of unlike qkv_weights", ValueError, ("qkv_weights[1] has shape [27, 12]", "[28, 12]"), qkv_weights=[qkv[0], qkv[1][:27]])
    yield bad("qkv_weights of a 3x3 conv", ValueError, ("qkv_weights[0] has shape [28, 12, 3, 3]",), qkv_weights=[torch.randn(28, 12, 3, 3), qkv[1]])
    yield bad("qkv_weights of another dtype", TypeError, ("qkv_weights[1] has dtype torch.float64",), qkv_weights=[qkv[0], qkv[1].double()])
    yield bad("qkv_weights on another device", ValueError, ("qkv_weights[0] is on meta", "cpu"), qkv_weights=[qkv[0].to("meta"), qkv[1]])
    yield bad("dw_weights of one head", ValueError, ("dw_weights has 1 entries", "qkv_weights 2"), dw_weights=dw[:1])
    yield bad(
        "dw_weights of an even kernel", ValueError, ("dw_weights[0] has shape [8, 1, 4, 4]", "k odd"), dw_weights=[torch.randn(8, 1, 4, 4), dw[1]]
    )
    yield bad(
        "dw_weights of another key_dim",
        ValueError,
        ("dw_weights[1] has shape [9, 1, 3, 3]", "key_dim 8"),
        dw_weights=[dw[0], torch.randn(9, 1, 3, 3)],
    )
    yield bad("dw_weights not depthwise", ValueError, ("dw_weights[0] has shape [8, 8, 3, 3]",), dw_weights=[torch.randn(8, 8, 3, 3), dw[1]])
    yield bad("dw_weights not square", ValueError, ("dw_weights[0] has shape [8, 1, 3, 5]",), dw_weights=[torch.randn(8, 1, 3, 5), dw[1]])
    yield bad("dw_weights missing", TypeError, ("dw_weights is a NoneType",), dw_weights=None)
    yield bad("dw_weights of another dtype", TypeError, ("dw_weights[0] has dtype torch.float16",), dw_weights=[dw[0].half(), dw[1]])
    yield bad("attention_bias of another window", ValueError, ("attention_bias has shape [2, 49]", "[2, 16]"), attention_bias=torch.randn(2, 49))
    yield bad("attention_bias gathered", ValueError, ("attention_bias has shape [2, 16, 16]", "[2, 16]"), attention_bias=torch.randn(2, 16, 16))
    yield bad("attention_bias missing", TypeError, ("attention_bias is a NoneType",), attention_bias=None)
    yield bad("attention_bias on another device", ValueError, ("attention_bias is on meta",), attention_bias=torch.randn(2, 16, device="meta"))
    yield bad("proj_weight transposed", ValueError, ("proj_weight has shape [24, 23]", "[24, 24]"), proj_weight=proj[:, :23])
    yield bad("proj_weight is a list", TypeError, ("proj_weight is a list",), proj_weight=[proj])
    yield bad("proj_weight of another dtype", TypeError, ("proj_weight has dtype torch.float64", "torch.float32"), proj_weight=proj.double())
    yield bad("window larger than the map", ValueError, ("window is 9", "larger than the map", "[2, 24, 8, 9]"), window=9)
    yield bad("window zero", ValueError, ("window is 0", "positive"), window=0)
    yield bad("window of two numbers", ValueError, ("window is (4, 4)", "int"), window=(4, 4))
    yield bad("no window on a map that is not square", ValueError, ("x has shape [2, 24, 8, 9]", "square"), window=None)


@functools.lru_cache(maxsize=64)
def _place(window: int, device: torch.device) -> Tensor:
    return reference.bias_index(window, device)


def _rewritten(
    x: Tensor,
    qkv_weights: list[Tensor],
    qkv_biases: list[Tensor],
    dw_weights: list[Tensor],
    dw_biases: list[Tensor],
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    key_dim: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The same in as few PyTorch calls as a careful user could write, and so the fair peer: the index of the bias made once, a window's tokens in
    rows, and scores, scale and bias in one product.
    """
    size = (x.shape[2], x.shape[3])
    w = size[0] if window is None else window
    scale = key_dim**-0.5 if scale is None else scale
    bias = attention_bias[:, _place(w, x.device)]  # [heads, N, N]
    x = F.pad(x, (0, -size[1] % w, 0, -size[0] % w))
    batch, channels, height, width = x.shape
    rows, columns = height // w, width // w
    tokens = x.view(batch, channels, rows, w, columns, w).permute(0, 2, 4, 3, 5, 1).reshape(-1, w * w, channels)  # [T, N, C]
    outputs: list[Tensor] = []
    for head, split in enumerate(tokens.chunk(len(qkv_weights), dim=2)):
        feature = split + outputs[-1] if outputs else split
        q, k, v = F.linear(feature, qkv_weights[head].flatten(1), qkv_biases[head]).tensor_split((key_dim, 2 * key_dim), dim=2)
        q = q.unflatten(1, (w, w)).permute(0, 3, 1, 2)  # channels_last, no copy
        q = F.conv2d(q, dw_weights[head], dw_biases[head], padding=dw_weights[head].shape[-1] // 2, groups=key_dim)
        scores = torch.baddbmm(bias[head], q.flatten(2).mT, k.mT, alpha=scale)
        outputs.append(scores.softmax(-1) @ v)
    y = F.linear(F.relu(torch.cat(outputs, dim=2)), proj_weight.flatten(1), proj_bias)
    y = y.view(batch, rows, columns, w, w, channels).permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
    return y[:, :, : size[0], : size[1]]


# Stages of EfficientViT at 224 pixels: name, channels, map, kernels, window.
_STAGES = (
    ("M0s1", 64, 14, (5, 5, 5, 5), 7),
    ("M0s2", 128, 7, (5, 5, 5, 5), 7),
    ("M0s3", 192, 4, (5, 5, 5, 5), 4),
    ("M4s1", 128, 14, (7, 5, 3, 3), 7),
    ("M4s2", 256, 7, (7, 5, 3, 3), 7),
    ("M4s3", 384, 4, (7, 5, 3, 3), 4),
    ("M5s1", 192, 14, (7, 5, 3), 7),
)


def _case(stage: tuple[str, int, int, tuple[int, ...], int], batch: int, make: Callable[..., Sample]) -> BenchCase:
    name, channels, side, kernels, window = stage
    shape = _Shape(batch, channels, side, side, 16, kernels, window)
    pixels = window * window
    per_head = 2 * pixels * (shape.rows * shape.split + pixels * (shape.key_dim + shape.d))
    depthwise = sum(2 * pixels * shape.key_dim * k * k for k in kernels)
    per_window = shape.heads * per_head + depthwise + 2 * pixels * channels * shape.heads * shape.d
    weights = shape.heads * shape.rows * shape.split + shape.key_dim * sum(k * k for k in kernels) + channels * shape.heads * shape.d
    return BenchCase(
        name=f"{name} C{channels} H{shape.heads} {side}x{side} B{batch}",
        make=lambda dtype, device: make("bench", shape, dtype, device, conv=True),
        flops=shape.tiles * per_window,
        elements_moved=2 * batch * channels * side * side + weights,
    )


def _saved(sample: Sample) -> int:
    """The packed copies of the weights of the heads."""
    _, qkv_weights, qkv_biases, dw_weights, dw_biases, *_ = sample.args
    heads, rows, key_dim = len(qkv_weights), qkv_weights[0].shape[0], sample.kwargs["key_dim"]
    elements = sum(weight.numel() for weight in (*qkv_weights, *dw_weights))
    elements += heads * (rows * (qkv_biases is not None) + key_dim * (dw_biases is not None))
    return elements * sample.args[0].element_size()


def _norm_saved(sample: Sample) -> int:
    """The packed copies of the weights, and in float32 the packed norms, the statistics, each head's moments and the projection before its norm."""
    x, qkv_weights, _, dw_weights, *_ = sample.args
    heads, rows, key_dim, channels = len(qkv_weights), qkv_weights[0].shape[0], sample.kwargs["key_dim"], x.shape[1]
    w = sample.kwargs["window"] or x.shape[2]
    tokens = x.shape[0] * -(-x.shape[2] // w) * -(-x.shape[3] // w) * w * w
    normed, split = heads * (rows + key_dim) + channels, channels // heads
    packed = sum(weight.numel() for weight in (*qkv_weights, *dw_weights)) * x.element_size()
    return packed + (2 * normed + 2 * normed + heads * (1 + split) * split + tokens * channels) * (8 if x.dtype is torch.float64 else 4)


SPECS = (
    OpSpec(
        name="cascaded_group_attention",
        family="cascaded_group",
        function=op.cascaded_group_attention,
        reference=reference.cascaded_group_attention,
        summary="cascaded group attention with its window partition (EfficientViT, arXiv 2305.07027)",
        samples=_samples,
        bad_inputs=_bad_inputs,
        bench_cases=tuple(_case(stage, batch, _sample) for batch in (1, 16) for stage in _STAGES),
        gpu_cases=(_case(_STAGES[0], 1, _sample), *(_case(_STAGES[i], 256, _sample) for i in (0, 3, 4, 5))),
        saved_bytes=_saved,
        peers={"eager, tokens in rows": _rewritten},
    ),
    OpSpec(
        name="cascaded_group_attention_batch_norm",
        family="cascaded_group",
        function=op.cascaded_group_attention_batch_norm,
        reference=reference.cascaded_group_attention_batch_norm,
        summary="cascaded group attention with live BatchNorm, for training (EfficientViT, arXiv 2305.07027)",
        samples=_norm_samples,
        bad_inputs=_norm_bad_inputs,
        bench_cases=tuple(_case(stage, 16, _norm_sample) for stage in _STAGES),
        gpu_cases=tuple(_case(stage, 256, _norm_sample) for stage in _STAGES),
        saved_bytes=_norm_saved,
        # Between its passes over the windows all activations lie in memory: the formula is in the op's README.
        working_activations=(3, 6),
        kept_by_autocast=("qkv_norms", "dw_norms", "proj_norm"),
    ),
)
