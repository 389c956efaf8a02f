"""vit_pytorch's NaViTs, original against accelerated: outputs and every gradient, which tokens are dropped, and what is left alone."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vitkernels
from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.integrations import packed, vit_pytorch
from vitkernels.integrations._fused import Fused

from .. import zoo
from ..zoo import pair, reasons

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")]
KINDS = ("na_vit", "na_vit_nested_tensor")
SIZES = ((40, 64), (8, 8), (16, 56), (64, 24), (32, 32))
FORMS: dict[str, Callable[[nn.Module, list[Tensor]], Tensor]] = {
    "list": lambda model, images: model(images),
    "rows": lambda model, images: model([images[:1], images[1:]]),
    "grouped": lambda model, images: model(images, group_images=True, group_max_seq_len=48),
}


@pytest.fixture
def images() -> list[Tensor]:
    return zoo.mixed_photos(SIZES)


# --- the same results ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", FORMS)
def test_padded(form: str, training: bool, images: list[Tensor]) -> None:
    original, accelerated, handle = pair(zoo.navit(), images)
    assert [r.path for r in handle.replaced] == ["", "transformer.layers.0.0", "transformer.layers.1.0", "attn_pool"]
    measure = functools.partial(zoo.results, call=FORMS[form])
    zoo.assert_same(original, accelerated, images, training=training, measure=measure)
    assert not handle.fallbacks


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{}, {"qk_rmsnorm": False}], ids=["qk norm", "no qk norm"])
def test_nested(options: dict[str, Any], training: bool, images: list[Tensor]) -> None:
    original, accelerated, handle = pair(zoo.navit(KINDS[1], token_dropout_prob=0.3, **options), images)
    assert len(handle.replaced) == 5
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [0.3, lambda height, width: 0.9 * random.random()], ids=["constant", "random function"])
def test_padded_drops_the_same_tokens(rate: Any, form: str, images: list[Tensor]) -> None:
    original, accelerated, handle = pair(zoo.navit(token_dropout_prob=rate), images)

    def measure(model: nn.Module, images: list[Tensor], training: bool) -> dict[str, Tensor]:
        random.seed(0)
        found = zoo.results(model, images, training=training, call=FORMS[form])
        return {**found, "generator": torch.get_rng_state().double(), "random": torch.tensor(random.random(), dtype=torch.float64)}

    zoo.assert_same(original, accelerated, images, training=True, measure=measure)
    assert not handle.fallbacks
    whole = zoo.results(accelerated, images, training=False)["output"]
    assert not torch.allclose(measure(accelerated, images, training=True)["output"], whole), "nothing was dropped"


def test_one_image_of_one_patch_and_strided_images() -> None:
    photo = zoo.mixed_photos([(64, 48)])[0]
    odd = [photo[:, 8:16, 8:16], photo[:, ::2, 16:], photo.transpose(1, 2)]
    original, accelerated, handle = pair(zoo.navit(), odd)
    zoo.assert_same(original, accelerated, odd, training=False)
    zoo.assert_same(original, accelerated, odd[:1], training=False)
    zoo.assert_same(original, accelerated, torch.stack([photo, photo * 0.5]), training=False)
    assert not handle.fallbacks


def test_gradient_of_the_images(images: list[Tensor]) -> None:
    original, accelerated, _ = pair(zoo.navit(), images)

    def measure(model: nn.Module, images: list[Tensor], training: bool) -> dict[str, Tensor]:
        leaves = [image.clone().requires_grad_() for image in images]
        model(leaves).square().sum().backward()
        return {f"image {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}

    assert len(measure(accelerated, images, training=False)) == len(images)
    zoo.assert_same(original, accelerated, images, training=False, measure=measure)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype, images: list[Tensor]) -> None:
    original, accelerated, handle = pair(zoo.navit(), images)
    zoo.assert_same(original.to(dtype), accelerated.to(dtype), zoo.cast(images, dtype), training=False)
    assert not handle.fallbacks


def test_autocast(images: list[Tensor]) -> None:
    original, accelerated, handle = pair(zoo.navit(), images)

    fast, eager = zoo.under_autocast(accelerated, images, training=False), zoo.under_autocast(original, images, training=False)
    assert {name: tensor.dtype for name, tensor in fast.items()} == {name: tensor.dtype for name, tensor in eager.items()}
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.under_autocast, eps=torch.finfo(torch.bfloat16).eps)
    assert not handle.fallbacks


def test_nested_trains_without_token_dropout(images: list[Tensor]) -> None:
    """With its default, ``token_dropout_prob=None``, the original compares None with a number."""
    model = zoo.settle(zoo.navit(KINDS[1], token_dropout_prob=0.0), images)
    accelerated = copy.deepcopy(model)
    accelerated.token_dropout_prob = None
    with pytest.raises(TypeError, match="'>' not supported"):
        accelerated.train()(images)
    handle = vitkernels.accelerate(accelerated)
    assert "as in the original, the patch embedding" in handle.replaced[0].note
    assert "the original raises TypeError" in handle.replaced[0].note and handle.replaced[0].note in str(handle)
    zoo.assert_same(model, accelerated, images, training=True)


def test_dropout_on_attention_weights_keeps_the_expectation() -> None:
    """An image of one token has one weight: its output is 0 or that of no dropout over the rate that is kept. And the average of many draws is the
    output without dropout, which is linear in the weights.
    """
    rate, draws = 0.3, 120
    model = zoo.settle(zoo.navit(dropout=rate), zoo.mixed_photos(SIZES))
    handle = vitkernels.accelerate(model)
    assert handle.replaced[0].note == "in training, dropout draws other masks than the original, of the same probability"
    attention = model.transformer.layers[0][0]
    attention.to_out = nn.Identity()
    lengths = torch.tensor([1] * 12 + [7, 30])
    x = torch.randn(int(lengths.sum()), 48, generator=torch.Generator().manual_seed(0))
    layout = vitkernels.ops.PackedLayout.from_lengths(lengths)
    with torch.no_grad():
        whole = attention.eval()(x, attn_mask=layout)
        torch.manual_seed(0)
        outputs = torch.stack([attention.train()(x, attn_mask=layout) for _ in range(draws)])
    heads = (outputs / whole)[:, :12].unflatten(-1, (3, -1))
    kept = heads[..., 0] != 0
    torch.testing.assert_close(heads, kept[..., None].expand_as(heads) / (1 - rate))
    count = kept.numel()
    assert abs(int(kept.sum()) - count * (1 - rate)) < 5 * (count * rate * (1 - rate)) ** 0.5
    error = (outputs.mean(0) - whole) / (outputs.std(0) / draws**0.5)
    assert error.abs().max() < 6 and 0.8 < error[12:].std() < 1.2


def test_torch_compile(images: list[Tensor]) -> None:
    original, accelerated, handle = pair(zoo.navit(depth=1), images)
    torch.compiler.reset()
    compiled = torch.compile(accelerated.eval(), backend="eager")
    original.eval()
    with torch.no_grad():
        for batch in (images, images[1:4], zoo.mixed_photos([(48, 48), (24, 16)])):
            found, eager = compiled(batch), original(batch)
            exact = copy.deepcopy(original).double()(zoo.cast(batch, torch.float64))
            assert compare_tensors("compiled", found, eager, exact).holds
    assert not handle.fallbacks


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["accelerated", "sharded"])
def test_fsdp2(kind: str, first: str, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hooks gather and free parameters and look at no tokens. One process is enough for them to be there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    original = zoo.settle(zoo.navit(kind, **({} if kind == "na_vit" else {"token_dropout_prob": 0.0})), images)
    ours: Any = copy.deepcopy(original)
    ours.sharded = True

    def measure(model: Any, images: list[Tensor], training: bool) -> dict[str, Tensor]:
        if not hasattr(model, "sharded"):
            return zoo.results(model, images, training=training)
        handle = vitkernels.accelerate(model) if first == "accelerated" else None
        mesh = init_device_mesh("cpu", (1,))
        for module in (*(layer for block in model.transformer.layers for layer in block), model.attn_pool, model):
            fully_shard(module, mesh=mesh)
        handle = handle or vitkernels.accelerate(model)
        found = zoo.results(model, images, training=training)
        assert len(handle.replaced) == 4 + (kind != "na_vit") and not handle.fallbacks
        handle.remove()
        assert not any(isinstance(module, Fused) for module in model.modules())
        return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in found.items()}

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        zoo.assert_same(original, ours, images, training=True, measure=measure)
    finally:
        dist.destroy_process_group()


# --- what it costs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_and_linear_memory(kind: str) -> None:
    """40 images of 16 tokens: no tensor is as large as the mask of all pairs, and twice the images keep twice the bytes."""
    images = zoo.mixed_photos([(32, 32)] * 40)
    original, accelerated, _ = pair(zoo.navit(kind, token_dropout_prob=0.0), images[:2])
    tokens = 40 * 16
    assert zoo.largest_tensor(accelerated, images) < tokens**2
    if kind == "na_vit":
        assert zoo.largest_tensor(original, images) >= tokens**2, "the yardstick is wrong: the original builds no mask"
        assert zoo.saved_bytes(accelerated, images) < zoo.saved_bytes(original, images)
    assert zoo.saved_bytes(accelerated, images) < 2.05 * zoo.saved_bytes(accelerated, images[:20])


def test_padding_costs_nothing() -> None:
    """One long and seven short images in rows of their own: the original pads them all to the longest."""
    images = zoo.mixed_photos([(64, 64)] + [(8, 16)] * 7)
    rows = [[image] for image in images]
    original, accelerated, _ = pair(zoo.navit(), images)
    assert zoo.saved_bytes(accelerated, rows) < 0.4 * zoo.saved_bytes(original, rows)
    assert zoo.saved_bytes(accelerated, rows) == zoo.saved_bytes(accelerated, images)


# --- the handle ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_swap_and_revert(kind: str, images: list[Tensor]) -> None:
    model = zoo.settle(zoo.navit(kind, **({} if kind == "na_vit" else {"token_dropout_prob": 0.0})), images).eval()
    with zoo.swapped_and_reverted(model, lambda model: model(images)):
        pass


def test_only_and_skip(images: list[Tensor]) -> None:
    assert len(vitkernels.accelerate(zoo.navit(), only="varlen_attention").replaced) == 4
    assert len(vitkernels.accelerate(zoo.navit(), only="NaViT").replaced) == 4
    for skip in ("transformer.layers.1.0", "Attention", "NaViT"):
        original, accelerated, handle = pair(zoo.navit(), images, skip=skip)
        assert not handle.replaced and not any("matches none" in note for note in handle.notes)
        assert ("named in skip" in reasons(handle)[""]) and torch.equal(accelerated.eval()(images), original.eval()(images))
    inside = nn.Sequential(zoo.navit())
    assert [r.path for r in vitkernels.accelerate(inside, only="0").replaced][:2] == ["0", "0.transformer.layers.0.0"]


def test_an_attention_of_ones_own_is_left_alone() -> None:
    attention = zoo.navit().transformer.layers[0][0]
    x, mask = torch.randn(2, 9, 48), torch.rand(2, 1, 9, 9) < 0.7
    expected = attention(x, attn_mask=mask)
    handle = vitkernels.accelerate(attention)
    assert "only with the NaViT around it" in reasons(handle)[""]
    assert torch.equal(attention(x, attn_mask=mask), expected)


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("path", ["to_patch_embedding.1", "transformer", "transformer.layers.0.0", "transformer.layers.1.0.q_norm", "attn_pool.to_q"])
def test_hooks_see_what_they_always_saw(path: str, later: bool, images: list[Tensor]) -> None:
    model = zoo.settle(zoo.navit(), images).eval()
    seen: list[tuple[int, ...]] = []

    def watch() -> None:
        model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))

    if later:
        handle = vitkernels.accelerate(model)
        watch()
    else:
        watch()
        handle = vitkernels.accelerate(model)
    model(images)
    assert len(seen) == 1 and seen[0][0] == 1
    told = handle.fallbacks if later else reasons(handle)
    assert "hook" in told[""] or "RMSNorm" in told[""]


class _LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _lora(model: Any) -> None:
    model.transformer.layers[1][0].to_q = _LoRA(model.transformer.layers[1][0].to_q)


def _parametrized(model: Any) -> None:
    parametrize.register_parametrization(model.transformer.layers[0][1][1], "weight", _Double())


def _other_norm(model: Any) -> None:
    model.transformer.layers[0][0].q_norm = nn.Identity()


def _subclass(model: Any) -> None:
    model.transformer.layers[0][0].__class__ = type("MyAttention", (type(model.transformer.layers[0][0]),), {})


def _pools_over_the_row(model: Any) -> None:
    model.transformer.layers[0][1].append(nn.BatchNorm1d(48))


CHANGES = {
    "LoRA": (_lora, "_LoRA"),
    "parametrized": (_parametrized, "ParametrizedLinear"),
    "other norm": (_other_norm, "q_norm is not a plain RMSNorm"),
    "subclass": (_subclass, "MyAttention"),
    "over tokens": (_pools_over_the_row, "BatchNorm1d"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_unknown_layers_are_left_alone(name: str) -> None:
    change, words = CHANGES[name]
    model = zoo.navit()
    change(model)
    handle = vitkernels.accelerate(model)
    assert not handle.replaced and words in reasons(handle)[""]
    assert not any(type(module).__name__.startswith("Fused") for module in model.modules())


def test_a_gpu_without_a_proved_kernel_runs_the_original(images: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    assert packed.why_not_here(torch.zeros(1)) is None
    monkeypatch.setattr(backends, "select", lambda op, tensor: "reference")
    monkeypatch.setattr(backends, "why_not", lambda op, name, device, dtype, auto: f"{op} on {device} by {name}, {auto}")
    monkeypatch.setattr(backends, "requested", lambda: "auto")
    assert packed.why_not_here(gpu) == "varlen_attention on cuda:0 by triton, True"
    monkeypatch.setattr(backends, "requested", lambda: "reference")
    assert packed.why_not_here(gpu) is None
    original, accelerated, handle = pair(zoo.navit(), images)
    monkeypatch.setattr(vit_pytorch, "why_not_here", lambda weight: "not proved here")
    assert torch.equal(accelerated.eval()(images), original.eval()(images)) and handle.fallbacks == {"": "not proved here"}


def test_a_subclass_of_the_model_is_left_alone() -> None:
    model = zoo.navit()
    model.__class__ = type("MyNaViT", (type(model),), {})
    assert "a subclass of NaViT" in reasons(vitkernels.accelerate(model))[""]


def test_a_layer_changed_later_runs_the_original(images: list[Tensor]) -> None:
    original, accelerated, handle = pair(zoo.navit(), images)
    for model in (original, accelerated):
        _lora(model)
        with torch.no_grad():
            for parameter in model.transformer.layers[1][0].to_q.up.parameters():
                parameter.fill_(0.01)
            for parameter in model.transformer.layers[1][0].to_q.down.parameters():
                parameter.fill_(0.02)
    assert torch.equal(accelerated.eval()(images), original.eval()(images))
    assert "_LoRA" in handle.fallbacks[""]


def test_a_head_of_ones_own_is_called_as_ever(images: list[Tensor]) -> None:
    model = zoo.navit()
    model.mlp_head = nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 10))
    original, accelerated, handle = pair(model, images)
    zoo.assert_same(original, accelerated, images, training=True)
    assert handle.replaced and not handle.fallbacks


BAD: dict[str, Callable[[nn.Module], Any]] = {
    "sides": lambda model: model([torch.zeros(3, 12, 16)]),
    "channels": lambda model: model([torch.zeros(1, 16, 16)]),
    "dimensions": lambda model: model([torch.zeros(1, 3, 16, 16)]),
    "too large for a group": lambda model: model([torch.zeros(3, 64, 64)], group_images=True, group_max_seq_len=10),
    "rows, to be grouped": lambda model: model([[torch.zeros(3, 16, 16)]], group_images=True),
    "too many rows of patches": lambda model: model([torch.zeros(3, 80, 16)]),
    "nothing": lambda model: model([]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_raise_what_the_original_raises(name: str) -> None:
    original = zoo.navit().eval()
    accelerated = copy.deepcopy(original)
    vitkernels.accelerate(accelerated)
    with pytest.raises(Exception) as theirs:
        BAD[name](original)
    with pytest.raises(type(theirs.value)) as ours:
        BAD[name](accelerated)
    assert str(ours.value) == str(theirs.value)
