"""The NaViT model against a plain transformer that takes one image at a time."""

from __future__ import annotations

import copy
import io
import itertools
import re
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import vitkernels
from vitkernels.accuracy import compare_tensors
from vitkernels.navit import BetaTokenDrop, NaViT, TokenDrop, patchify

from .. import zoo

P = 4
SIZES = [(3, 4), (5, 2), (1, 1), (6, 7)]


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Any:
    with vitkernels.backend(request.param):
        yield request.param


def images(*sizes: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, rows * P, cols * P, generator=generator).to(dtype) for rows, cols in sizes]


def model(**options: Any) -> NaViT:
    torch.manual_seed(0)
    built = NaViT(**{"patch_size": P, "dim": 24, "depth": 2, "heads": 3, "out_features": 5, "max_size": 8, "mlp_dim": 40, **options})
    for parameter in built.parameters():  # large enough that attention is no mean, and no norm's weight is one
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    return built


def norm(x: Tensor, kind: str | None, weight: Tensor | None) -> Tensor:
    if kind is None or weight is None:
        return x
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight)
    return (F.rms_norm(x, x.shape[-1:], eps=1e-6) if kind == "rms" else F.normalize(x, dim=-1) * x.shape[-1] ** 0.5) * weight


def one_image(net: NaViT, image: Tensor) -> Tensor:
    """The model on one image in plain PyTorch: [C, H, W] to [out_features]. Absolute learned positions, summed."""
    columns = image.shape[2] // P
    x = F.unfold(image[None], P, stride=P)[0].T @ net.patch_embed.weight.T
    places = torch.arange(len(x))
    x = x + net.pos_embed.row_table[places // columns] + net.pos_embed.col_table[places % columns]
    for block in net.blocks:
        q, k, v = (t.view(len(x), 3, -1).transpose(0, 1) for t in block.qkv(block.norm1(x)).chunk(3, dim=1))
        out = F.scaled_dot_product_attention(norm(q, block.qk_norm, block.q_norm), norm(k, block.qk_norm, block.k_norm), v)
        x = x + block.proj(out.transpose(0, 1).flatten(1))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    x = net.norm(x)
    if net.pooling == "attention":
        pool = net.pool
        assert pool is not None
        k, v = (t.view(len(x), 3, -1).transpose(0, 1) for t in pool.to_kv(x).chunk(2, dim=1))
        q = norm(pool.to_q(pool.query).view(3, 1, -1), pool.qk_norm, pool.q_norm)
        pooled = pool.proj(F.scaled_dot_product_attention(q, norm(k, pool.qk_norm, pool.k_norm), v).flatten())
    else:
        pooled = x.mean(0) if net.pooling == "mean" else x.max(0).values
    return net.head(net.pool_norm(pooled))


OPTIONS = [
    *[{"pooling": pooling, "qk_norm": kind} for pooling, kind in itertools.product(("attention", "mean", "max"), ("layer", "rms"))],
    {"qk_norm": "l2", "bias": True},
    {"qk_norm": None, "out_features": None},
]


def outcome(net: NaViT, packed: bool, seed: int = 0) -> dict[str, Tensor]:
    """The output and every gradient, of the packed model or of the plain one."""
    given = [image.requires_grad_() for image in images(*SIZES, dtype=net.norm.weight.dtype, seed=seed)]
    out = net(given) if packed else torch.stack([one_image(net, image) for image in given])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    wanted = {**{f"image {i}": image for i, image in enumerate(given)}, **dict(net.named_parameters())}
    return {"output": out.detach(), **dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), weight), strict=True))}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_image_as_if_it_were_alone(backend: str, options: dict[str, Any]) -> None:
    net = model(**options, dtype=torch.float64)
    found, exact = outcome(net, True), outcome(net, False)
    for name, truth in exact.items():
        assert (found[name] - truth).abs().max() <= 1e-11 * truth.abs().max(), name


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[6]], ids=str)
def test_float32_is_as_exact_as_the_plain_model(options: dict[str, Any]) -> None:
    """Root mean square errors against float64, medians over draws: a tensor's error is chance, and there are fifty tensors. On the reference: the
    rounding of the kernels is the contract's affair, call by call.
    """
    net = model(**options, dtype=torch.float64)
    single = copy.deepcopy(net).float()
    errors: dict[str, list[tuple[float, float, float]]] = {}
    with vitkernels.backend("reference"):
        for seed in range(12):
            exact, fast, eager = outcome(net, False, seed), outcome(single, True, seed), outcome(single, False, seed)
            for name, truth in exact.items():
                floor = 2 * torch.finfo(torch.float32).eps * zoo.rms(truth)
                errors.setdefault(name, []).append((zoo.rms(fast[name] - truth), zoo.rms(eager[name] - truth), floor))
    for name, draws in errors.items():
        error, eager_error, floor = map(statistics.median, zip(*draws, strict=True))
        assert error <= 2 * eager_error + floor, f"{name}: error {error:.3g}, eager {eager_error:.3g}, floor {floor:.3g}"


def test_neither_order_nor_company_matters(backend: str) -> None:
    net, given = model(dtype=torch.float64).eval(), images(*SIZES, dtype=torch.float64)
    out = net(given)
    torch.testing.assert_close(net(given[::-1]), out.flip(0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(net(given[1:2]), out[1:2], rtol=1e-11, atol=1e-11)
    changed = [given[0], given[1] + 1, *given[2:]]
    torch.testing.assert_close(net(changed)[[0, 2, 3]], out[[0, 2, 3]], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(net(changed)[1], out[1])


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_room_for_more_changes_nothing(backend: str, pooling: str) -> None:
    """Output and gradients; what the rows of absent images give touches no parameter that a loss on the images does not."""
    net, given = model(pooling=pooling, dtype=torch.float64), images(*SIZES, dtype=torch.float64)
    exact, batch = net(given), patchify(given, P, capacity=90, max_images=7)
    out = net(batch)
    assert out.shape == (7, 5) and out.isfinite().all()
    torch.testing.assert_close(out[: len(batch)], exact, rtol=1e-11, atol=1e-11)
    weight = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = list(net.parameters())
    found, truth = torch.autograd.grad(out[: len(batch)], wanted, weight), torch.autograd.grad(exact, wanted, weight)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("position", ["absolute", "fractional"])
def test_positions_reach_the_output(position: str) -> None:
    """An image of the same patches in another order is another image, and with fractional positions any size goes."""
    net = model(position=position, dtype=torch.float64).eval()
    (image,) = images((2, 3), dtype=torch.float64)
    moved = torch.cat([image[:, :, P:], image[:, :, :P]], dim=2)
    assert not torch.allclose(net([image]), net([moved]))
    wide = images((1, 20), dtype=torch.float64)
    if position == "fractional":
        assert net(wide).isfinite().all()
    else:
        with pytest.raises(ValueError, match=re.escape("the largest image has 1 x 20 patches a side; max_size is 8")):
            net(wide)


def test_tokens_are_dropped_in_training_only() -> None:
    net, given = model(token_drop=TokenDrop(0.5), dtype=torch.float64), images(*SIZES, dtype=torch.float64)
    seed = torch.Generator().manual_seed
    dropped = net(given, seed(0))
    assert torch.equal(dropped, net(given, seed(0)))
    assert not torch.allclose(dropped, net(given, seed(1)))
    batch = patchify(given, P, token_drop=TokenDrop(0.5), generator=seed(0))
    assert torch.equal(net(batch), dropped), "a packed batch has had its drop"
    whole = net.eval()(given, seed(0))
    torch.testing.assert_close(whole, torch.stack([one_image(net, image) for image in given]), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(whole, dropped)


def test_dropout_drops_in_training_only(backend: str) -> None:
    given = images(*SIZES)
    for option in ("dropout", "attn_dropout"):
        net = model(**{option: 0.5})
        torch.manual_seed(0)
        first = net(given)
        torch.manual_seed(0)
        assert torch.equal(net(given), first)
        assert not torch.equal(net(given), first)
        assert torch.equal(net.eval()(given), net(given))


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_compiled_once_for_twenty_batches(pooling: str) -> None:
    """Batches of a fixed capacity, forward and backward: one graph, no break, no second compilation, the same numbers."""
    net = model(pooling=pooling, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    for step in range(20):
        sizes = torch.randint(1, 6, (int(torch.randint(1, 8, (), generator=generator)), 2), generator=generator).tolist()
        batch = patchify(images(*map(tuple, sizes), dtype=torch.float64, seed=step), P, capacity=180, max_images=8)
        found, exact = compiled(batch), net(batch)
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)
        if step % 7 == 0:
            wanted = list(net.parameters())
            grads = zip(torch.autograd.grad(found[: len(batch)].sum(), wanted), torch.autograd.grad(exact[: len(batch)].sum(), wanted), strict=True)
            for a, b in grads:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


def test_autocast(backend: str) -> None:
    net, given = model(), images(*SIZES)
    exact = copy.deepcopy(net).double()([image.double() for image in given])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(given)
        eager = torch.stack([one_image(net, image) for image in given])
    assert compare_tensors("output", found, eager, exact).holds


def test_state_dict() -> None:
    net = model()
    block = ["norm1.weight", "qkv.weight", "q_norm", "k_norm", "proj.weight", "norm2.weight", "fc1.weight", "fc2.weight"]
    pool = ["query", "to_q.weight", "to_kv.weight", "proj.weight", "q_norm", "k_norm"]
    expected = {"patch_embed.weight", "pos_embed.row_table", "pos_embed.col_table", "norm.weight", "pool_norm.weight", "head.weight", "head.bias"}
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in block} | {f"pool.{name}" for name in pool}
    assert set(net.state_dict()) == expected
    biased = set(model(bias=True).state_dict()) - expected
    assert biased == {name.replace("weight", "bias") for name in expected if name.endswith("weight") and not name.startswith(("patch_embed", "head"))}
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = NaViT(P, 24, 2, 3, 5, max_size=8, mlp_dim=40)
    given = images(*SIZES)
    assert not torch.allclose(other(given), net(given))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(given), net(given))


def test_first_parameters() -> None:
    """Each layer keeps the scale of what goes through it, and positions are small beside patches of unit variance, of every kind."""
    torch.manual_seed(0)
    for kind in ("learned", "sinusoidal", "fourier"):
        net = NaViT(16, 256, 2, 4, position_kind=kind)  # type: ignore[arg-type]
        batch = net.pack([torch.randn(3, 512, 512)])
        tokens = net.patch_embed(batch.tokens)
        assert float(tokens.detach().std()) == pytest.approx(1, rel=0.1)
        if kind != "sinusoidal":
            added = net.pos_embed(torch.zeros_like(tokens), batch.rows, batch.cols)
            assert float(added.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.2)


def test_learns_to_tell_tall_from_wide() -> None:
    """Stripes of any size: which way they run is to be learned, from batches of mixed resolution."""
    torch.manual_seed(0)
    net = NaViT(P, 32, 2, 4, 2, max_size=8, token_drop=BetaTokenDrop(0.3, 0.1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def batch(count: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        labels = torch.randint(0, 2, (count,), generator=generator)
        given = []
        for label in labels.tolist():
            rows, cols = (int(side) for side in torch.randint(1, 6, (2,), generator=generator))
            stripes = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(cols if label else rows)
            image = (stripes if label else stripes[:, None]).expand(3, rows * P, cols * P)
            given.append(image + 0.3 * torch.randn(3, rows * P, cols * P, generator=generator))
        return given, labels

    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        given, labels = batch(16, generator)
        optimizer.zero_grad()
        F.cross_entropy(net(given, generator), labels).backward()
        optimizer.step()
    given, labels = batch(200, torch.Generator().manual_seed(1))
    assert float((net.eval()(given).argmax(1) == labels).float().mean()) > 0.95


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: model(pooling="cls"), ValueError, "pooling is 'cls'"),
        (lambda: model(heads=5), ValueError, "dim is 24 and heads 5; heads must divide dim"),
        (lambda: model()([torch.zeros(3, 8, 8, dtype=torch.uint8)]), TypeError, "the images have dtype torch.uint8; they must be floating"),
        (lambda: model()([torch.zeros(1, 8, 8)]), ValueError, "a patch has 16 values; it must have 48"),
        (lambda: model()([torch.zeros(3, 8, 9)]), ValueError, "image 0 is 8 x 9; both must be multiples of patch_size = 4"),
        (lambda: model()([]), ValueError, "there are no images"),
        (lambda: model()(torch.zeros(3, 8, 8)), ValueError, "image 0 has shape [8, 8]"),
    ],
)
def test_errors(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        make()
