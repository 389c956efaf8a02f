"""timm's NaFlexVit, original against accelerated: padded batches that run on their real tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.accuracy import compare_tensors

from .. import zoo
from ..zoo import reasons

pytestmark = pytest.mark.usefixtures("poison", "attention_alone")
SIZES, LENGTH = ((4, 6), (2, 3), (7, 4), (1, 1)), 30
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "class token": {"class_token": True, "global_pool": "token"},
    "attention pooling": {"global_pool": "map", "pool_include_prefix": True},
    "mean and maximum, norms, scale": {"global_pool": "avgmax", "qk_norm": True, "init_values": 0.1, "scale_attn_inner_norm": True, "reg_tokens": 0},
    "mask of keys": {"use_key_only_attn_mask": True, "global_pool": "max", "qkv_bias": False},
    "factorized positions": {"pos_embed": "factorized", "pre_norm": True},
}
RANDOM: dict[str, dict[str, Any]] = {
    "dropout": {"proj_drop_rate": 0.3, "pos_drop_rate": 0.1},
    "stochastic depth": {"drop_path_rate": 0.5},
    "patches": {"patch_drop_rate": 0.4},
}


def batch(sizes: tuple[tuple[int, int], ...] = SIZES, length: int = LENGTH) -> dict[str, Tensor]:
    patches, places, valid = zoo.padded_patches(sizes, length)
    return {"patches": patches, "patch_coord": places, "patch_valid": valid}


def pair(model: nn.Module, images: Any = None, **options: object) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    return zoo.pair(model, batch() if images is None else images, **options)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", OPTIONS)
def test_model(name: str, training: bool) -> None:
    original, accelerated, handle = pair(zoo.naflex(**OPTIONS[name]))
    assert [r.path for r in handle.replaced] == ["", "blocks.0.attn", "blocks.1.attn"] and not handle.skipped
    zoo.assert_same(original, accelerated, batch(), training=training)
    assert not handle.fallbacks


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_random_numbers(name: str) -> None:
    """Dropout draws a number for each element of [B, N, D], padding too, and stochastic depth one for each image."""
    original, accelerated, handle = pair(zoo.naflex(**RANDOM[name]))

    def measure(model: nn.Module, images: Any, training: bool) -> dict[str, Tensor]:
        return {**zoo.results(model, images, training=training), "generator": torch.get_rng_state().double()}

    zoo.assert_same(original, accelerated, batch(), training=True, measure=measure)
    assert not handle.fallbacks
    whole = zoo.results(accelerated, batch(), training=False)["output"]
    assert not torch.allclose(zoo.results(accelerated, batch(), training=True)["output"], whole), "nothing was dropped"


def test_features_and_intermediates_of_real_patches() -> None:
    images = batch()
    original, accelerated, handle = pair(zoo.naflex(class_token=True))
    exact = copy.deepcopy(original).double()
    doubled = zoo.cast(images, torch.float64)
    real = torch.nn.functional.pad(images["patch_valid"], (3, 0), value=True)
    options = {"output_fmt": "NLC", "output_dict": True, "return_prefix_tokens": True}
    with torch.no_grad():
        features = [model.eval().forward_features(**x) for model, x in ((accelerated, images), (original, images), (exact, doubled))]
        layers = [model.forward_intermediates(x, **options) for model, x in ((accelerated, images), (original, images), (exact, doubled))]
    assert compare_tensors("features", *(found["patches"][real] for found in features)).holds
    assert not features[0]["patches"][~real].any()
    assert torch.equal(features[0]["patch_valid"], images["patch_valid"])
    for index in range(2):
        assert compare_tensors("intermediate", *(found["image_intermediates"][index][images["patch_valid"]] for found in layers)).holds
        assert compare_tensors("prefix", *(found["image_intermediates_prefix"][index] for found in layers)).holds
    assert not handle.fallbacks


def test_patches_anywhere_in_the_row() -> None:
    """Real patches that are not the first ones: no trouble for tokens; where the batch has to stay padded, the original runs."""
    images = batch()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
    shuffled = {name: tensor[:, order] for name, tensor in images.items()}
    original, accelerated, handle = pair(zoo.naflex(pos_embed="none", drop_path_rate=0.5))
    zoo.assert_same(original, accelerated, shuffled, training=False)
    assert not handle.fallbacks
    zoo.assert_same(original, accelerated, shuffled, training=True)
    accelerated.train()(shuffled)
    assert "patch_valid is not true for the first patches" in handle.fallbacks[""]


def test_autocast_and_low_precision() -> None:
    original, accelerated, handle = pair(zoo.naflex())

    zoo.assert_same(original, accelerated, batch(), training=False, measure=zoo.under_autocast, eps=torch.finfo(torch.bfloat16).eps)
    zoo.assert_same(original.bfloat16(), accelerated.bfloat16(), zoo.cast(batch(), torch.bfloat16), training=False)
    assert not handle.fallbacks


def test_gradient_checkpointing() -> None:
    _, accelerated, handle = pair(zoo.naflex())
    plain = zoo.results(accelerated, batch(), training=True)
    accelerated.set_grad_checkpointing()
    calls: list[int] = []
    accelerated.blocks[0].mlp.fc1.weight.register_hook(lambda grad: calls.append(1))
    again = zoo.results(accelerated, batch(), training=True)
    assert calls == [1] and not handle.fallbacks
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=0, atol=0)


def test_images_and_a_mask_of_ones_own_are_the_originals_business() -> None:
    original, accelerated, handle = pair(zoo.naflex())
    photos = zoo.photos(16)
    assert torch.equal(accelerated.eval()(photos), original.eval()(photos))
    assert handle.fallbacks == {"": "the batch came without patch_valid"}
    mask = torch.zeros(4, 1, LENGTH + 2, LENGTH + 2).masked_fill_(torch.rand(4, 1, LENGTH + 2, LENGTH + 2) < 0.3, -1e4)
    assert torch.equal(accelerated(batch() | {"attn_mask": mask}), original(batch() | {"attn_mask": mask}))


def test_no_mask_and_no_padding_in_memory() -> None:
    """Many small images beside a long one: no tensor is as large as the mask, and what is kept for the backward pass grows with the real tokens."""
    images = batch(((14, 14), *((2, 2),) * 31), 196)
    original, accelerated, _ = pair(zoo.naflex(), images)
    mask = 32 * (196 + 2) ** 2
    assert zoo.largest_tensor(accelerated, images) < mask <= zoo.largest_tensor(original, images)
    accelerated.eval(), original.eval()
    assert zoo.saved_bytes(accelerated, images) < 0.4 * zoo.saved_bytes(original, images)


@pytest.mark.parametrize("path", ["blocks.1", "blocks.0.attn", "blocks.1.mlp.fc1", "norm"])
def test_hooks_added_later_see_padded_batches(path: str) -> None:
    original, accelerated, handle = pair(zoo.naflex(fc_norm=False))
    seen: list[tuple[int, ...]] = []
    accelerated.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape[:2])))
    accelerated(batch())
    assert seen == [(4, LENGTH + 2)] and not handle.fallbacks
    zoo.assert_same(original, accelerated, batch(), training=False)


def test_swap_and_revert() -> None:
    model = zoo.settle(zoo.naflex(), batch()).eval()
    with zoo.swapped_and_reverted(model, lambda model: model(batch())):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_type": "axial"}, "rotary"),
        ({"attn_gated": True}, "EvaBlock"),
        ({"attn_layer": "diff"}, "DiffAttention"),
    ],
    ids=["rotary", "gated", "differential"],
)
def test_other_architectures_are_left_alone(options: dict[str, Any], words: str) -> None:
    original, accelerated, handle = pair(zoo.naflex(**options))
    assert not handle.replaced and words in reasons(handle)[""]
    assert torch.equal(accelerated.eval()(batch()), original.eval()(batch()))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_quantised_layer_is_left_alone() -> None:
    model = zoo.naflex().eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    handle = vitkernels.accelerate(quantised)
    assert not handle.replaced and "Linear" in reasons(handle)[""]


def test_a_part_named_in_skip_leaves_the_model_alone() -> None:
    original, accelerated, handle = pair(zoo.naflex(), skip="blocks.1.attn")
    assert reasons(handle) == {"": "blocks.1.attn, without which it cannot be replaced, is named in skip", "blocks.1.attn": "named in skip"}
    assert [(record.path, record.op) for record in handle.replaced] == [("blocks.0.attn", "attention")]
    zoo.assert_same(original, accelerated, batch(), training=False)
    assert not handle.fallbacks


def test_the_attention_of_an_ordinary_vit_takes_no_layout() -> None:
    import timm

    handle = vitkernels.accelerate(timm.create_model("vit_tiny_patch16_224", depth=1))
    assert [(record.path, record.op) for record in handle.replaced] == [("blocks.0.attn", "attention")] and not handle.skipped
