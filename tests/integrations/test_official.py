"""The papers' own classes (ml-cvnets, Cream), recognised by their attributes and checked by running them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkernels

from .. import zoo

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"attn_dropout": 0.3}], ids=str)
def test_model(options: dict[str, float], training: bool) -> None:
    images = zoo.photos(96)
    original = zoo.settle(zoo.cvnets_model(**options), images)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    assert [r.path for r in handle.replaced] == ["stem", "attentions.0", "attentions.1"]
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


def test_cross_attention_is_left_alone() -> None:
    torch.manual_seed(0)
    attention = zoo.LinearSelfAttention(16)
    x, x_prev = torch.randn(2, 16, 4, 9), torch.randn(2, 16, 4, 7)
    expected = attention(x, x_prev)
    handle = vitkernels.accelerate(attention)
    assert torch.equal(attention(x, x_prev), expected)
    assert handle.fallbacks == {"": "x_prev was given (cross-attention)"}


def test_checking_leaves_no_trace() -> None:
    model = zoo.cvnets_model(attn_dropout=0.1)
    calls: list[int] = []
    model.attentions[0].register_forward_hook(lambda *_: calls.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    vitkernels.accelerate(model)
    assert torch.equal(random, torch.get_rng_state()) and not calls
    assert model.attentions[0].training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class _Scaled(zoo.LinearSelfAttention):
    def forward(self, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        return super().forward(x, x_prev) * 1.001


class _Wants(zoo.LinearSelfAttention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * mask


class _DropsElsewhere(zoo.LinearSelfAttention):
    """The same in evaluation; in training its dropout falls on the values."""

    def forward(self, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv_proj(x).split([1, self.embed_dim, self.embed_dim], dim=1)
        context = (key * query.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        return self.out_proj(self.attn_dropout(F.relu(value)) * context)


@pytest.mark.parametrize(
    ("base", "words"),
    [(_Scaled, "computes something else"), (_Wants, "does not run like it"), (_DropsElsewhere, "computes something else")],
    ids=["other maths", "other arguments", "other dropout"],
)
def test_same_attributes_but_not_the_same_code(base: type[nn.Module], words: str) -> None:
    impostor = type("LinearSelfAttention", (base,), {})(16, attn_dropout=0.5)
    handle = vitkernels.accelerate(impostor)
    assert not handle.replaced and words in handle.skipped[0].reason


def test_normalised_projection_is_left_alone() -> None:
    attention = zoo.LinearSelfAttention(16)
    attention.qkv_proj.block.add_module("norm", nn.BatchNorm2d(33))
    handle = vitkernels.accelerate(attention)
    assert [r.reason for r in handle.skipped] == ["qkv_proj is more than a convolution"]


def test_projection_replaced_later_runs_the_original() -> None:
    torch.manual_seed(0)
    attention = zoo.LinearSelfAttention(16).eval()
    handle = vitkernels.accelerate(attention)
    attention.out_proj = nn.Conv2d(16, 16, 1)
    x = torch.randn(1, 16, 4, 5)
    ours = attention(x)
    assert handle.fallbacks == {"": "out_proj is more than a convolution"}
    handle.remove()
    assert torch.equal(ours, attention(x))


# --- Cream's EfficientViT ----------------------------------------------------------------------------------------------------------


def evaluated(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
    """Without the gradient of the bias tables, which Cream's code does not give in evaluation: it gathers them once, without gradients."""
    outcome = zoo.results(model, images, training=training)
    return {name: tensor for name, tensor in outcome.items() if not name.endswith("attention_biases")}


@pytest.mark.parametrize("route", [{}, {"only": "CascadedGroupAttention"}], ids=["all", "attention only"])
@pytest.mark.parametrize(("measure", "training"), [(zoo.inference, False), (evaluated, False), (zoo.trained, True)], ids=["infer", "eval", "train"])
def test_cream_model(measure: zoo.Measure, training: bool, route: dict[str, str]) -> None:
    images = zoo.photos(96)
    original = zoo.settle(zoo.cream_model(), images)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated, **route)
    assert {r.path for r in handle.replaced} == {"first.attn", "second.attn"} | (set() if route else {"first", "second", "stem"})
    assert list(accelerated.state_dict()) == list(original.state_dict())
    zoo.assert_same(original, accelerated, images, training=training, measure=measure)
    assert not handle.fallbacks


def test_cream_reparameterised() -> None:
    images = zoo.photos(96)
    original = zoo.settle(zoo.cream_model(), images).eval()
    for attention in (original.first.attn, original.second.attn):
        for layers in (attention.qkvs, attention.dws, attention.proj):
            for i, layer in enumerate(layers):
                if isinstance(layer, zoo.Conv2d_BN):
                    layers[i] = nn.utils.fusion.fuse_conv_bn_eval(layer.c, layer.bn)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    assert len(handle.replaced) == 5
    for measure in (zoo.inference, evaluated):
        zoo.assert_same(original, accelerated, images, training=False, measure=measure)
    assert not handle.fallbacks


def test_cream_refuses_other_maps_as_it_did() -> None:
    window = zoo.cream_model().first
    handle = vitkernels.accelerate(window)
    with pytest.raises(AssertionError, match="wrong size"):
        window(torch.randn(1, 32, 16, 16))
    assert handle.fallbacks == {"": "the map is not 12 x 12"}


class _Hotter(zoo.CascadedGroupAttention):
    def forward(self, x: Tensor) -> Tensor:
        self.scale *= 1.001
        y = super().forward(x)
        self.scale /= 1.001
        return y


class _Shifted(zoo.LocalWindowAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, 2)).roll(-1, 2)


@pytest.mark.parametrize("base", [_Hotter, _Shifted], ids=["scale", "windows"])
def test_cream_attributes_but_not_the_same_code(base: type[nn.Module]) -> None:
    whole = base is _Shifted
    torch.manual_seed(0)
    arguments = (32, 16, 2, 1, 12, 4, (5, 3)) if whole else (32, 16, 2, 1, 4, (5, 3))
    impostor = type(base.__mro__[1].__name__, (base,), {})(*arguments)
    handle = vitkernels.accelerate(impostor)
    assert "computes something else" in {r.path: r.reason for r in handle.skipped}[""]
    assert [r.path for r in handle.replaced] == (["attn"] if whole else [])
