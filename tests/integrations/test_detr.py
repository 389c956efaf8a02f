"""DETR in models: attention of transformers' family and of the authors' layers, original against accelerated."""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.integrations import attention_interface, matching
from vitkernels.integrations import detr as _detr
from vitkernels.ops.packed.reference import keep_maps

from .. import detr, zoo
from ..zoo import pair, reasons

pytestmark = pytest.mark.usefixtures("poison")


def padded(images: Tensor) -> dict[str, Tensor]:
    """The lower half of the second image is padding."""
    mask = torch.ones(images.shape[0], *images.shape[2:], dtype=torch.long)
    mask[1:, images.shape[2] // 2 :] = 0
    return {"pixel_values": images, "pixel_mask": mask}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return padded(zoo.photos(64))


# --- attention of transformers' classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", ["Detr", "TableTransformer", "ConditionalDetr", "DeformableDetr"])
def test_the_same(family: str, training: bool, batch: dict[str, Tensor]) -> None:
    original, accelerated, handle = pair(detr.transformers_model(family), batch, only="attention")
    cross = ["encoder_attn"] if family in ("Detr", "TableTransformer") else []
    where = [] if family == "DeformableDetr" else [f"model.encoder.layers.{i}.self_attn" for i in range(2)]
    if family != "ConditionalDetr":
        where += [f"model.decoder.layers.{i}.{name}" for i in range(3) for name in ("self_attn", *cross)]
    stacks = {"Detr": ["model.encoder", "model.decoder"], "ConditionalDetr": ["model.encoder"]}.get(family, [])
    assert sorted(r.path for r in handle.replaced) == sorted(where + stacks)
    zoo.assert_same(original, accelerated, batch, training=training)
    assert not handle.fallbacks


@pytest.mark.parametrize("name", sorted({**_detr.TABLE, **matching.TABLE}))
def test_every_class_of_the_tables(name: str) -> None:
    """It is there; and if it is one of attention, it computes the same."""
    module, _, kind = name.rpartition(".")
    cls = getattr(importlib.import_module(module), kind)
    if not kind.endswith("Attention") or kind == "TableTransformerAttention":
        return
    torch.manual_seed(0)
    layer = cls(config=types.SimpleNamespace(_attn_implementation="sdpa"), hidden_size=32, num_attention_heads=4).eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    given = (x, memory, None, x, memory) if "Cross" in kind else (x, None, x)
    with torch.no_grad():
        expected = layer(*given)[0]
        handle = vitkernels.accelerate(layer)
        torch.testing.assert_close(layer(*given)[0], expected)
    assert len(handle.replaced) == 1 and not handle.fallbacks


def test_no_mask_of_pairs_is_made(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor]) -> None:
    """Padding reaches the op as [B, M]."""
    seen: list[tuple[Any, Any]] = []
    op = attention_interface.dense.ops.attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["bias"], tuple(kwargs["key_padding"].shape) if kwargs["key_padding"] is not None else None))
        return op(*args, **kwargs)

    model = detr.transformers_model(encoder_layers=1, decoder_layers=1).eval()
    vitkernels.accelerate(model)
    monkeypatch.setattr(attention_interface.dense.ops, "attention", attention)
    with torch.no_grad():
        model(**batch)
    tokens = batch["pixel_values"].shape[2] // 8
    assert seen == [(None, (2, tokens**2)), (None, None), (None, (2, tokens**2))]


def test_masks_of_pairs_stay_masks() -> None:
    mask = torch.rand(2, 1, 5, 7) < 0.5
    assert attention_interface.as_structure(mask, 2) == (mask, None)
    additive = torch.zeros(2, 1, 1, 7)
    assert attention_interface.as_structure(additive, 2) == (additive, None)
    bias, padding = attention_interface.as_structure(mask[:1, :, :1], 2)
    assert bias is None and padding is not None and torch.equal(padding, mask[:1, 0, 0].expand(2, 7))


def test_swapped_and_reverted(batch: dict[str, Tensor]) -> None:
    model = zoo.settle(detr.transformers_model(), batch).eval()

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            return model(**batch).logits

    with zoo.swapped_and_reverted(model, run) as expected:
        torch.testing.assert_close(run(model), expected)


def test_what_asks_for_weights_is_left_alone(batch: dict[str, Tensor]) -> None:
    model = detr.transformers_model()
    model.set_attn_implementation("eager")
    expected = model.eval()(**batch, output_attentions=True)
    handle = vitkernels.accelerate(model, only="attention")
    assert not handle.replaced and set(reasons(handle).values()) >= {"its attention implementation is 'eager', not 'sdpa'"}
    assert torch.equal(model(**batch, output_attentions=True).cross_attentions[0], expected.cross_attentions[0])
    model = detr.transformers_model().eval()
    handle = vitkernels.accelerate(model, only="attention")
    model(**batch, output_attentions=True)
    assert set(handle.fallbacks.values()) == {"output_attentions was given"}


# --- the authors' layers ---------------------------------------------------------------------------------------------------------------

LAYERS = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("before", [False, True], ids=["post-norm", "pre-norm"])
def test_authors_layers(before: bool, training: bool) -> None:
    images = zoo.photos(64)
    original, accelerated, handle = pair(detr.authors_detr(normalize_before=before), images)
    assert [r.path for r in handle.replaced] == ["patches", *LAYERS] and not handle.skipped
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


def test_authors_layers_swap_and_revert() -> None:
    images = zoo.photos(64)
    model = zoo.settle(detr.authors_detr(), images).eval()
    with zoo.swapped_and_reverted(model, lambda model: model(images)) as expected:
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_authors_layers_in(dtype: torch.dtype) -> None:
    images = zoo.photos(64)
    original, accelerated, _ = pair(detr.authors_detr(), images)
    zoo.assert_same_in(dtype, original, accelerated, images)


def test_authors_layers_under_autocast() -> None:
    images = zoo.photos(64)
    original, accelerated, handle = pair(detr.authors_detr(), images)
    zoo.assert_same_under_autocast(original, accelerated, images)
    assert not handle.fallbacks


def test_authors_layer_compiled() -> None:
    torch.manual_seed(0)
    original, accelerated, handle = pair(nn.Sequential(detr.TransformerEncoderLayer(32, 4)), x := torch.randn(7, 2, 32))
    zoo.assert_same_compiled(original, accelerated, x, torch.randn(9, 3, 32), type(accelerated[0]))
    assert not handle.fallbacks


def test_maps_of_attention_are_not_kept() -> None:
    layer, x = detr.TransformerEncoderLayer(32, 4), torch.randn(200, 1, 32)
    before = zoo.saved_bytes(layer, x)
    vitkernels.accelerate(layer)
    assert before - zoo.saved_bytes(layer, x) >= 4 * 4 * 200 * 200


def _our_masks(attention: nn.MultiheadAttention, q: Tensor, k: Tensor, value: Tensor, **masks: Any) -> tuple[Tensor, None]:
    """nn.MultiheadAttention with dropout's masks as our op draws them."""
    width, heads, p = attention.embed_dim, attention.num_heads, attention.dropout
    parts = zip((q, k, value), attention.in_proj_weight.split(width), attention.in_proj_bias.split(width), strict=True)
    q, k, v = (nn.functional.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x, w, b in parts)
    maps = (q @ k.mT * (width // heads) ** -0.5).softmax(-1)
    maps = maps * keep_maps(torch.randint(2**62, ()), maps.shape, p) / (1 - p)
    return attention.out_proj((maps @ v).permute(2, 0, 1, 3).flatten(2)), None


def test_dropout_is_that_of_the_maps() -> None:
    """On the masks that our op draws the original computes the same; and the masks of its other dropouts are its own."""
    torch.manual_seed(0)
    original = detr.TransformerEncoderLayer(32, 4, dropout=0.3)
    original, accelerated, handle = pair(nn.Sequential(original), x := torch.randn(7, 2, 32))
    assert {r.note for r in handle.replaced} == {"in training, dropout draws other masks than the original, of the same probability"}

    class OurMasks(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> tuple[Tensor, None]:  # type: ignore[override]
            return _our_masks(self, query, key, value, **masks)

    original[0].self_attn.__class__ = OurMasks
    zoo.assert_same(original, accelerated, x, training=True)
    assert not handle.fallbacks


def test_hook_that_wants_the_maps_gets_them() -> None:
    images = zoo.photos(64)
    model = detr.authors_detr().eval()
    maps: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        maps.append(output[1])

    model.decoder[1].multihead_attn.register_forward_hook(keep)
    handle = vitkernels.accelerate(model)
    assert [r.path for r in handle.replaced] == ["patches", *LAYERS[:3]]
    assert "hook" in reasons(handle)["decoder.1"] and "attention maps may be wanted" in reasons(handle)["decoder.1"]
    model.decoder[0].multihead_attn.register_forward_hook(keep)  # later
    model(images)
    assert [m.shape for m in maps] == [(2, 9, 16)] * 2
    assert list(handle.fallbacks) == ["decoder.0"]


def test_masks_of_pairs_run_the_original() -> None:
    torch.manual_seed(0)
    layer, x = detr.TransformerEncoderLayer(32, 4).eval(), torch.randn(5, 2, 32)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = layer(x, src_mask=mask)
    handle = vitkernels.accelerate(layer)
    assert torch.equal(layer(x, src_mask=mask), expected)
    assert handle.fallbacks == {"": "a mask of pairs of tokens was given"}


class _Unplaced(detr.TransformerEncoderLayer):
    """Positions in the values, too."""

    def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, pos: Any = None) -> Tensor:
        return super().forward(self.with_pos_embed(src, pos), src_mask, src_key_padding_mask)


class _BlindToPadding(detr.TransformerDecoderLayer):
    def forward(self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Any = None, **rest: Any) -> Tensor:  # type: ignore[override]
        return super().forward(tgt, memory, **rest)


@pytest.mark.parametrize("base", [_Unplaced, _BlindToPadding])
def test_other_code_is_left_alone(base: type[nn.Module]) -> None:
    impostor = type(base.__mro__[1].__name__, (base,), {})(32, 4)
    handle = vitkernels.accelerate(impostor)
    assert not handle.replaced and "computes something else" in reasons(handle)[""]


def test_torchs_own_layer_is_not_taken_for_detrs() -> None:
    assert not vitkernels.accelerate(nn.TransformerEncoderLayer(32, 4)).replaced


def test_positional_arguments() -> None:
    torch.manual_seed(0)
    layer = detr.TransformerDecoderLayer(32, 4).eval()
    x, memory, pos, query_pos = torch.randn(5, 2, 32), *torch.randn(2, 7, 2, 32), torch.randn(5, 2, 32)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, 3:] = True
    call = functools.partial(layer, x, memory, None, None, hidden, None, pos, query_pos)
    expected = call()
    handle = vitkernels.accelerate(layer)
    torch.testing.assert_close(call(), expected)
    assert not handle.fallbacks
