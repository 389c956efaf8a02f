"""``ops.attention_similarity`` against its definition in float64, its memory, and what it refuses. It is in no registry: all its tests are here."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels import accuracy, ops, registry
from vitkernels.ops.similarity import op as similarity

# batch, heads, tokens, head dimension of the one and of the other layer
SHAPES = [(2, 3, 1, 5, 5), (3, 1, 2, 4, 4), (2, 5, 7, 33, 8), (300, 2, 7, 16, 16), (2, 12, 197, 32, 35), (1, 4, 300, 20, 64), (1, 3, 577, 1, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(batch: int, heads: int, tokens: int, dims: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """The q and k of each layer, sliced from a packed [B, N, 3, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    packed = [torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype) for dim in dims]
    return [t for qkv in packed for t in qkv.permute(2, 0, 3, 1, 4)[:2]]


def direct(q1: Tensor, k1: Tensor, q2: Tensor | None = None, k2: Tensor | None = None, dim: int = -2, scales: Any = (None, None)) -> Tensor:
    """The definition, with the maps."""
    maps = [
        (q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
        for q, k, scale in ((q1, k1, scales[0]), (q2, k2, scales[1]))
        if q is not None and k is not None
    ]
    if len(maps) == 2:
        return F.cosine_similarity(*maps, dim=dim).mean((0, 2))
    return F.cosine_similarity(maps[0][:, :, None], maps[0][:, None], dim=dim).mean((0, 3))


def assert_obeys_the_rule(tensors: list[Tensor], **options: Any) -> None:
    """As near float64 as the definition in the dtype that the op promises to compute in, by the rule of the contract."""
    wide = torch.float64 if tensors[0].dtype is torch.float64 else torch.float32
    dim = options.get("dim", -2)

    def compared(number: int | None) -> list[accuracy.Comparison]:
        generator = torch.Generator().manual_seed(number or 0)
        signs = [torch.randint(0, 2, t.shape, generator=generator) * 2 - 1 for t in tensors]
        moved = tensors if number is None else [t * (1 + sign * accuracy.REDRAW_STEP).to(t.dtype) for t, sign in zip(tensors, signs, strict=True)]
        fast = ops.attention_similarity(*moved, **options)
        assert fast.dtype is wide
        exact, eager = (direct(*(t.to(dtype) for t in moved), dim=dim) for dtype in (torch.float64, wide))
        found = accuracy.compare_tensors("similarity", fast, eager, exact)
        if wide is torch.float64:  # the definition is the truth itself: for its error stands what a sum of that many terms rounds to
            steps = math.prod((*moved[0].shape[:3], moved[0].shape[2])) ** 0.5
            found = accuracy.Comparison(found.name, found.error, steps * torch.finfo(wide).eps * found.scale, found.scale, found.floor)
        return [found]

    verdict = accuracy.settled(compared(None), compared)
    assert all(c.holds for c in verdict), verdict


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> None:
    batch, heads, tokens, *dims = shape
    q1, k1, q2, k2 = drawn(batch, heads, tokens, tuple(dims), dtype)
    two, one = ops.attention_similarity(q1, k1, q2, k2, dim=dim), ops.attention_similarity(q1, k1, dim=dim)
    assert (two.shape, one.shape) == ((heads,), (heads, heads))
    assert_obeys_the_rule([q1, k1, q2, k2], dim=dim)
    assert_obeys_the_rule([q1, k1], dim=dim)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("block", [1, 700, 5000, 1 << 14])
def test_any_cut_into_blocks_gives_the_same(block: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, rows that do not divide N, some elements of the batch at a time that do not divide B."""
    tensors = drawn(5, 3, 7, (8, 9), torch.float64)
    monkeypatch.setitem(similarity.BLOCK_BYTES, "cpu", block)
    for arguments in (tensors, tensors[:2]):
        assert_obeys_the_rule(arguments, dim=dim)


def test_the_cuts_of_the_test_above_are_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    q = drawn(5, 3, 7, (8,), torch.float64)[0]
    cuts = set()
    for block in (1, 700, 5000, 1 << 14):
        monkeypatch.setitem(similarity.BLOCK_BYTES, "cpu", block)
        cuts.add(similarity._blocks(q))
    assert cuts == {(1, 1), (1, 4), (4, 7), (5, 7)}


@pytest.mark.parametrize("dim", [-1, -2])
def test_peaked_maps(dim: int) -> None:
    """Logits in the thousands: most columns are all zeros, and their cosine is 0, not NaN."""
    tensors = [t * 30 for t in drawn(2, 3, 65, (16, 16))]
    found = ops.attention_similarity(*tensors, dim=dim)
    assert found.isfinite().all() and ops.attention_similarity(*tensors[:2], dim=dim).isfinite().all()
    assert_obeys_the_rule(tensors, dim=dim)
    assert_obeys_the_rule(tensors[:2], dim=dim)


def test_known_values() -> None:
    """Maps that are permutations, so that rows and columns agree or have nothing in common: all of them, none, half, and a quarter."""
    eye, n = torch.eye(8) * 1000, 8
    swapped = torch.cat([torch.arange(4), torch.tensor([5, 4, 7, 6])])
    q1 = eye.expand(2, 3, n, n)
    q2 = torch.stack([eye, eye.roll(1, 0), eye[swapped]]).expand(2, 3, n, n)
    k = torch.eye(n).expand(2, 3, n, n)
    for dim in (-1, -2):
        assert ops.attention_similarity(q1, k, q2, k, scale=1.0, dim=dim).tolist() == [1.0, 0.0, 0.5]
        assert ops.attention_similarity(q2, k, scale=1.0, dim=dim).tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.25], [0.5, 0.25, 1.0]]


def test_rows_and_columns_are_different_questions() -> None:
    """Two layers in which every token looks at one and the same other one: the columns looked at agree in which they are; rows agree altogether."""
    k = torch.zeros(1, 1, 4, 2)
    k[..., 0, 0] = k[..., 1, 1] = 200.0
    first, second = (torch.tensor(row).expand(1, 1, 4, 2).clone() for row in ([1.0, 0.0], [0.0, 1.0]))
    second[..., 0, :] = torch.tensor([1.0, 0.0])
    assert ops.attention_similarity(first, k, second, k, dim=-1).tolist() == [0.25]
    assert ops.attention_similarity(first, k, second, k, dim=-2).tolist() == pytest.approx([1 / (2 * 4)])


def test_scale_of_each_layer() -> None:
    tensors = drawn(2, 3, 9, (8, 6), torch.float64)
    cases: list[tuple[Any, tuple[float, float]]] = [(None, (8**-0.5, 6**-0.5)), (0.3, (0.3, 0.3)), ((0.1, 2.0), (0.1, 2.0)), ([0.1, 2.0], (0.1, 2.0))]
    found = [ops.attention_similarity(*tensors, scale=given) for given, _ in cases]
    for similar, (_, scales) in zip(found, cases, strict=True):
        torch.testing.assert_close(similar, direct(*tensors, scales=scales), rtol=1e-13, atol=0)
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(found[:3], 2))
    torch.testing.assert_close(ops.attention_similarity(*tensors[:2], scale=0.3), direct(*tensors[:2], scales=(0.3, None)), rtol=1e-13, atol=0)


def test_symmetric_in_the_layers_and_in_the_heads() -> None:
    q1, k1, q2, k2 = drawn(2, 4, 9, (8, 6), torch.float64)
    torch.testing.assert_close(ops.attention_similarity(q1, k1, q2, k2), ops.attention_similarity(q2, k2, q1, k1), rtol=1e-14, atol=0)
    among = ops.attention_similarity(q1, k1)
    torch.testing.assert_close(among, among.T, rtol=1e-14, atol=0)
    torch.testing.assert_close(among.diagonal(), torch.ones(4, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(among[0, 1:2], ops.attention_similarity(q1[:, :1], k1[:, :1], q1[:, 1:2], k1[:, 1:2]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
def test_the_mean_of_nothing_is_nan(batch: int, tokens: int, dim: int) -> None:
    tensors = drawn(batch, 3, tokens, (4, 4))
    for arguments, shape in ((tensors, (3,)), (tensors[:2], (3, 3))):
        found = ops.attention_similarity(*arguments, dim=dim)
        assert found.shape == shape and found.isnan().all()


@pytest.mark.parametrize("dim", [-1, -2])
def test_nan_shows(dim: int) -> None:
    q1, k1, q2, k2 = drawn(2, 3, 9, (8, 8))
    q1 = q1.clone()
    q1[1, 1, 4, 0] = math.nan
    assert ops.attention_similarity(q1, k1, q2, k2, dim=dim).isnan().tolist() == [False, True, False]
    assert ops.attention_similarity(q1, k1, dim=dim).isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]


def test_no_gradient_and_inputs_unharmed() -> None:
    tensors = [t.clone().requires_grad_() for t in drawn(2, 3, 9, (8, 8))]
    before = [t.detach().clone() for t in tensors]
    found = ops.attention_similarity(*tensors)
    assert not found.requires_grad and torch.is_grad_enabled()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = drawn(2, 3, 65, (16, 16))
    plain = ops.attention_similarity(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.attention_similarity(*tensors), plain)


def test_no_backend_is_asked_for() -> None:
    """It is in no registry, and what backend is asked for changes nothing."""
    tensors = drawn(2, 3, 9, (8, 8))
    plain = ops.attention_similarity(*tensors)
    assert "attention_similarity" not in registry.all_specs()
    for name in ("reference", "native", "triton", "cuda"):
        with vitkernels.backend(name):  # type: ignore[arg-type]
            assert torch.equal(ops.attention_similarity(*tensors), plain)


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside of the block held at one time, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._holders: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def _released(self, pointer: int, identity: int) -> None:
        self._known.discard(identity)
        self._holders[pointer] -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, Tensor) or id(tensor) in self._known:
                continue
            storage = tensor.untyped_storage()
            pointer = storage.data_ptr()
            if pointer in given and not self._holders.get(pointer):
                continue  # a view of something made outside
            self._known.add(id(tensor))
            self._holders[pointer] = self._holders.get(pointer, 0) + 1
            self._sizes[pointer] = storage.nbytes()
            weakref.finalize(tensor, self._released, pointer, id(tensor))
            self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self._sizes[pointer] for pointer, count in self._holders.items() if count))
        return out


def most(batch: int, heads: int, tokens: int, dim: int, *, layers: int, columns: bool) -> int:
    """The formula of the README."""
    block = max(similarity.BLOCK_BYTES["cpu"], 4 * heads * tokens)
    rows = 4 * 3 * heads * tokens if layers == 2 else 4 * tokens * heads * (heads + 1)
    return 5 * block + layers * 4 * heads * tokens * dim + (rows if columns else 0) + 4 * heads * heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", [(4, 12, 577, 32), (1, 2, 2100, 16)], ids=str)
def test_memory(shape: tuple[int, ...], layers: int, dim: int, dtype: torch.dtype) -> None:
    """No map, whole or of one element, and at any moment no more than the README's formula. The definition is far beyond both."""
    batch, heads, tokens, head_dim = shape
    tensors = drawn(batch, heads, tokens, (head_dim,) * layers, dtype)
    with Live() as live:
        ops.attention_similarity(*tensors, dim=dim)
    allowed = most(*shape, layers=layers, columns=dim == -2)
    assert live.largest <= max(similarity.BLOCK_BYTES["cpu"], 4 * tokens * heads * max(heads, head_dim))
    assert live.peak <= allowed, f"{live.peak} bytes, allowed {allowed}"
    with Live() as naive:
        maps = [(q.float() @ k.float().transpose(-2, -1)).softmax(-1) for q, k in zip(tensors[::2], tensors[1::2], strict=True)]
    assert naive.largest == 4 * maps[0].numel() > allowed


BAD: list[tuple[str, Any, type[Exception], tuple[str, ...]]] = [
    ("no tensor", lambda q: ([1.0], q), TypeError, ("q1 is a list", "[B, H, N, D]")),
    ("three dimensions", lambda q: (q[0], q[0]), ValueError, ("q1 has shape [3, 5, 8]", "4-dimensional")),
    ("integers", lambda q: (q.long(), q.long()), TypeError, ("q1 has dtype torch.int64", "floating")),
    ("sparse", lambda q: (q, q.to_sparse()), TypeError, ("k1 has layout", "strided")),
    ("k1 of other tokens", lambda q: (q, q[:, :, :4]), ValueError, ("k1 has shape [2, 3, 4, 8]", "[2, 3, 5, 8]")),
    ("k1 of another dtype", lambda q: (q, q.double()), TypeError, ("k1 has dtype torch.float64", "torch.float32")),
    ("k1 elsewhere", lambda q: (q, q.to("meta")), ValueError, ("k1 is on meta", "cpu")),
    ("q2 alone", lambda q: (q, q, q), ValueError, ("q2 is given and k2 is None",)),
    ("k2 alone", lambda q: (q, q, None, q), ValueError, ("k2 is given and q2 is None",)),
    ("q2 of other tokens", lambda q: (q, q, q[:, :, :4], q[:, :, :4]), ValueError, ("q2 has shape [2, 3, 4, 8]", "[2, 3, 5, 8]", "q1's B, H and N")),
    ("q2 of other heads", lambda q: (q, q, q[:, :2], q[:, :2]), ValueError, ("q2 has shape [2, 2, 5, 8]", "[2, 3, 5, 8]")),
    ("k2 of another dimension", lambda q: (q, q, q, q[..., :4]), ValueError, ("k2 has shape [2, 3, 5, 4]", "of q2")),
    ("q2 of another dtype", lambda q: (q, q, q.half(), q.half()), TypeError, ("q2 has dtype torch.float16", "the dtype of q1")),
    ("no heads", lambda q: (q[:, :0], q[:, :0]), ValueError, ("q1 has shape [2, 0, 5, 8]", "H and D must be at least 1")),
    ("no head dimension", lambda q: (q, q, q[..., :0], q[..., :0]), ValueError, ("q2 has shape [2, 3, 5, 0]", "H and D2 must be at least 1")),
]


@pytest.mark.parametrize(("arguments", "exception", "words"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_refused_in_words(arguments: Any, exception: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(exception) as caught:
        ops.attention_similarity(*arguments(torch.randn(2, 3, 5, 8)))
    assert type(caught.value) is exception
    message = str(caught.value)
    assert message.startswith("attention_similarity: ")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 1}, ("dim is 1", "-1 (rows of the maps) or -2 (columns)")),
        ({"scale": (1.0,)}, ("scale holds 1 numbers", "must hold 2")),
        ({"scale": (1.0, 1.0, 1.0)}, ("scale holds 3 numbers",)),
    ],
)
def test_options_refused_in_words(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        ops.attention_similarity(*drawn(2, 3, 5, (8, 8)), **options)
    for word in words:
        assert word in str(caught.value)
