"""transformers' MobileViTV2, original against accelerated: outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitkernels
from vitkernels.accuracy import compare_tensors

from .. import zoo
from ..zoo import pair

pytestmark = pytest.mark.usefixtures("poison", "attention_alone")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("only", [None, "MobileViTV2LinearSelfAttention"], ids=["all", "attention only"])
def test_model(only: str | None, training: bool) -> None:
    images = zoo.photos(128)
    original, accelerated, handle = pair(zoo.transformers_model(), images, only=only)
    assert len(handle.replaced) == (4 if only else 3 + 4 + 4)
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_maps_that_no_patch_divides(training: bool) -> None:
    """224 px ends in a 7x7 map, of which the original drops the last row and column. Batch norm must still see each batch once."""
    images = zoo.photos((224, 160), 1)
    original, accelerated, _ = pair(zoo.transformers_model(), images)
    zoo.assert_same(original, accelerated, images, training=training)
    for model in (original, accelerated):
        model.train()(images)
    counts = [[int(b) for n, b in model.named_buffers() if "num_batches" in n] for model in (original, accelerated)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("options", [{"attn_dropout": 0.3}, {"ffn_dropout": 0.2}], ids=str)
def test_dropout_draws_the_same_masks(options: dict[str, float]) -> None:
    images = zoo.photos(96)
    original, accelerated, _ = pair(zoo.transformers_model(**options), images)
    zoo.assert_same(original, accelerated, images, training=True)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Each accelerated MobileViTV2Layer runs its forward again in the backward pass, once, and the gradients stay the same."""
    images = zoo.photos(96).requires_grad_()
    model = zoo.settle(zoo.transformers_model(), images).train()
    vitkernels.accelerate(model)
    plain = zoo.results(copy.deepcopy(model), images, training=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    block = next(m for m in model.modules() if type(m).__name__ == "FusedMobileViTV2Layer")
    calls = []
    block.conv_1x1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = zoo.results(model, images, training=True)
    assert len(calls) == 2
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=0, atol=0)


def test_hidden_states_are_still_recorded() -> None:
    images = zoo.photos(96)
    original, accelerated, _ = pair(zoo.transformers_model(), images)
    with torch.no_grad():
        theirs, ours = (model.eval()(images, output_hidden_states=True).hidden_states for model in (original, accelerated))
        exact = copy.deepcopy(original).double()(images.double(), output_hidden_states=True).hidden_states
    assert len(theirs) == len(ours) == len(exact)
    for index in range(len(exact)):
        comparison = compare_tensors(f"hidden state {index}", ours[index], theirs[index], exact[index])
        assert comparison.holds, comparison


def test_keyword_argument() -> None:
    model = zoo.transformers_model()
    attention = next(m for m in model.modules() if type(m).__name__ == "MobileViTV2LinearSelfAttention").eval()
    x = torch.randn(1, attention.embed_dim, 4, 9)
    expected = attention(hidden_states=x)
    vitkernels.accelerate(attention)
    torch.testing.assert_close(attention(hidden_states=x), expected)


def test_save_pretrained(tmp_path) -> None:  # type: ignore[no-untyped-def]
    images = zoo.photos(64)
    original, accelerated, _ = pair(zoo.transformers_model(), images)
    accelerated.save_pretrained(tmp_path)
    loaded = type(original).from_pretrained(tmp_path)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_projection_with_an_activation_is_left_alone() -> None:
    model = zoo.transformers_model()
    attention = next(m for m in model.modules() if type(m).__name__ == "MobileViTV2LinearSelfAttention")
    attention.out_proj.activation = nn.ReLU()
    handle = vitkernels.accelerate(model)
    assert [r.reason for r in handle.skipped if r.original_class.endswith("LinearSelfAttention")] == [
        "out_proj is not a MobileViTV2ConvLayer without normalization and activation"
    ]
