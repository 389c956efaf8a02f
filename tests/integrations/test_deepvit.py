"""DeepViT: vit_pytorch's, the authors' classes (recognised by their attributes, checked by running them), and nn.ReAttention."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vitkernels
from vitkernels import backends
from vitkernels.integrations import head_mixing
from vitkernels.nn import ReAttention as OurReAttention
from vitkernels.ops.packed.reference import keep_maps

from .. import zoo
from ..zoo import pair, reasons

pytestmark = pytest.mark.usefixtures("poison", "attention_alone")


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(32)


def deepvit(**options: Any) -> nn.Module:
    """A small DeepViT of vit_pytorch."""
    from vit_pytorch.deepvit import DeepViT

    torch.manual_seed(0)
    small = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 64, "dim_head": 16}
    return DeepViT(**{**small, **options})


class ReAttention(nn.Module):
    """Stands in for the authors' class of this name: its attributes and its maths."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, apply_transform: bool = True, transform_scale: bool = False) -> None:
        super().__init__()
        self.num_heads, self.apply_transform = num_heads, apply_transform
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        if apply_transform:
            self.reatten_matrix = nn.Conv2d(num_heads, num_heads, 1)
            self.var_norm = nn.BatchNorm2d(num_heads)
            self.reatten_scale = self.scale if transform_scale else 1.0
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        maps = self.attn_drop((q @ k.mT * self.scale).softmax(dim=-1))
        if self.apply_transform:
            maps = self.var_norm(self.reatten_matrix(maps)) * self.reatten_scale
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(batch, tokens, dim))), maps


class Block(nn.Module):
    """Stands in for the authors' block: hands the maps on."""

    def __init__(self, dim: int, num_heads: int, adjust: float, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.adjust_ratio = nn.LayerNorm(dim), nn.LayerNorm(dim), adjust
        self.attn = ReAttention(dim, num_heads, **options)
        self.drop_path = nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        new, atten = self.attn(self.norm1(x * self.adjust_ratio), atten)
        x = x + self.drop_path(new / self.adjust_ratio)
        return x + self.drop_path(self.mlp(self.norm2(x * self.adjust_ratio))) / self.adjust_ratio, atten


class Patches(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DeepVisionTransformer(nn.Module):
    """Stands in for the authors' model: in training, and with ``cos_reg``, it returns the maps of all blocks too."""

    def __init__(self, dim: int = 48, num_heads: int = 3, apply_transform: tuple[bool, ...] = (True, True), adjust: float = 1.0, **options: Any):
        super().__init__()
        self.cos_reg = options.pop("cos_reg", False)
        self.patch_embed = Patches(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, dim))
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(dim, num_heads, adjust, apply_transform=mixed, **options) for mixed in apply_transform)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward_features(self, x: Tensor) -> Any:
        x = self.patch_embed(x)
        x = self.pos_drop(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed)
        maps, attn = [], None
        for block in self.blocks:
            x, attn = block(x, attn)
            if self.cos_reg:
                maps.append(attn)
        x = self.norm(x)[:, 0]
        return (x, maps) if self.cos_reg and self.training else x

    def forward(self, x: Tensor) -> Any:
        if self.cos_reg and self.training:
            x, maps = self.forward_features(x)
            return self.head(x), maps
        return self.head(self.forward_features(x))


def authors(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return DeepVisionTransformer(**options)


MODELS: dict[str, Callable[..., nn.Module]] = {"vit_pytorch": deepvit, "authors": authors}
ATTENTIONS = {
    "vit_pytorch": ["transformer.layers.0.0", "transformer.layers.1.0"],
    "authors": ["blocks.0.attn", "blocks.1.attn"],
}


class OurMasks(nn.Dropout):
    """Dropout with the masks of our op, drawn as it draws them: what the original computes with these has to be what we compute."""

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return maps
        keep = keep_maps(torch.randint(2**62, ()), maps.shape, self.p)
        return maps * keep / (1 - self.p)


def with_our_masks(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose dropout on maps is :class:`OurMasks`."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name in ("attn_drop", "dropout"):
            if isinstance(module._modules.get(name), nn.Dropout) and hasattr(module, "scale"):
                setattr(module, name, OurMasks(getattr(module, name).p))
    return model


# --- the same results ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{}, {"heads": 12, "dim_head": 32}, {"heads": 1, "dim_head": 35}, {"pool": "mean", "dim_head": 33}], ids=str)
def test_vit_pytorch(options: dict[str, Any], training: bool, images: Tensor) -> None:
    original, accelerated, handle = pair(deepvit(**options), images)
    assert [r.path for r in handle.replaced] == ATTENTIONS["vit_pytorch"] and not handle.skipped
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


def _frozen(model: nn.Module) -> nn.Module:
    """With norms that stay in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
            module.training = False
    return model


def _norms(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, value in settings.items():
                    setattr(module, name, value)
        return model

    return change


def _without_statistics(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.var_norm = nn.BatchNorm2d(block.attn.num_heads, track_running_stats=False)
    return model


def _without_affine(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.var_norm = nn.BatchNorm2d(block.attn.num_heads, affine=False)
    return model


def _without_mix_bias(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.reatten_matrix = nn.Conv2d(block.attn.num_heads, block.attn.num_heads, 1, bias=False)
    return model


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], nn.Module]]] = {
    "plain": ({}, lambda model: model),
    "deepvit_S": ({"dim": 66, "num_heads": 2, "adjust": 0.5, "transform_scale": True}, lambda model: model),
    "momentum": ({}, _norms(momentum=0.4, eps=1e-3)),
    "cumulative": ({}, _norms(momentum=None)),
    "no statistics": ({}, _without_statistics),
    "statistics no longer tracked": ({}, _norms(track_running_stats=False)),
    "no affine": ({}, _without_affine),
    "no mix bias": ({}, _without_mix_bias),
}


@pytest.mark.parametrize(("measure", "training"), [(zoo.inference, False), (zoo.results, False), (zoo.trained, True)], ids=["infer", "eval", "train"])
@pytest.mark.parametrize("name", VARIANTS)
def test_authors(name: str, measure: zoo.Measure, training: bool, images: Tensor) -> None:
    """Training is three steps, after which every parameter and every buffer is compared."""
    options, change = VARIANTS[name]
    original, accelerated, handle = pair(change(authors(**options)), images)
    assert [r.path for r in handle.replaced] == ["", *ATTENTIONS["authors"]] and not handle.skipped
    zoo.assert_same(original, accelerated, images, training=training, measure=measure)
    assert not handle.fallbacks


def _trained_frozen(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
    return zoo.trained(_frozen(model), images, training=training)


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("name", ["plain", "no affine", "no mix bias", "no statistics"])
def test_authors_with_dropout(name: str, frozen: bool, images: Tensor) -> None:
    """On our masks; frozen norms in training are folded into the mix."""
    options, change = VARIANTS[name]
    original, accelerated, handle = pair(change(authors(attn_drop=0.3, **options)), images)
    assert "other masks than the original" in handle.replaced[1].note
    measure = _trained_frozen if frozen else zoo.trained
    zoo.assert_same(with_our_masks(original), accelerated, images, training=True, measure=measure)
    assert not handle.fallbacks
    with torch.random.fork_rng():
        assert not torch.allclose(accelerated.train()(images), accelerated(images)), "nothing was dropped"


def test_vit_pytorch_with_dropout(images: Tensor) -> None:
    original, accelerated, handle = pair(deepvit(dropout=0.3), images)
    assert handle.replaced[0].note == "in training, dropout draws other masks than the original, of the same probability"
    zoo.assert_same(with_our_masks(original), accelerated, images, training=True)
    zoo.assert_same(original, accelerated, images, training=False)
    assert not handle.fallbacks


@pytest.mark.parametrize("shape", [(2, 1), (1, 7), (3, 50), (0, 5), (2, 0)], ids=str)
def test_any_number_of_tokens(shape: tuple[int, int]) -> None:
    attention = zoo.settle(nn.Sequential(deepvit().transformer.layers[0][0]), torch.randn(2, 9, 48))
    accelerated = copy.deepcopy(attention)
    handle = vitkernels.accelerate(accelerated)
    x = torch.randn(shape[1], shape[0], 48, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    if x.numel():
        zoo.assert_same(attention, accelerated, x, training=True)
    else:
        assert accelerated(x).shape == attention(x).shape
    assert handle.replaced and not handle.fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_low_precision(kind: str, dtype: torch.dtype, images: Tensor) -> None:
    original, accelerated, handle = pair(MODELS[kind](), images)
    zoo.assert_same_in(dtype, original, accelerated, images)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", MODELS)
def test_autocast(kind: str, images: Tensor) -> None:
    original, accelerated, handle = pair(MODELS[kind](), images)
    zoo.assert_same_under_autocast(original, accelerated, images)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", MODELS)
def test_torch_compile(kind: str, images: Tensor) -> None:
    """Without a graph break, forward and backward, and another batch without another compilation."""
    original, accelerated, handle = pair(MODELS[kind](), images)
    zoo.assert_same_compiled(original, accelerated, images, zoo.photos(32, 3), head_mixing.Attention)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", MODELS)
def test_no_map_is_formed_or_kept(kind: str) -> None:
    """Of 257 tokens and three heads: no tensor is as large as a map of all heads, and nothing kept for the backward pass is either."""
    images = zoo.photos(128)
    model = deepvit(image_size=128) if kind == "vit_pytorch" else authors()
    if kind == "authors":
        model.pos_embed = nn.Parameter(torch.zeros(1, 257, 48))
    original, accelerated, _ = pair(model, images)
    maps = 2 * 3 * 257 * 257
    assert zoo.largest_tensor(original, images) >= maps, "the yardstick is wrong: the original forms no map"
    assert zoo.largest_tensor(accelerated, images) < maps
    per_layer = 3 * 4 * maps  # the original keeps the map after the softmax, mixed, and normalised
    assert zoo.saved_bytes(accelerated, images) < zoo.saved_bytes(original, images) - 2 * per_layer * 0.9


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_are_not_copied(kind: str) -> None:
    """q, k and v are views of their projection, and the output comes as [B, N, H D]."""
    model = nn.Sequential(MODELS[kind]().eval())
    vitkernels.accelerate(model)
    attention, x = model.get_submodule(f"0.{ATTENTIONS[kind][1]}"), torch.randn(2, 17, 48)
    with torch.no_grad(), zoo.Copies() as found:
        attention(x)
    assert not [size for size in found.sizes if size >= x.numel()]


# --- the handle ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_swap_and_revert(kind: str, images: Tensor) -> None:
    model = zoo.settle(MODELS[kind](), images).eval()
    with zoo.swapped_and_reverted(model, lambda model: model(images)):
        pass


CALLED = {"vit_pytorch": ["norm", "to_qkv", "to_out", "to_out.0"], "authors": ["qkv", "proj", "proj_drop"]}
SKIPPED = {"vit_pytorch": ["dropout", "reattn_norm", "reattn_norm.0", "reattn_norm.1"], "authors": ["attn_drop", "reatten_matrix", "var_norm"]}


@pytest.mark.parametrize("kind", MODELS)
def test_hooks_on_called_layers_are_called(kind: str, images: Tensor) -> None:
    original, accelerated, handle = pair(MODELS[kind](), images)
    seen: list[str] = []
    for name in CALLED[kind]:
        layer = accelerated.get_submodule(f"{ATTENTIONS[kind][1]}.{name}")
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)
    assert set(seen) == {*CALLED[kind]} and not handle.fallbacks


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind in MODELS for layer in SKIPPED[kind]])
def test_hooks_on_skipped_layers_run_the_original(kind: str, layer: str, later: bool, images: Tensor) -> None:
    model = zoo.settle(MODELS[kind](), images).eval()
    expected = copy.deepcopy(model)(images)
    path = ATTENTIONS[kind][1]
    seen: list[tuple[int, ...]] = []

    def watch() -> None:
        model.get_submodule(f"{path}.{layer}").register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))

    if later:
        handle = vitkernels.accelerate(model)
        watch()
    else:
        watch()
        handle = vitkernels.accelerate(model)
    assert ATTENTIONS[kind][0] in {record.path for record in handle.replaced}
    torch.testing.assert_close(model(images), expected)
    assert len(seen) == 1, "the hook was called by the user's data alone, once"
    assert "has a hook" in (handle.fallbacks if later else reasons(handle))[path]


class _LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        self.in_features = base.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(("kind", "layer"), [("vit_pytorch", "to_qkv"), ("authors", "qkv"), ("authors", "proj")])
def test_adapted_projections_are_called(kind: str, layer: str, images: Tensor) -> None:
    model = MODELS[kind]()
    for path in ATTENTIONS[kind]:
        attention = model.get_submodule(path)
        setattr(attention, layer, _LoRA(getattr(attention, layer)))
    original, accelerated, handle = pair(model, images)
    zoo.assert_same(original, accelerated, images, training=True)
    assert len(handle.replaced) >= 2 and not handle.fallbacks


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class _MyTensor(nn.Parameter):
    pass


def _of_vit_pytorch(change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    return lambda model: change(model.transformer.layers[1][0])


def _of_the_authors(change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    return lambda model: change(model.blocks[1].attn)


def _quantised(attention: Any) -> None:
    attention.reattn_weights = _MyTensor(attention.reattn_weights.detach())


CHANGES: dict[str, tuple[str, Callable[[nn.Module], None], str]] = {
    "norm": ("vit_pytorch", _of_vit_pytorch(lambda a: a.reattn_norm.__setitem__(1, nn.RMSNorm(3))), "RMSNorm, not a plain LayerNorm"),
    "no norm": ("vit_pytorch", _of_vit_pytorch(lambda a: setattr(a, "reattn_norm", nn.Identity())), "not a LayerNorm over the heads"),
    "dropout": ("vit_pytorch", _of_vit_pytorch(lambda a: setattr(a, "dropout", nn.AlphaDropout(0.1))), "AlphaDropout"),
    "subclass": ("vit_pytorch", _of_vit_pytorch(lambda a: setattr(a, "__class__", type("My", (type(a),), {}))), "a subclass of Attention"),
    "parametrized": ("vit_pytorch", _of_vit_pytorch(lambda a: parametrize.register_parametrization(a, "reattn_weights", _Double())), "a subclass of"),
    "quantised": ("vit_pytorch", _of_vit_pytorch(_quantised), "_MyTensor, not a plain tensor"),
    "mix": ("authors", _of_the_authors(lambda a: setattr(a, "reatten_matrix", nn.Conv2d(3, 3, 3, padding=1))), "not a plain 1x1 convolution"),
    "parametrized mix": (
        "authors",
        _of_the_authors(lambda a: parametrize.register_parametrization(a.reatten_matrix, "weight", _Double())),
        "ParametrizedConv2d",
    ),
    "synchronised": (
        "authors",
        _of_the_authors(lambda a: setattr(a, "var_norm", nn.SyncBatchNorm.convert_sync_batchnorm(a.var_norm))),
        "var_norm is a SyncBatchNorm",
    ),
    "unknown projection": ("authors", _of_the_authors(lambda a: setattr(a, "qkv", nn.Sequential(a.qkv))), "does not say how many channels"),
    "scale": ("authors", _of_the_authors(lambda a: setattr(a, "reatten_scale", nn.Parameter(torch.ones(())))), "reatten_scale is not a number"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers_are_left_alone(name: str, images: Tensor) -> None:
    kind, change, words = CHANGES[name]
    model = MODELS[kind]()
    change(model)
    handle = vitkernels.accelerate(model)
    left, replaced = ATTENTIONS[kind][1], {record.path for record in handle.replaced}
    assert words in reasons(handle)[left] and left not in replaced and ATTENTIONS[kind][0] in replaced


# A class over ours is its author's own business, and SyncBatchNorm does not run on the CPU.
@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("subclass", "synchronised")])
def test_layers_changed_later(name: str, images: Tensor) -> None:
    """What was changed after the model was accelerated has its effect: the original runs, or what it computes comes out."""
    kind, change, _ = CHANGES[name]
    original, accelerated, _handle = pair(MODELS[kind](), images)
    before = copy.deepcopy(original)
    for model in (original, accelerated):
        torch.manual_seed(1)
        change(model)
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)
    if name not in ("dropout", "quantised", "scale", "unknown projection"):  # which change nothing in evaluation
        assert not torch.allclose(original.eval()(images), before.eval()(images))


def test_without_a_kernel_the_original_runs(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    original, accelerated, handle = pair(deepvit(), images)
    monkeypatch.setattr(backends, "select", lambda op, tensor: "reference")
    assert torch.equal(accelerated.eval()(images), original.eval()(images))
    assert "no kernel runs here" in handle.fallbacks[ATTENTIONS["vit_pytorch"][0]]


def test_mixed_dtypes_raise_what_the_original_raises() -> None:
    attention = deepvit().transformer.layers[0][0]
    accelerated = copy.deepcopy(attention)
    vitkernels.accelerate(accelerated)
    for module in (attention, accelerated):
        module.reattn_weights.data = module.reattn_weights.data.double()
        with pytest.raises(RuntimeError, match="expected"):
            module(torch.randn(2, 5, 48))


def test_the_export_is_the_original() -> None:
    accelerated, x = deepvit().eval(), torch.randn(2, 3, 32, 32)
    expected = accelerated(x)
    vitkernels.accelerate(accelerated)
    program = torch.export.export(accelerated, (x,))
    assert "vitkernels" not in str(program.graph)
    assert torch.equal(program.module()(x), expected)


# --- who reads the maps --------------------------------------------------------------------------------------------------------------


def test_no_map_where_nobody_reads_it(images: Tensor) -> None:
    model = authors().eval()
    handle = vitkernels.accelerate(model)
    assert handle.replaced[1].note == "returns None in the place of its map"
    x, atten = model.blocks[0](torch.randn(2, 17, 48), None)
    assert atten is None and x.shape == (2, 17, 48)
    handle.remove()
    assert model.blocks[0](torch.randn(2, 17, 48), None)[1].shape == (2, 3, 17, 17)


def _regularised(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
    """Output and gradients of a loss on the maps, as ``cos_reg`` is for."""

    def call(model: nn.Module, images: Tensor) -> Tensor:
        logits, maps = model(images)
        similarity = [F.cosine_similarity(a.flatten(2), b.flatten(2), dim=-1).mean() for a, b in itertools.pairwise(maps)]
        return logits + torch.stack(similarity).sum()

    return zoo.results(model, images, training=training, call=call)


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_maps_read_in_training(later: bool, images: Tensor) -> None:
    original, accelerated, handle = pair(authors(cos_reg=not later), images)
    original.cos_reg = accelerated.cos_reg = True
    zoo.assert_same(original, accelerated, images, training=True, measure=_regularised)
    zoo.assert_same(original, accelerated, images, training=False)
    assert torch.equal(accelerated.train()(images)[1][0], copy.deepcopy(original).train()(images)[1][0])
    assert all("has to be formed" in handle.fallbacks[path] for path in ATTENTIONS["authors"])
    assert later or handle.replaced[1].note == "returns None in the place of its map in evaluation"
    accelerated.eval()(images)
    assert accelerated.blocks[0](torch.randn(2, 17, 48), None)[1] is None
    handle.remove()
    assert {type(module).__name__ for module in accelerated.modules()} == {type(module).__name__ for module in original.modules()}


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn"])
@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_maps_read_by_a_hook(later: bool, path: str, images: Tensor) -> None:
    # In float64: the norm divides the maps, and the rounding of the block before, by a small deviation.
    model, images = zoo.settle(authors(), images).eval().double(), images.double()
    seen: list[Tensor] = []

    def watch(model: nn.Module) -> None:
        model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(out[1]))

    other = copy.deepcopy(model)
    watch(other)
    expected = other(images)
    if later:
        handle = vitkernels.accelerate(model)
        watch(model)
    else:
        watch(model)
        handle = vitkernels.accelerate(model)
    torch.testing.assert_close(model(images), expected)
    theirs, ours = seen
    torch.testing.assert_close(ours, theirs)
    if later:
        assert "hook" in handle.fallbacks[""] if path == "blocks.1" else "its map is read" in handle.fallbacks[path]
    else:
        assert "no hook on its blocks" in reasons(handle)["blocks.1.attn"]
        assert [record.path for record in handle.replaced] == ["", "blocks.0.attn"]


def test_an_attention_of_ones_own_is_left_alone() -> None:
    torch.manual_seed(0)
    attention = ReAttention(48, 3)
    handle = vitkernels.accelerate(attention)
    assert "returns its map" in reasons(handle)[""]
    assert attention(torch.randn(2, 9, 48))[1].shape == (2, 3, 9, 9)


def test_plain_attention_between(images: Tensor) -> None:
    original, accelerated, handle = pair(authors(apply_transform=(False, True, True)), images)
    assert "apply_transform is False" in reasons(handle)["blocks.0.attn"]
    assert [r.path for r in handle.replaced] == ["", "blocks.1.attn", "blocks.2.attn"]
    zoo.assert_same(original, accelerated, images, training=True)
    nothing = vitkernels.accelerate(authors(apply_transform=(False, False)))
    assert not nothing.replaced and reasons(nothing)[""] == "none of its attentions can be replaced"


class _ReadsInEvaluation(DeepVisionTransformer):
    def forward_features(self, x: Tensor) -> Any:
        if self.training:
            return super().forward_features(x)
        self.cos_reg, before, self.training = True, self.cos_reg, True
        found = super().forward_features(x)
        self.cos_reg, self.training = before, False
        return found


class _Measures(DeepVisionTransformer):
    def forward_features(self, x: Tensor) -> Tensor:
        maps = [block(x, None)[1] for block in self.blocks]
        return super().forward_features(x) + sum(attn.mean() for attn in maps)


class _AddsMap(Block):
    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, atten = super().forward(x, atten)
        return x * (1 + atten.mean()), atten


class _Hotter(ReAttention):
    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.scale *= 1.001
        found = super().forward(x, atten)
        self.scale /= 1.001
        return found


class _DropsElsewhere(ReAttention):
    """The same in evaluation; in training its dropout falls on the tokens."""

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dropped, self.attn_drop = self.attn_drop, nn.Identity()
        found = super().forward(dropped(x), atten)
        self.attn_drop = dropped
        return found


def _impostor(model: Any, path: str, base: type[nn.Module]) -> None:
    model.get_submodule(path).__class__ = type(base.__mro__[1].__name__, (base,), {})


@pytest.mark.parametrize(
    ("base", "path", "left", "words"),
    [
        (_ReadsInEvaluation, "", "", "it reads the maps of its attentions in evaluation"),
        (_Measures, "", "", "does not run like it"),
        (_AddsMap, "blocks.1", "blocks.1.attn", "reads no map"),
        (_Hotter, "blocks.1.attn", "blocks.1.attn", "computes something else"),
        (_DropsElsewhere, "blocks.1.attn", "blocks.1.attn", "computes something else"),
    ],
    ids=["model returns maps", "model uses maps", "block uses maps", "scale", "dropout"],
)
def test_same_attributes_but_not_the_same_code(base: type[nn.Module], path: str, left: str, words: str, images: Tensor) -> None:
    original = zoo.settle(authors(), images)
    _impostor(original, path, base)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    assert words in reasons(handle)[left]
    assert [record.path for record in handle.replaced] == ([] if path == "" else ["", "blocks.0.attn"])
    if path:
        zoo.assert_same(original, accelerated, images, training=True)


def test_another_class_of_that_name() -> None:
    model = authors()
    del model.blocks[1].attn.scale
    assert [record.path for record in vitkernels.accelerate(model).replaced] == ["", "blocks.0.attn"]


def test_checking_leaves_no_trace() -> None:
    model = authors(attn_drop=0.1)
    calls: list[int] = []
    for path in ("blocks.0", "blocks.0.norm1", "blocks.1.mlp", "patch_embed", "norm"):
        model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    vitkernels.accelerate(model)
    assert torch.equal(random, torch.get_rng_state()) and not calls
    assert model.blocks[0].attn.training and model.blocks[1].attn.attn_drop.p == 0.1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_talking_heads_are_reported() -> None:
    handle = vitkernels.accelerate(zoo.timm_model("cait_xxs24_224", depth=1, img_size=64))
    assert not handle.replaced and "before the softmax" in reasons(handle)["blocks.0.attn"]


# --- nn.ReAttention ------------------------------------------------------------------------------------------------------------------


class _First(nn.Module):
    """The authors' attention without its second output, under the names of a module that has ``attn``."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        found = self.attn(x)
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize(("measure", "training"), [(zoo.inference, False), (zoo.results, False), (zoo.trained, True)], ids=["infer", "eval", "train"])
def test_module_is_the_authors(measure: zoo.Measure, training: bool, drop: float) -> None:
    x = torch.randn(2, 50, 70, generator=torch.Generator().manual_seed(0))
    theirs = zoo.settle(_First(ReAttention(70, 2, attn_drop=drop)), x)
    ours = OurReAttention(70, 2, qkv_bias=True, attn_drop=drop)
    ours.load_state_dict(theirs.attn.state_dict(), strict=True)
    theirs.attn.load_state_dict(ours.state_dict(), strict=True)
    zoo.assert_same(with_our_masks(theirs), _First(ours), x, training=training, measure=measure)


class _Formula(nn.Module):
    """The paper's equation 3 on the parameters of ``attn``, over any norm."""

    def __init__(self, attn: nn.Module, norm: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.attn, self._norm = attn, norm

    def forward(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        heads = attn.num_heads
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in attn.qkv(x).chunk(3, dim=-1))
        maps = torch.einsum("gh,bhij->bgij", attn.reatten_matrix.weight[:, :, 0, 0], (q @ k.mT * attn.scale).softmax(-1))
        if attn.reatten_matrix.bias is not None:
            maps = maps + attn.reatten_matrix.bias[:, None, None]
        return attn.proj((self._norm(maps, attn.var_norm) @ v).transpose(1, 2).flatten(2))


def _layer_norm(maps: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(maps.movedim(1, -1), (maps.shape[1],), norm.weight, norm.bias, norm.eps).movedim(-1, 1)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{}, {"mix_bias": False}, {"qkv_bias": True, "scale": 0.5}], ids=str)
@pytest.mark.parametrize(("norm", "formula"), [("layer", _layer_norm), (None, lambda maps, norm: maps)], ids=["layer", "none"])
def test_module_with_other_norms(norm: Any, formula: Callable[[Tensor, Any], Tensor], options: dict[str, Any], training: bool) -> None:
    x = torch.randn(2, 33, 48, generator=torch.Generator().manual_seed(0))
    ours = OurReAttention(48, 4, norm=norm, **options)
    theirs = zoo.settle(_Formula(ours, formula), x)
    zoo.assert_same(theirs, _First(copy.deepcopy(ours)), x, training=training)
    hooked = copy.deepcopy(ours)
    seen: list[Tensor] = []
    hooked.var_norm.register_forward_hook(lambda _, args, out: seen.append(out))
    zoo.assert_same(theirs, _First(hooked), x, training=training)
    out, maps = ours(x, return_map=True)
    assert seen and maps.shape == (2, 4, 33, 33)
    torch.testing.assert_close(maps, formula(_unmixed(ours, x), ours.var_norm))
    torch.testing.assert_close(out, theirs(x))


def _unmixed(module: Any, x: Tensor) -> Tensor:
    q, k, _ = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1))
    return module.reatten_matrix((q @ k.mT * module.scale).softmax(-1))


def test_module_with_vit_pytorchs_weights() -> None:
    attention = zoo.settle(nn.Sequential(deepvit(heads=4, dim_head=12).transformer.layers[0][0]), torch.randn(2, 9, 48))[0]
    ours = OurReAttention(48, 4, mix_bias=False, norm="layer")
    with torch.no_grad():
        ours.qkv.weight.copy_(attention.to_qkv.weight)
        ours.reatten_matrix.weight.copy_(attention.reattn_weights.t()[:, :, None, None])
        ours.var_norm.load_state_dict(attention.reattn_norm[1].state_dict())
        ours.proj.load_state_dict(attention.to_out[0].state_dict())
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(ours(attention.norm(x)), attention(x))


def test_module_compiles_and_exports() -> None:
    torch.manual_seed(0)
    module, x = OurReAttention(48, 4), torch.randn(2, 17, 48)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager(x))
    assert torch.equal(module.var_norm.num_batches_tracked, eager.var_norm.num_batches_tracked)
    torch.testing.assert_close(module.var_norm.running_var, eager.var_norm.running_var)
    program = torch.export.export(module.eval(), (x,))
    assert "vitkernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), eager.eval()(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 48, "num_heads": 0}, "num_heads is 0"),
        ({"dim": 50, "num_heads": 4}, "multiple of num_heads, 4"),
        ({"dim": 48, "norm": "group"}, "norm is 'group'"),
    ],
    ids=str,
)
def test_module_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OurReAttention(**options)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_example_runs(norm: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = root / "examples" / "deepvit" / "train_digits.py"
    if not script.is_file():
        pytest.skip("the examples are not part of this copy")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--epochs", "2", "--images", "600", "--depth", "3", "--norm", norm, "--plot", str(tmp_path / "plot")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+), accuracy [\d.]+%\n", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] < 2.6, done.stdout
    plain, mixed = ([float(value) for value in line.split()] for line in re.findall(r"mixing: +([-\d. ]+)\n", done.stdout))
    assert len(plain) == len(mixed) == 2 and all(0 < value <= 1 for value in plain), done.stdout
    assert (tmp_path / "plot" / "deepvit.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "plot" / "deepvit.csv").read_text().splitlines()) == 1 + 3 * 6  # a row a layer and head
