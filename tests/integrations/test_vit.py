"""ViT: timm's, transformers' and vit_pytorch's attention, and transformers' choice of attention by name."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends, ops
from vitkernels.accuracy import compare_tensors
from vitkernels.integrations import attention_interface, dense
from vitkernels.ops.packed.reference import keep_maps

from .. import zoo
from ..zoo import pair, reasons

pytestmark = pytest.mark.usefixtures("poison", "attention_alone")


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(32)


def timm_vit(**options: Any) -> nn.Module:
    """A small VisionTransformer of timm."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return VisionTransformer(**{**small, **options})


def transformers_vit(name: str = "ViT", **options: Any) -> nn.Module:
    """A small model of transformers with logits, or without a head."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    small |= {"mlp_ratio": 2} if name == "Dinov2" else {"intermediate_size": 64}
    config = {**small, **options}
    if name == "Siglip":
        config = {"vision_config": config}
    return getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**config, num_labels=10))


def vit_pytorch(kind: str = "vit", **options: Any) -> nn.Module:
    """A small ViT or SimpleViT of vit_pytorch."""
    zoo_module = importlib.import_module(f"vit_pytorch.{kind}")
    torch.manual_seed(0)
    small = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 64, "dim_head": 16}
    return (zoo_module.ViT if kind == "vit" else zoo_module.SimpleViT)(**{**small, **options})


MODELS: dict[str, Callable[..., nn.Module]] = {
    "timm": timm_vit,
    "transformers": transformers_vit,
    "ViT": vit_pytorch,
    "SimpleViT": functools.partial(vit_pytorch, "simple_vit"),
}
ATTENTIONS = {
    "timm": ["blocks.0.attn", "blocks.1.attn"],
    "transformers": ["vit.layers.0.attention", "vit.layers.1.attention"],
    "ViT": ["transformer.layers.0.0", "transformer.layers.1.0"],
    "SimpleViT": ["transformer.layers.0.0", "transformer.layers.1.0"],
}


class OurMasks(nn.Dropout):
    """Dropout with the masks of our op, drawn as it draws them: what the original computes with these has to be what we compute."""

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return maps
        keep = keep_maps(torch.randint(2**62, ()), maps.shape, self.p)
        return maps * keep / (1 - self.p)


# --- the same results ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_same(kind: str, training: bool, images: Tensor) -> None:
    original, accelerated, handle = pair(MODELS[kind](), images)
    assert [r.path for r in handle.replaced] == ATTENTIONS[kind] and not handle.skipped
    assert {r.op for r in handle.replaced} == {"attention"}
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "q/k norm": ("timm", {"qk_norm": True}),
    "norm and no bias": ("timm", {"scale_attn_norm": True, "qkv_bias": False, "proj_bias": False}),
    "head dim 72": ("timm", {"embed_dim": 144, "num_heads": 2}),
    "head dim 80": ("timm", {"embed_dim": 160, "num_heads": 2}),
    "layer scale": ("timm", {"init_values": 0.1, "class_token": False, "global_pool": "avg", "reg_tokens": 2}),
    "no qkv bias": ("transformers", {"qkv_bias": False}),
    "head dim 24": ("transformers", {"num_attention_heads": 2}),
    "one head, no projection": ("ViT", {"heads": 1, "dim_head": 48}),
    "head dim 30": ("ViT", {"dim_head": 30}),
    "odd head dim": ("SimpleViT", {"dim_head": 33}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, training: bool, images: Tensor) -> None:
    kind, options = VARIANTS[name]
    original, accelerated, handle = pair(MODELS[kind](**options), images)
    assert len(handle.replaced) == 2
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


@pytest.mark.parametrize("fused", [True, False], ids=["SDPA", "formed"])
@pytest.mark.parametrize("options", [{"gated": True}, {"dim_out": 24}, {"attn_head_dim": 20}, {"qk_norm": True, "norm_layer": nn.LayerNorm}], ids=str)
def test_timm_attention_alone(options: dict[str, Any], fused: bool) -> None:
    """What no constructor of a model asks for."""
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    attention = Attention(48, 3, qkv_bias=True, **options)
    attention.fused_attn = fused
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))
    original, accelerated, handle = pair(nn.Sequential(attention), x)
    zoo.assert_same(original, accelerated, x, training=True)
    assert len(handle.replaced) == 1 and not handle.fallbacks


MASKS: dict[str, Callable[[], Tensor]] = {
    "bool": lambda: torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(1)) < 0.7,
    "bool [N, N]": lambda: torch.rand(17, 17, generator=torch.Generator().manual_seed(1)) < 0.7,
    "padding": lambda: (torch.arange(17) < torch.tensor([[17], [9]]))[:, None, None],
    "additive": lambda: torch.randn(3, 17, 17, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("fused", [True, False], ids=["SDPA", "formed"])
@pytest.mark.parametrize("name", MASKS)
def test_timm_masks(name: str, fused: bool, images: Tensor) -> None:
    def call(model: nn.Module, images: Tensor) -> Tensor:
        mask = MASKS[name]()
        return model.forward_features(images, attn_mask=mask if mask.dtype is torch.bool else mask.to(images.dtype))

    model = timm_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    original, accelerated, handle = pair(model, images)
    zoo.assert_same(original, accelerated, images, training=True, measure=functools.partial(zoo.results, call=call))
    assert not handle.fallbacks
    assert not torch.allclose(call(original, images), original.forward_features(images)), "the mask hides nothing"


def test_a_bias_is_trained() -> None:
    """A mask that wants a gradient gets it."""
    from timm.layers.attention import Attention

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(48, 3)
            self.bias = nn.Parameter(torch.zeros(3, 17, 17))

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, self.bias)

    torch.manual_seed(0)
    x = torch.randn(2, 17, 48)
    original, accelerated, handle = pair(Biased(), x)
    zoo.assert_same(original, accelerated, x, training=True)
    assert "grad bias" in zoo.results(accelerated, x, training=True) and not handle.fallbacks


def test_transformers_masks(images: Tensor) -> None:
    def call(model: nn.Module, images: Tensor) -> Tensor:
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[1, 9:] = 0
        return model.vit(images, attention_mask=mask).last_hidden_state[:, :9]

    original, accelerated, handle = pair(transformers_vit(), images)
    zoo.assert_same(original, accelerated, images, training=False, measure=functools.partial(_output, call=call))
    assert not handle.fallbacks
    assert not torch.allclose(call(original, images), original.vit(images).last_hidden_state[:, :9])


def _output(model: nn.Module, images: Tensor, *, training: bool, call: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"output": call(model.train(training), images)}


DROPPING: dict[str, tuple[str, dict[str, Any]]] = {
    "timm": ("timm", {"attn_drop_rate": 0.3}),
    "transformers": ("transformers", {"attention_probs_dropout_prob": 0.3}),
    "ViT": ("ViT", {"dropout": 0.3}),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout(name: str, images: Tensor) -> None:
    kind, options = DROPPING[name]
    original, accelerated, handle = pair(MODELS[kind](**options), images)
    assert {r.note for r in handle.replaced} == {"in training, dropout draws other masks than the original, of the same probability"}
    zoo.assert_same(original, accelerated, images, training=False)
    with torch.random.fork_rng():
        assert not torch.allclose(_logits(accelerated.train(), images), _logits(accelerated, images)), "nothing was dropped"
    assert not handle.fallbacks


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return zoo.logits(model(images))


@pytest.mark.parametrize("formed", [False, True], ids=["SDPA", "formed"])
@pytest.mark.parametrize("kind", ["timm", "ViT"])
def test_dropout_on_our_masks(kind: str, formed: bool, images: Tensor) -> None:
    """On one mask both compute the same."""
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    attention = Attention(48, 3, attn_drop=0.3) if kind == "timm" else vit_pytorch(dropout=0.3).transformer.layers[0][0]
    if kind == "ViT":
        attention.to_out[1].p = 0.0
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))
    original, accelerated, handle = pair(nn.Sequential(attention), x)
    if kind == "timm":
        accelerated[0].fused_attn, original[0].fused_attn = not formed, False
    name = "attn_drop" if kind == "timm" else "dropout"
    setattr(original[0], name, OurMasks(0.3))
    zoo.assert_same(original, accelerated, x, training=True)
    assert not handle.fallbacks


@pytest.mark.parametrize("shape", [(2, 1), (1, 7), (3, 50), (0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_any_number_of_tokens(kind: str, shape: tuple[int, int]) -> None:
    if kind == "transformers" and 0 in shape:
        pytest.skip("the original takes no empty batch")
    attention = MODELS[kind]().get_submodule(ATTENTIONS[kind][0])
    accelerated, exactly = copy.deepcopy(attention), copy.deepcopy(attention).double()
    handle = vitkernels.accelerate(accelerated)
    x = torch.randn(shape[1], shape[0], 48, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    got, expected, exact = (_first(module(given)).detach() for module, given in ((accelerated, x), (attention, x), (exactly, x.double())))
    assert got.shape == expected.shape and compare_tensors("output", got, expected, exact).holds
    assert handle.replaced and not handle.fallbacks


def _first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_low_precision(kind: str, dtype: torch.dtype, images: Tensor) -> None:
    original, accelerated, handle = pair(MODELS[kind](), images)
    zoo.assert_same_in(dtype, original, accelerated, images)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", MODELS)
def test_autocast(kind: str, images: Tensor) -> None:
    original, accelerated, handle = pair(MODELS[kind](**({"qk_norm": True} if kind == "timm" else {})), images)
    zoo.assert_same_under_autocast(original, accelerated, images)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", MODELS)
def test_torch_compile(kind: str, images: Tensor) -> None:
    """Without a graph break, forward and backward, and another batch without another compilation."""
    original, accelerated, handle = pair(MODELS[kind](), images)
    zoo.assert_same_compiled(original, accelerated, images, zoo.photos(32, 3), dense.Attention)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", ["ViT", "SimpleViT"])
def test_no_map_is_formed_or_kept(kind: str) -> None:
    """Of 257 tokens and three heads: no tensor is as large as a map of all heads, and nothing kept for the backward pass is either."""
    images = zoo.photos(128)
    original, accelerated, _ = pair(MODELS[kind](image_size=128), images)
    tokens = 257 if kind == "ViT" else 256
    maps = 2 * 3 * tokens * tokens
    assert zoo.largest_tensor(original, images) >= maps, "the yardstick is wrong: the original forms no map"
    assert zoo.largest_tensor(accelerated, images) < maps
    assert zoo.saved_bytes(accelerated, images) < zoo.saved_bytes(original, images) - 2 * 4 * maps * 0.9


# --- the handle ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_swap_and_revert(kind: str, images: Tensor) -> None:
    model = zoo.settle(MODELS[kind](), images).eval()
    with zoo.swapped_and_reverted(model, lambda model: _logits(model, images)):
        pass


CALLED = {
    "timm": ["qkv", "q_norm", "k_norm", "norm", "proj", "proj_drop"],
    "transformers": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "ViT": ["norm", "to_qkv", "to_out", "to_out.0"],
    "SimpleViT": ["norm", "to_qkv", "to_out"],
}


@pytest.mark.parametrize("kind", MODELS)
def test_hooks_on_called_layers_are_called(kind: str, images: Tensor) -> None:
    """With what they always saw."""
    original, accelerated, handle = pair(MODELS[kind](**({"qk_norm": True} if kind == "timm" else {})), images)
    if kind == "timm":
        for model in (original, accelerated):
            model.blocks[1].attn.k_norm = nn.Identity()  # called, too
    seen: dict[nn.Module, dict[str, tuple[int, ...]]] = {}
    for model in (original, accelerated):
        shapes = seen[model] = {}
        for name in CALLED[kind]:
            layer = model.get_submodule(f"{ATTENTIONS[kind][1]}.{name}")
            layer.register_forward_hook(lambda _, args, out, name=name, shapes=shapes: shapes.update({name: tuple(args[0].shape)}))
        model(images)
    assert seen[original] == seen[accelerated] and {*seen[original]} == {*CALLED[kind]}
    assert not handle.fallbacks


SKIPPED = [("ViT", "attend"), ("ViT", "dropout"), ("SimpleViT", "attend"), ("timm", "attn_drop")]


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize(("kind", "layer"), SKIPPED)
def test_hooks_on_skipped_layers_run_the_original(kind: str, layer: str, later: bool, images: Tensor) -> None:
    """Such a hook reads the maps; timm's model calls its dropout where it does not call SDPA."""
    model = zoo.settle(MODELS[kind](), images).eval()
    if kind == "timm":
        for block in model.blocks:
            block.attn.fused_attn = False
    expected, path, seen = model(images), ATTENTIONS[kind][1], []

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
    assert seen == [(2, 3, *[17 - (kind == "SimpleViT")] * 2)]
    assert "has a hook" in (handle.fallbacks if later else reasons(handle))[path]


class _LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(("kind", "layer"), [("timm", "qkv"), ("timm", "proj"), ("transformers", "q_proj"), ("ViT", "to_qkv")])
def test_adapted_projections_are_called(kind: str, layer: str, images: Tensor) -> None:
    model = MODELS[kind]()
    for path in ATTENTIONS[kind]:
        attention = model.get_submodule(path)
        setattr(attention, layer, _LoRA(getattr(attention, layer)))
    original, accelerated, handle = pair(model, images)
    zoo.assert_same(original, accelerated, images, training=True)
    assert len(handle.replaced) == 2 and not handle.fallbacks


CHANGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "softmax": ("ViT", lambda a: setattr(a, "attend", nn.Softmax(dim=-2)), "not a plain Softmax over the keys"),
    "softmax subclass": ("ViT", lambda a: setattr(a, "attend", type("My", (nn.Softmax,), {})(dim=-1)), "not a plain Softmax over the keys"),
    "dropout": ("ViT", lambda a: setattr(a, "dropout", nn.AlphaDropout(0.1)), "AlphaDropout"),
    "subclass": ("timm", lambda a: setattr(a, "__class__", type("My", (type(a),), {})), "a subclass of Attention"),
    "own forward": ("timm", lambda a: setattr(a, "forward", a.forward), "overridden on the instance"),
    "eager": ("transformers", lambda a: setattr(a.config, "_attn_implementation", "eager"), "'eager', not 'sdpa'"),
    "by name": ("transformers", lambda a: setattr(a.config, "_attn_implementation", "vitkernels"), "'vitkernels' already"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers_are_left_alone(name: str) -> None:
    kind, change, words = CHANGES[name]
    model = MODELS[kind]()
    change(model.get_submodule(ATTENTIONS[kind][1]))
    handle = vitkernels.accelerate(model)
    assert words in reasons(handle)[ATTENTIONS[kind][1]]


@pytest.mark.parametrize("name", ["softmax", "dropout", "eager"])
def test_layers_changed_later(name: str, images: Tensor) -> None:
    kind, change, words = CHANGES[name]
    original, accelerated, handle = pair(MODELS[kind](), images)
    for model in (original, accelerated):
        change(model.get_submodule(ATTENTIONS[kind][1]))
    zoo.assert_same(original, accelerated, images, training=False)
    accelerated(images)
    assert words in handle.fallbacks[ATTENTIONS[kind][1]]


def test_causal_attention_is_the_originals(images: Tensor) -> None:
    original, accelerated, handle = pair(timm_vit(), images)
    x = torch.randn(2, 9, 48)
    assert torch.equal(accelerated.blocks[0](x, is_causal=True), original.blocks[0](x, is_causal=True))
    assert handle.fallbacks["blocks.0.attn"] == "is_causal was asked for"


def test_weights_that_are_asked_for(images: Tensor) -> None:
    """Of transformers' model: with sdpa there are none, with eager the original gives them."""
    model = transformers_vit()
    model.set_attn_implementation("eager")
    handle = vitkernels.accelerate(model)
    assert not handle.replaced
    maps = model(images, output_attentions=True).attentions
    assert [tuple(m.shape) for m in maps] == [(2, 3, 17, 17)] * 2


def test_without_a_kernel_the_original_runs(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    original, accelerated, handle = pair(vit_pytorch(), images)
    monkeypatch.setattr(backends, "select", lambda op, tensor: "reference")
    assert torch.equal(accelerated.eval()(images), original.eval()(images))
    assert "no kernel runs here" in handle.fallbacks[ATTENTIONS["ViT"][0]]


@pytest.mark.parametrize("kind", ["timm", "ViT"])
def test_the_export_is_the_original(kind: str, images: Tensor) -> None:
    accelerated = MODELS[kind]().eval()
    expected = accelerated(images)
    vitkernels.accelerate(accelerated)
    program = torch.export.export(accelerated, (images,))
    assert "vitkernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(images), expected)


# --- transformers' choice by name ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> str:
    return vitkernels.integrations.register_transformers()


def by_name(model: nn.Module, images: Any) -> tuple[nn.Module, nn.Module]:
    original = zoo.settle(model, images)
    chosen = copy.deepcopy(original)
    chosen.set_attn_implementation("vitkernels")
    assert original.config._attn_implementation == "sdpa"
    return original, chosen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that reach our op through the interface."""
    seen: list[tuple[int, ...]] = []

    def attention(q: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(tuple(q.shape))
        return original(q, *rest, **options)

    original = ops.attention
    monkeypatch.setattr(attention_interface.ops, "attention", attention)
    return seen


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "Siglip", "Beit"])
def test_by_name(name: str, training: bool, images: Tensor, registered: str, calls: list[tuple[int, ...]]) -> None:
    """Beit hands on a trained bias of positions."""
    options = {"use_relative_position_bias": True, "drop_path_rate": 0.0} if name == "Beit" else {}
    original, chosen = by_name(transformers_vit(name, **options), images)
    zoo.assert_same(original, chosen, images, training=training)
    assert calls and len(calls) % 2 == 0


def _detr() -> nn.Module:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5, "dropout": 0.0, **layers}
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"])
    return transformers.DetrForObjectDetection(transformers.DetrConfig(**small, use_timm_backbone=False, backbone_config=backbone, backbone=None))


def test_detr_by_name(registered: str, calls: list[tuple[int, ...]]) -> None:
    """With a mask of pixels, self- and cross-attention."""
    images = zoo.photos(96)
    mask = torch.ones(2, 96, 96, dtype=torch.long)
    mask[1, :, 50:] = 0

    def call(model: nn.Module, images: Tensor) -> Tensor:
        return model(images, pixel_mask=mask).logits

    original, chosen = by_name(_detr(), images)
    zoo.assert_same(original, chosen, images, training=False, measure=functools.partial(_output, call=call))
    assert {shape[2] for shape in calls} == {9, 5} and len(calls) == 3  # a query in each of 3 x 3 places, and 5 of objects


def test_grouped_heads_and_causal_attention_by_name(registered: str, calls: list[tuple[int, ...]]) -> None:
    """Llama: grouped heads. What is causal without a mask is sdpa's; with a mask of padding, which then says all, it is ours."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    original = transformers.LlamaModel(transformers.LlamaConfig(**small)).eval()
    chosen = copy.deepcopy(original)
    chosen.set_attn_implementation("vitkernels")
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    for given, expected in ((None, 0), (mask, 1)):
        with torch.no_grad():
            theirs, ours = (model(tokens, attention_mask=given).last_hidden_state for model in (original, chosen))
            exact = copy.deepcopy(original).double()(tokens, attention_mask=given).last_hidden_state
        real = mask.bool() if given is not None else torch.ones_like(mask, dtype=torch.bool)
        assert compare_tensors("output", ours[real], theirs[real], exact[real]).holds
        assert len(calls) == expected


def test_a_bias_beside_a_mask_by_name(registered: str) -> None:
    """Bool and additive masks, and a query that sees no key: what sdpa's function makes of them."""
    sdpa = importlib.import_module("transformers").AttentionInterface()["sdpa"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 16, generator=generator) for _ in range(3))
    bias, seen = torch.randn(1, 3, 7, 7, generator=generator), torch.rand(2, 1, 7, 7, generator=generator) < 0.6
    seen[0, 0, 2] = False
    for mask in (seen, torch.zeros_like(seen, dtype=torch.float).masked_fill(~seen, -2.0)):
        options = {"scaling": 0.3, "is_causal": False}
        ours, none = attention_interface.attention_forward(nn.Identity(), q, k, v, mask, position_bias=bias, **options)
        theirs, _ = sdpa(nn.Identity(), q, k, v, mask, position_bias=bias, **options)
        masks = mask if mask.dtype is torch.bool else mask.double()
        exact, _ = sdpa(nn.Identity(), q.double(), k.double(), v.double(), masks, position_bias=bias.double(), **options)
        assert none is None and compare_tensors("output", ours, theirs, exact).holds


def test_by_name_without_a_kernel(images: Tensor, registered: str, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]) -> None:
    original, chosen = by_name(transformers_vit(), images)
    monkeypatch.setattr(backends, "select", lambda op, tensor: "reference")
    assert torch.equal(_logits(chosen.eval(), images), _logits(original.eval(), images)) and not calls


def test_registering_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^register_transformers: "):
        vitkernels.integrations.register_transformers()
