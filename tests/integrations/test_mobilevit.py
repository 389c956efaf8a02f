"""MobileViT (v1): the blocks of timm, transformers and vit_pytorch, which run on the feature map, and their attention alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends, ops
from vitkernels.integrations import dense

from .. import zoo
from ..zoo import pair, reasons

pytestmark = pytest.mark.usefixtures("poison", "attention_alone")


def timm_block(dim: int = 40, **options: Any) -> nn.Module:
    """A ``MobileVitBlock`` of timm alone, as the models have it: patches of 2 x 2, biases, LayerNorm's eps of 1e-5."""
    from timm.models.mobilevit import MobileVitBlock

    torch.manual_seed(0)
    small = {"in_chs": 24, "transformer_dim": dim, "transformer_depth": 2, "patch_size": 2, "num_heads": 2}
    return MobileVitBlock(**{**small, **options})


def transformers_block(dim: int = 40, num_stages: int = 2, **options: Any) -> nn.Module:
    """A ``MobileViTLayer`` of transformers alone."""
    from transformers import MobileViTConfig
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTLayer

    torch.manual_seed(0)
    config = MobileViTConfig(**{"num_attention_heads": 2, "hidden_dropout_prob": 0.0, **options})
    return MobileViTLayer(config, in_channels=24, out_channels=24, stride=1, hidden_size=dim, num_stages=num_stages)


def vit_pytorch_block(dim: int = 40, **options: Any) -> nn.Module:
    """A ``MobileViTBlock`` of vit_pytorch alone: four heads of 8."""
    from vit_pytorch.mobile_vit import MobileViTBlock

    torch.manual_seed(0)
    return MobileViTBlock(**{"dim": dim, "depth": 2, "channel": 24, "kernel_size": 3, "patch_size": (2, 2), "mlp_dim": 48, **options})


BLOCKS: dict[str, Callable[..., nn.Module]] = {"timm": timm_block, "transformers": transformers_block, "vit_pytorch": vit_pytorch_block}
ATTENTION = {"timm": "transformer.{}.attn", "transformers": "transformer.layer.{}.attention.attention", "vit_pytorch": "transformer.layers.{}.0"}


def attentions(kind: str) -> list[str]:
    return [ATTENTION[kind].format(i) for i in range(2)]


def feature_map(height: int = 8, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, 24, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> Tensor:
    return feature_map()


# --- the same results ----------------------------------------------------------------------------------------------------------------


def timm_model(**options: Any) -> nn.Module:
    return zoo.timm_model("mobilevit_xxs", **options)


def transformers_model(**options: Any) -> nn.Module:
    from transformers import MobileViTConfig, MobileViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "expand_ratio": 2.0, "num_labels": 10}
    return MobileViTForImageClassification(MobileViTConfig(**{**sizes, "hidden_dropout_prob": 0.0, **options}))


def vit_pytorch_model(**options: Any) -> nn.Module:
    from vit_pytorch.mobile_vit import MobileViT

    torch.manual_seed(0)
    return MobileViT((64, 64), [64, 80, 96], [16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 320], num_classes=10, expansion=2, **options)


MODELS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "timm": (timm_model, 96),  # whose last map is 3 x 3
    "transformers": (transformers_model, 96),
    "vit_pytorch": (vit_pytorch_model, 64),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", MODELS)
def test_whole_models(kind: str, training: bool) -> None:
    build, size = MODELS[kind]
    images = zoo.photos(size, 3)
    original, accelerated, handle = pair(build(), images)
    assert sorted(r.op for r in handle.replaced) == ["attention"] * 9 + ["patch_attention"] * 3 and not handle.skipped
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


SIZES: dict[str, tuple[int, int]] = {"even": (8, 8), "odd": (5, 7), "one row": (2, 9), "one patch": (2, 2), "one pixel": (1, 1)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_odd_maps(kind: str, size: tuple[int, int]) -> None:
    """Resized and brought back as each does it."""
    x = feature_map(*size)
    original, accelerated, handle = pair(BLOCKS[kind](), x)
    zoo.assert_same(original, accelerated, x, training=True)
    assert len(handle.replaced) == 3 and not handle.fallbacks


def test_vit_pytorch_refuses_odd_maps(x: Tensor) -> None:
    original, accelerated, _ = pair(vit_pytorch_block(), x)
    for model in (original, accelerated):
        with pytest.raises(Exception, match="divide axis of length 7"):
            model(feature_map(7, 8))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "head dim 36": ("timm", {"dim": 72}),
    "head dim 60": ("timm", {"dim": 60, "num_heads": 1}),
    "other patches": ("timm", {"patch_size": 4}),
    "no fusion": ("timm", {"no_fusion": True}),
    "head dim 16": ("transformers", {"dim": 32}),
    "no qkv bias": ("transformers", {"qkv_bias": False, "hidden_act": "gelu"}),
    "flat patches": ("vit_pytorch", {"patch_size": (2, 4)}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, training: bool, x: Tensor) -> None:
    kind, options = VARIANTS[name]
    original, accelerated, handle = pair(BLOCKS[kind](**options), x)
    zoo.assert_same(original, accelerated, x, training=training)
    assert len(handle.replaced) == 3 and not handle.fallbacks


def test_a_norm_of_each_head(x: Tensor) -> None:
    """No constructor asks for it; who puts one in gets it."""
    model = timm_block()
    for layer in model.transformer:
        layer.attn.q_norm, layer.attn.k_norm = nn.LayerNorm(20), nn.RMSNorm(20)
    original, accelerated, handle = pair(model, x)
    zoo.assert_same(original, accelerated, x, training=True)
    assert len(handle.replaced) == 3 and not handle.fallbacks


@pytest.mark.parametrize("kind", BLOCKS)
def test_attention_alone(kind: str, x: Tensor) -> None:
    """Without its block it gets the unfolded tokens."""
    original, accelerated, handle = pair(BLOCKS[kind](), x, skip=["MobileVitBlock", "MobileViTLayer", "MobileViTBlock"])
    assert [r.path for r in handle.replaced] == attentions(kind) and reasons(handle) == {"": "named in skip"}
    zoo.assert_same(original, accelerated, x, training=True)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_alone(kind: str, x: Tensor) -> None:
    """It takes its attention with it."""
    name = type(BLOCKS[kind]()).__name__
    original, accelerated, handle = pair(BLOCKS[kind](), x, only=name)
    assert [r.path for r in handle.replaced] == ["", *attentions(kind)]
    zoo.assert_same(original, accelerated, x, training=False)
    assert not handle.fallbacks


@pytest.mark.parametrize("form", [torch.channels_last, "strided", "expanded"], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_memory_formats(kind: str, form: Any, x: Tensor) -> None:
    if form == "strided":
        x = torch.stack((x, x), dim=-1)[..., 0]
    elif form == "expanded":
        x = x[:1].expand(2, -1, -1, -1)
    else:
        x = x.to(memory_format=form)
    model = zoo.settle(BLOCKS[kind](), feature_map())
    if form is torch.channels_last:
        model = model.to(memory_format=form)
    accelerated = copy.deepcopy(model)
    vitkernels.accelerate(accelerated)
    zoo.assert_same(model, accelerated, x, training=False)
    assert accelerated(x).stride() == model(x).stride()


# --- dropout -------------------------------------------------------------------------------------------------------------------------

DROPPING: dict[str, tuple[str, dict[str, Any]]] = {
    "activations": ("timm", {"drop": 0.2}),
    "stochastic depth": ("timm", {"drop_path_rate": 0.3}),
    "transformers' default": ("transformers", {"hidden_dropout_prob": 0.1}),
}


@pytest.mark.parametrize("name", DROPPING)
def test_layers_that_draw_random_numbers_see_what_they_always_saw(name: str, x: Tensor) -> None:
    """The same draws, hence the same results: unfolded, with our attention."""
    kind, options = DROPPING[name]
    original, accelerated, handle = pair(BLOCKS[kind](**options), x)
    assert handle.replaced[0].note == "unfolds in training, where its layers draw random numbers"
    for training in (False, True):
        zoo.assert_same(original, accelerated, x, training=training)
    accelerated.eval()(x)
    assert not handle.fallbacks
    accelerated.train()(x)
    assert handle.fallbacks == {"": "its layers draw random numbers in this call"}


@pytest.mark.parametrize(
    ("kind", "options"), [("timm", {"attn_drop": 0.3}), ("transformers", {"attention_probs_dropout_prob": 0.3})], ids=["timm", "transformers"]
)
def test_attention_dropout(kind: str, options: dict[str, Any], x: Tensor) -> None:
    original, accelerated, handle = pair(BLOCKS[kind](**options), x)
    assert handle.replaced[1].note == "in training, dropout draws other masks than the original, of the same probability"
    zoo.assert_same(original, accelerated, x, training=False)
    with torch.random.fork_rng():
        assert not torch.allclose(accelerated.train()(x), accelerated(x)), "nothing was dropped"
    assert list(handle.fallbacks) == [""]


# --- dtypes, compilation, copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_low_precision(kind: str, dtype: torch.dtype, x: Tensor) -> None:
    original, accelerated, handle = pair(BLOCKS[kind](), x)
    zoo.assert_same_in(dtype, original, accelerated, x)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", BLOCKS)
def test_autocast(kind: str, x: Tensor) -> None:
    original, accelerated, handle = pair(BLOCKS[kind](), x)
    zoo.assert_same_under_autocast(original, accelerated, x)
    assert not handle.fallbacks


_ONE_LAYER: dict[str, dict[str, Any]] = {"timm": {"transformer_depth": 1}, "transformers": {"num_stages": 1}, "vit_pytorch": {"depth": 1}}


@pytest.mark.parametrize("kind", BLOCKS)
def test_torch_compile(kind: str, x: Tensor) -> None:
    """Without a graph break, forward and backward, and another batch without another compilation."""
    original, accelerated, handle = pair(BLOCKS[kind](**_ONE_LAYER[kind]), x)
    zoo.assert_same_compiled(original, accelerated, x, feature_map(batch=3), dense.MapBlock)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", BLOCKS)
def test_swap_and_revert(kind: str, x: Tensor) -> None:
    model = zoo.settle(BLOCKS[kind](), x).eval()
    with zoo.swapped_and_reverted(model, lambda model: model(x)):
        pass


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_map_is_copied_twice(kind: str, x: Tensor) -> None:
    """To channels last and back, around the whole transformer: not once in it."""
    model = BLOCKS[kind]().eval()
    vitkernels.accelerate(model)
    with torch.no_grad(), zoo.Copies() as found:
        model(x)
    assert [size for size in found.sizes if size >= 2 * 40 * 64] == [2 * 40 * 64] * 2


# --- the handle ----------------------------------------------------------------------------------------------------------------------

INNER = {
    "timm": ["transformer", "transformer.0", "transformer.1.norm2", "transformer.0.mlp.act", "norm", "transformer.1.attn"],
    "transformers": [
        "transformer",
        "transformer.layer.0.intermediate",
        "transformer.layer.1.layernorm_after",
        "layernorm",
        "transformer.layer.0.attention",
    ],
    "vit_pytorch": ["transformer", "transformer.layers.0.1", "transformer.layers.1.0.norm", "transformer.layers.1.0"],
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_hooks_see_what_they_always_saw(kind: str, later: bool, x: Tensor) -> None:
    for path in INNER[kind]:
        model = zoo.settle(BLOCKS[kind](), x).eval()
        expected, shapes = copy.deepcopy(model)(x), []

        def watch(model: nn.Module = model, path: str = path, shapes: list[tuple[int, ...]] = shapes) -> None:
            model.get_submodule(path).register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))

        if not later:
            watch()
        handle = vitkernels.accelerate(model)
        if later:
            watch()
        torch.testing.assert_close(model(x), expected)
        assert shapes == [(2, 4, 16, 40) if kind == "vit_pytorch" else (8, 16, shapes[0][2])]
        assert "hook" in (handle.fallbacks if later else reasons(handle))[""]


CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any], str]] = {
    "pooling": ("timm", lambda m: m.transformer.append(nn.Flatten(0, 1)), "its Flatten is not known to work on each token by itself"),
    "subclass": ("transformers", lambda m: setattr(m.layernorm, "__class__", type("My", (nn.LayerNorm,), {})), "its My is not known"),
    "attend": ("vit_pytorch", lambda m: setattr(m.transformer.layers[0][0], "attend", nn.Softmax(dim=-2)), "not a plain Softmax over the keys"),
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_blocks_are_left_alone(name: str, later: bool, x: Tensor) -> None:
    kind, change, words = CHANGES[name]
    original = zoo.settle(BLOCKS[kind](), x).eval()
    model = copy.deepcopy(original)
    change(original)
    if later:
        handle = vitkernels.accelerate(model)
        change(model)
    else:
        change(model)
        handle = vitkernels.accelerate(model)
    torch.testing.assert_close(model(x), original(x))
    assert words in (handle.fallbacks if later else reasons(handle))[""]


@pytest.mark.parametrize("kind", BLOCKS)
def test_two_handles_in_any_order(kind: str, x: Tensor) -> None:
    original = zoo.settle(BLOCKS[kind](), x)
    for inner_first in (True, False):
        model = copy.deepcopy(original)
        inner = vitkernels.accelerate(model, only="attention")
        outer = vitkernels.accelerate(model)
        assert (len(inner.replaced), len(outer.replaced)) == (2, 1)
        first, last = (inner, outer) if inner_first else (outer, inner)
        first.remove()
        zoo.assert_same(original, model, x, training=False)
        last.remove()
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_an_attention_without_which_the_block_cannot_be(x: Tensor) -> None:
    handle = vitkernels.accelerate(timm_block(), skip="transformer.1.attn")
    assert reasons(handle)[""] == "transformer.1.attn, without which it cannot be replaced, is named in skip"
    assert [r.path for r in handle.replaced] == ["transformer.0.attn"]


def test_without_a_kernel_the_original_runs(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    original, accelerated, handle = pair(timm_block(), x)
    monkeypatch.setattr(backends, "select", lambda op, tensor: "reference")
    assert torch.equal(accelerated.eval()(x), original.eval()(x))
    assert "no kernel runs here" in handle.fallbacks[""]


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_export_is_the_original(kind: str, x: Tensor) -> None:
    accelerated = BLOCKS[kind]().eval()
    expected = accelerated(x)
    vitkernels.accelerate(accelerated)
    program = torch.export.export(accelerated, (x,))
    assert "vitkernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected)


def test_gradient_checkpointing_of_transformers(x: Tensor) -> None:
    """Runs the accelerated block twice: in the forward pass, and for the backward pass again."""
    model = transformers_model()
    images = zoo.photos(64, 3)
    original, accelerated, _ = pair(model, images)
    for m in (original, accelerated):
        m.gradient_checkpointing_enable()
    calls: list[int] = []
    patched = ops.patch_attention
    try:
        dense.ops.patch_attention = lambda *a, **k: calls.append(1) or patched(*a, **k)
        zoo.results(accelerated, images, training=True)
    finally:
        dense.ops.patch_attention = patched
    assert len(calls) == 2 * 9
    zoo.assert_same(original, accelerated, images, training=True)
