"""The chain of layers: every kind of layer against plain PyTorch, odd shapes and strides, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels import native
from vitkernels.accuracy import compare_tensors
from vitkernels.ops.cascaded_group.op import pack as pack_attention
from vitkernels.ops.chain import op, reference
from vitkernels.ops.chain.reference import Attention, Convolution, Depthwise, FeedForward, Layer, Pool, SqueezeExcite

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """Random layers, all from one generator."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale

    def convolution(self, channels: int, out: int, kernel: int, stride: int = 1, padding: int = 0, **flags: bool) -> Layer:
        depth = channels * kernel**2
        return Convolution(self(out, channels, kernel, kernel, scale=depth**-0.5), self(out, scale=0.1), stride, padding, **flags)

    def depthwise(self, channels: int, kernel: int, stride: int = 1, padding: int = 0, **flags: bool) -> Layer:
        return Depthwise(self(channels, 1, kernel, kernel, scale=1 / kernel), self(channels, scale=0.1), stride, padding, **flags)

    def _twice(self, kind: Callable[..., Any], channels: int, hidden: int, residual: bool) -> Layer:
        weights = self(hidden, channels, scale=channels**-0.5), self(hidden), self(channels, hidden, scale=hidden**-0.5), self(channels)
        return kind(*weights, residual)

    def feed_forward(self, channels: int, hidden: int, residual: bool = True) -> Layer:
        return self._twice(FeedForward, channels, hidden, residual)

    def squeeze_excite(self, channels: int, hidden: int, residual: bool = False) -> Layer:
        return self._twice(SqueezeExcite, channels, hidden, residual)

    def pool(self, channels: int) -> Layer:
        return Pool(self(channels), self(channels))

    def attention(self, split: int, kernels: tuple[int, ...], window: int, key_dim: int = 16, residual: bool = True, bias: bool = True) -> Layer:
        heads, rows = len(kernels), 2 * key_dim + split
        packed = pack_attention(
            [self(rows, split, scale=split**-0.5) for _ in kernels],
            [self(rows) for _ in kernels] if bias else None,
            [self(key_dim, 1, k, k, scale=1 / k) for k in kernels],
            [self(key_dim) for _ in kernels] if bias else None,
            self(heads, window * window),
            self(heads * split, heads * split, scale=(heads * split) ** -0.5),
            self(heads * split) if bias else None,
            key_dim=key_dim,
        )
        return Attention(packed, key_dim**-0.5, window, residual)


def _chains() -> Iterator[Any]:
    d = Draw()
    yield "an image", (2, 3, 19, 23), [d.convolution(3, 8, 3, 2, 1, relu=True), d.convolution(8, 17, 3, 2, 1)]
    yield "1x1", (3, 20, 5, 7), [d.convolution(20, 33, 1, relu=True), d.convolution(33, 33, 1, residual=True)]
    yield "an image in other strides", (2, 4, 31, 70), [d.convolution(4, 33, 5, 3, 4)]
    yield "an image of twelve channels", (1, 12, 9, 40), [d.convolution(12, 16, 3, 1, 1, relu=True), d.convolution(16, 16, 3, 1, 1)]
    yield "a kernel beside the image", (1, 2, 3, 2), [d.convolution(2, 5, 2, 2, 4)]
    yield "a head", (3, 40, 4, 5), [d.convolution(40, 40, 1, relu=True), d.pool(40), d.convolution(40, 1001, 1)]
    yield "a mean alone", (2, 7, 3, 3), [d.pool(7)]
    yield "1x1 in strides", (2, 5, 9, 8), [d.convolution(5, 16, 1, 2)]
    yield "5x5 with residual", (2, 24, 6, 5), [d.convolution(24, 24, 5, 1, 2, residual=True), d.convolution(24, 24, 2, relu=True)]
    yield "one channel", (2, 1, 4, 4), [d.convolution(1, 1, 3, 1, 1), d.depthwise(1, 3, 1, 1, relu=True, residual=True)]
    yield "depthwise", (2, 80, 7, 9), [d.depthwise(80, 3, 1, 1, residual=True), d.depthwise(80, 5, 2, 2, relu=True), d.depthwise(80, 3, 2, 1)]
    yield "depthwise without padding", (1, 7, 9, 9), [d.depthwise(7, 4, 3)]
    yield "a kernel larger than the map", (2, 16, 2, 1), [d.depthwise(16, 5, 1, 2), d.convolution(16, 16, 5, 1, 2)]
    yield "feed-forward", (2, 48, 7, 7), [d.feed_forward(48, 96), d.feed_forward(48, 20, residual=False)]
    yield "depthwise and feed-forward", (1, 64, 14, 14), [d.depthwise(64, 3, 1, 1, residual=True), d.feed_forward(64, 128), d.feed_forward(64, 64)]
    yield "squeeze and excitation", (3, 40, 5, 6), [d.squeeze_excite(40, 10), d.squeeze_excite(40, 24, residual=True)]
    yield "attention in one window", (2, 64, 7, 7), [d.attention(16, (7, 5, 3, 3), 7)]
    yield "attention, filled up", (2, 48, 9, 6), [d.attention(24, (3, 5), 4, key_dim=8, bias=False), d.attention(24, (3, 1), 4, residual=False)]
    yield (
        "a stage",
        (5, 32, 13, 11),
        [
            *(d.depthwise(32, 3, 1, 1, residual=True), d.feed_forward(32, 64)),
            *(d.convolution(32, 128, 1, relu=True), d.depthwise(128, 3, 2, 1, relu=True), d.squeeze_excite(128, 32), d.convolution(128, 48, 1)),
            *(d.depthwise(48, 3, 1, 1, residual=True), d.feed_forward(48, 96), d.attention(16, (5, 3, 3), 4), d.feed_forward(48, 96)),
        ],
    )
    # Passes of several images each, and then of more of them.
    yield "many images", (9, 3, 200, 210), [d.convolution(3, 16, 3, 2, 1, relu=True), d.depthwise(16, 3, 4, 1), d.feed_forward(16, 32)]


CHAINS = {name: (shape, layers) for name, shape, layers in _chains()}


def cast(layer: Any, dtype: torch.dtype) -> Any:
    """A layer with every tensor of another dtype."""

    def to(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype)
        return type(value)._make(map(to, value)) if isinstance(value, tuple) else value

    return to(layer)


def assert_right(x: Tensor, layers: list[Layer]) -> Tensor:
    """The kernel's result, held to the rule against eager on weights of the dtype of ``x``."""
    layers = [cast(layer, x.dtype) for layer in layers]
    fast = op.run(x, op.pack(layers, x.dtype))
    exact = reference.layer_chain(x.double(), [cast(layer, torch.float64) for layer in layers])
    comparison = compare_tensors("output", fast, reference.layer_chain(x, layers), exact)
    # Float64 is its own truth: chained sums of d products in another order differ by about d roundings each.
    bound = comparison.allowed
    if x.dtype is torch.float64:
        bound = max(bound, max(x.shape[1], fast.shape[1]) ** 2 * torch.finfo(x.dtype).eps * comparison.scale)
    assert fast.dtype is x.dtype and comparison.error <= bound, comparison
    return fast


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    shape, layers = CHAINS[name]
    if name == "many images" and dtype in (torch.float16, torch.float64):
        pytest.skip("large, and the same code as of the other dtypes")
    assert assert_right(Draw(1)(*shape).to(dtype), layers).is_contiguous()


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x, x], 3)[..., x.shape[3] : 2 * x.shape[3]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ["an image", "a stage"])
def test_strides(name: str, arrangement: str) -> None:
    shape, layers = CHAINS[name]
    x = ARRANGEMENTS[arrangement](Draw(1)(*shape).float())
    y = assert_right(x, layers)
    packed = op.pack([cast(layer, torch.float32) for layer in layers], torch.float32)
    assert torch.equal(y, op.run(x.contiguous(), packed))
    assert y.is_contiguous(memory_format=torch.channels_last if arrangement == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("batch", [1, 3])
def test_batch(batch: int) -> None:
    (_, *shape), layers = CHAINS["a stage"]
    assert_right(Draw(1)(batch, *shape).float(), layers)


def test_no_image() -> None:
    (_, *shape), layers = CHAINS["a stage"]
    assert op.run(torch.empty(0, *shape), op.pack([cast(layer, torch.float32) for layer in layers], torch.float32)).shape == (0, 48, 7, 6)


def test_a_nan_stays_in_its_image() -> None:
    shape, layers = CHAINS["a stage"]
    x = Draw(1)(*shape).float()
    packed = op.pack([cast(layer, torch.float32) for layer in layers], torch.float32)
    expected = op.run(x, packed)
    x[1, 3, 2, 2] = torch.nan
    y = op.run(x, packed)
    assert y[1].isnan().any() and torch.equal(y[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_pair_is_not_filled_up_with_the_next_image(kernel: int) -> None:
    packed = op.pack([cast(Draw().convolution(3, 8, kernel), torch.bfloat16)], torch.bfloat16)
    x = Draw(1)(2, 3, 6, 6).bfloat16()
    expected = op.run(x, packed)
    x[1] = torch.nan
    assert torch.equal(op.run(x, packed)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixels", [1, 4, 5])
def test_few_pixels_for_many_threads(pixels: int, dtype: torch.dtype) -> None:
    """Threads share the columns of large matrices, or where there are more threads than columns, as of other matrices, the pixels."""
    d = Draw()
    pair = [d.depthwise(290, 3, 1, 1, residual=True), d.feed_forward(290, 1000), d.feed_forward(290, 1000, residual=False)]
    layers = [
        d.convolution(1000, 290, 1, relu=True),
        *pair,
        d.convolution(290, 1100, 1),
        d.convolution(1100, 290, 1, residual=False),
        d.feed_forward(290, 20),
    ]
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 20):
            torch.set_num_threads(threads)
            assert_right(Draw(1)(1, 1000, pixels, pixels).to(dtype), layers)
    finally:
        torch.set_num_threads(before)


def test_threads() -> None:
    """Several Python threads at once get what one gets alone."""
    shape, layers = CHAINS["a stage"]
    packed = op.pack([cast(layer, torch.float32) for layer in layers], torch.float32)
    inputs = [Draw(seed)(*shape).float() for seed in range(4)]
    expected = [op.run(x, packed) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(lambda x: op.run(x, packed), inputs), expected))


def test_other_numbers_of_workers() -> None:
    shape, layers = CHAINS["a stage"]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert_right(Draw(1)(*shape).float()[:2], layers)
    finally:
        torch.set_num_threads(before)


def test_opcheck() -> None:
    shape, layers = CHAINS["a stage"]
    for x in (torch.randn(shape), torch.randn(shape).to(memory_format=torch.channels_last)):
        packed = op.pack([cast(layer, torch.float32) for layer in layers], torch.float32)
        torch.library.opcheck(torch.ops.vitkernels.layer_chain, (x, packed.matrices, packed.vectors, packed.program))


def test_a_gradient_is_refused() -> None:
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    y = op.run(x, op.pack([cast(Draw().feed_forward(16, 16), torch.float32)], torch.float32))
    with pytest.raises(NotImplementedError, match="for inference and has no gradient"):
        y.sum().backward()


def _call(x: Tensor, packed: op.Packed, **changed: Any) -> Tensor:
    arguments: Any = packed._replace(**changed)
    return torch.ops.vitkernels.layer_chain(x, arguments.matrices, arguments.vectors, arguments.program)


BAD: dict[str, tuple[Callable[[Tensor, op.Packed], Any], str]] = {
    "three dimensions": (lambda x, p: _call(x[0], p), "B, C, H, W"),
    "no pixel": (lambda x, p: _call(x[..., :0], p), "not empty but for B"),
    "another dtype": (lambda x, p: _call(x.double(), p), "matrices must have the dtype"),
    "other channels": (lambda x, p: _call(x[:, :16], p), "the heads must divide the channels"),
    "a small map": (lambda x, p: _call(x[..., :3], p), "smaller than the window"),
    "no program": (lambda x, p: _call(x, p, program=()), "the program is empty"),
    "cut off": (lambda x, p: _call(x, p, program=p.program[:-1]), "ends within a layer"),
    "no such kind": (lambda x, p: _call(x, p, program=(9, *p.program[1:])), "names no kind of layer with 9"),
    "another kind inside": (lambda x, p: _call(x, p, program=(6, *p.program[1:])), "names no kind of layer with 6"),
    "an even kernel": (lambda x, p: _call(x, p, program=(*p.program[:-1], 4)), "must be odd"),
    "negative": (lambda x, p: _call(x, p, program=(*p.program[:-1], -3)), "holds -3"),
    "short vectors": (lambda x, p: _call(x, p, vectors=p.vectors[:-16]), "needs contiguous matrices"),
    "pairs of another dtype": (lambda x, p: _call(x, p, matrices=p.matrices.int()), "matrices must have the dtype"),
    "vectors in bfloat16": (lambda x, p: _call(x, p, vectors=p.vectors.bfloat16()), "accumulation type"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, words = BAD[name]
    layers = [cast(Draw().attention(16, (3, 5), 4), torch.float32)]
    with pytest.raises(RuntimeError, match=words):
        call(torch.randn(2, 32, 5, 5), op.pack(layers, torch.float32))


def test_shapes_that_do_not_fit_are_known_before() -> None:
    shape, layers = CHAINS["a stage"]
    program = op.pack(layers, torch.float32).program
    assert op.why_not_map(program, *shape[1:]) is None
    assert op.why_not_map(program, 32, 13, 6) == "the map is 13 x 6, and a layer inside would find 7 x 3 where it needs at least 4 x 4"
