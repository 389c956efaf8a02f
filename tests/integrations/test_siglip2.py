"""transformers' Siglip2 vision model, original against accelerated: padded batches that run on their real patches."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.accuracy import compare_tensors

from .. import zoo
from ..zoo import reasons

pytestmark = pytest.mark.usefixtures("poison")
SIZES, LENGTH = ((4, 6), (2, 3), (7, 4), (1, 1)), 30


def batch(sizes: tuple[tuple[int, int], ...] = SIZES, length: int = LENGTH) -> dict[str, Tensor]:
    patches, _, valid = zoo.padded_patches(sizes, length)
    return {"pixel_values": patches, "pixel_attention_mask": valid.int(), "spatial_shapes": torch.tensor(sizes)}


def pair(model: nn.Module, images: Any = None, **options: object) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    return zoo.pair(model, batch() if images is None else images, **options)


def three(original: nn.Module, accelerated: nn.Module, **options: Any) -> tuple[Any, Any, Any]:
    """The outputs of the accelerated model, of the original, and of it in float64."""
    images = batch()
    exact = copy.deepcopy(original).double()
    with torch.no_grad():
        found = [model.eval()(**images, **options) for model in (accelerated, original)]
        return found[0], found[1], exact.eval()(**zoo.cast(images, torch.float64), **options)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_classifier(training: bool) -> None:
    original, accelerated, handle = pair(zoo.siglip2())
    names = [r.original_class.rpartition(".")[2] for r in handle.replaced]
    assert names == ["Siglip2VisionModel", "Siglip2Encoder", "Siglip2Attention", "Siglip2Attention"] and not handle.skipped
    zoo.assert_same(original, accelerated, batch(), training=training)
    assert not handle.fallbacks


def test_pooled_output_and_real_patches() -> None:
    original, accelerated, handle = pair(zoo.siglip2("VisionModel"))
    fast, eager, exact = three(original, accelerated)
    real = batch()["pixel_attention_mask"].bool()
    assert compare_tensors("pooled", fast.pooler_output, eager.pooler_output, exact.pooler_output).holds
    assert compare_tensors("patches", *(found.last_hidden_state[real] for found in (fast, eager, exact))).holds
    padding = fast.last_hidden_state[~real]
    torch.testing.assert_close(padding, accelerated.post_layernorm.bias.detach().expand_as(padding))
    assert not handle.fallbacks


def test_hidden_states() -> None:
    """Recorded as [B, N, D], padding included, which is the same then."""
    original, accelerated, handle = pair(zoo.siglip2("VisionModel"))
    fast, eager, exact = three(original, accelerated, output_hidden_states=True)
    assert len(fast.hidden_states) == len(eager.hidden_states) == 3
    for states in zip(fast.hidden_states, eager.hidden_states, exact.hidden_states, strict=True):
        assert compare_tensors("hidden state", *states).holds
    assert compare_tensors("last", fast.last_hidden_state, eager.last_hidden_state, exact.last_hidden_state).holds
    assert not handle.fallbacks


def test_attentions_are_the_originals_business() -> None:
    original, accelerated, handle = pair(zoo.siglip2("VisionModel"))
    for model in (original, accelerated):
        model.set_attn_implementation("eager")
    fast, eager, _ = three(original, accelerated, output_attentions=True)
    assert len(fast.attentions) == 2 and all(torch.equal(*maps) for maps in zip(fast.attentions, eager.attentions, strict=True))
    assert "'eager'" in handle.fallbacks[""] or "output_attentions" in handle.fallbacks[""]
    assert "'eager'" in reasons(vitkernels.accelerate(copy.deepcopy(original)))[""]


def test_patches_anywhere_in_the_row() -> None:
    """Masks that are not of the first patches: no trouble for tokens; where a hook waits for [B, N, D], the original runs."""
    images = batch()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
    images["pixel_attention_mask"] = images["pixel_attention_mask"][:, order]
    original, accelerated, handle = pair(zoo.siglip2())
    zoo.assert_same(original, accelerated, images, training=False)
    assert not handle.fallbacks
    seen: list[tuple[int, ...]] = []
    accelerated.vision_model.encoder.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    zoo.assert_same(original, accelerated, images, training=False)
    accelerated(**images)
    assert set(seen) == {(4, LENGTH, 48)}
    assert "the first patches" in handle.fallbacks["vision_model.encoder"]


@pytest.mark.parametrize("case", ["all real", "no mask", "one image"])
def test_batches_without_padding(case: str) -> None:
    images = batch(((5, 6), (6, 5)), 30) if case != "one image" else batch(((3, 4),), 12)
    original, accelerated, handle = pair(zoo.siglip2("VisionModel"), images)
    if case == "no mask":
        images["pixel_attention_mask"] = None  # type: ignore[assignment]
        with torch.no_grad():
            assert torch.equal(accelerated.eval()(**images).last_hidden_state, original.eval()(**images).last_hidden_state)
        assert handle.fallbacks == {"": "there is no mask [B, N]"}
        return

    def measure(model: nn.Module, images: Any, training: bool) -> dict[str, Tensor]:
        found = model.train(training)(**images)
        return {"pooled": found.pooler_output.detach(), "last": found.last_hidden_state.detach()}

    zoo.assert_same(original, accelerated, images, training=False, measure=measure)
    assert not handle.fallbacks


def test_autocast_and_low_precision() -> None:
    original, accelerated, handle = pair(zoo.siglip2())

    zoo.assert_same(original, accelerated, batch(), training=False, measure=zoo.under_autocast, eps=torch.finfo(torch.bfloat16).eps)
    zoo.assert_same(original.bfloat16(), accelerated.bfloat16(), zoo.cast(batch(), torch.bfloat16), training=False)
    assert not handle.fallbacks


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing(reentrant: bool) -> None:
    images = batch()
    images["pixel_values"].requires_grad_()
    _, accelerated, handle = pair(zoo.siglip2())
    plain = zoo.results(accelerated, images, training=True)
    accelerated.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = zoo.results(accelerated, images, training=True)
    assert accelerated.vision_model.encoder.layers[0].gradient_checkpointing and not handle.fallbacks
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=0, atol=0)


def test_no_mask_and_no_padding_in_memory() -> None:
    images = batch(((14, 14), *((2, 2),) * 31), 196)
    original, accelerated, _ = pair(zoo.siglip2(), images)
    mask = 32 * 196**2
    assert zoo.largest_tensor(accelerated, images) < mask <= zoo.largest_tensor(original, images)
    assert zoo.saved_bytes(accelerated, images) < 0.5 * zoo.saved_bytes(original, images)


def test_swap_and_revert(tmp_path: Path) -> None:
    model = zoo.settle(zoo.siglip2("VisionModel"), batch()).eval()
    original = type(model)
    with zoo.swapped_and_reverted(model, lambda model: model(**batch()).pooler_output) as expected:
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Siglip2VisionModel"]
        loaded = original.from_pretrained(tmp_path).eval()
        assert type(loaded) is original and torch.equal(loaded(**batch()).pooler_output, expected)


def test_the_text_model_is_left_alone() -> None:
    import transformers

    vision = zoo.siglip2("VisionModel").config.to_dict()
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 50, "projection_size": 48}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text))
    tokens = {"input_ids": torch.randint(3, 50, (4, 7)), "attention_mask": torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]}
    original = model.eval()
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    assert len(handle.replaced) == 4
    assert list(reasons(handle)) == ["text_model.encoder.layers.0.self_attn"]
    with torch.no_grad():
        fast, eager = (m(**batch(), **tokens) for m in (accelerated, original))
        exact = copy.deepcopy(original).double()(**zoo.cast(batch(), torch.float64), **tokens)
    assert torch.equal(fast.text_embeds, eager.text_embeds)
    assert compare_tensors("images", fast.image_embeds, eager.image_embeds, exact.image_embeds).holds


def test_unknown_layers_are_left_alone() -> None:
    model = zoo.siglip2("VisionModel")
    model.encoder.layers[1].self_attn.__class__ = type("MyAttention", (type(model.encoder.layers[1].self_attn),), {})
    handle = vitkernels.accelerate(model)
    assert not handle.replaced and "MyAttention" in reasons(handle)[""]
