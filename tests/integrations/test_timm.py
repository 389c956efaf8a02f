"""timm's MobileViTv2, original against accelerated: outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels.accuracy import compare_tensors

from .. import zoo
from ..zoo import pair

pytestmark = pytest.mark.usefixtures("poison", "attention_alone")
ROUTES = {
    "all": {},
    "attention only": {"only": "LinearSelfAttention"},
    "no map": {"skip": "MobileVitV2Block"},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "size"), [("mobilevitv2_050", 128), ("mobilevitv2_050", (122, 96)), ("mobilevitv2_100", 96)])
def test_model(name: str, size: int | tuple[int, int], training: bool) -> None:
    images = zoo.photos(size)
    original, accelerated, handle = pair(zoo.timm_model(name), images)
    assert len(handle.replaced) == 3 + 2 * (2 + 4 + 3) and not handle.skipped
    zoo.assert_same(original, accelerated, images, training=training)
    assert not handle.fallbacks


@pytest.mark.parametrize("size", [224, 250])
def test_odd_maps_at_common_sizes(size: int) -> None:
    images = zoo.photos(size, 1)
    original, accelerated, _ = pair(zoo.timm_model(), images)
    zoo.assert_same(original, accelerated, images, training=False)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_block(route: str, layout: torch.memory_format, training: bool) -> None:
    x = torch.randn(2, 32, 12, 10, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    original, accelerated, handle = pair(zoo.timm_block(), x, **ROUTES[route])
    zoo.assert_same(original, accelerated, x, training=training)
    assert not handle.fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    x = torch.randn(2, 32, 12, 10, generator=torch.Generator().manual_seed(0))
    original, accelerated, _ = pair(zoo.timm_block(), x)
    zoo.assert_same(original.to(dtype), accelerated.to(dtype), x.to(dtype), training=False)


def test_autocast() -> None:
    x = torch.randn(2, 32, 12, 10, generator=torch.Generator().manual_seed(0))
    original, accelerated, handle = pair(zoo.timm_block(), x)
    exact = zoo.results(copy.deepcopy(original).double(), x.double(), training=False)
    with torch.autocast("cpu", torch.bfloat16):
        eager, fast = (zoo.results(model, x, training=False) for model in (original, accelerated))
    for name in exact:
        assert fast[name].dtype is eager[name].dtype
        comparison = compare_tensors(name, fast[name].bfloat16(), eager[name].bfloat16(), exact[name])
        assert comparison.holds, comparison
    assert not handle.fallbacks


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("options", [{"attn_drop": 0.3}, {"drop_path_rate": 0.5}, {"drop": 0.2}, {"attn_drop": 0.3, "drop": 0.2}], ids=str)
def test_dropout_draws_the_same_masks(options: dict[str, float], route: str) -> None:
    x = torch.randn(4, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    original, accelerated, _ = pair(zoo.timm_block(**options), x, **ROUTES[route])
    zoo.assert_same(original, accelerated, x, training=True)
    undropped = zoo.results(copy.deepcopy(original), x, training=False)["output"]
    assert not torch.allclose(zoo.results(accelerated, x, training=True)["output"], undropped)


def test_output_dropout_alone_keeps_the_map() -> None:
    """Dropout behind the projection draws its mask in the unfolded order even where the map is never unfolded."""
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    block = zoo.timm_block()
    for layer in block.transformer:
        layer.attn.out_drop.p = 0.4
    original, accelerated, handle = pair(block, x)
    zoo.assert_same(original, accelerated, x, training=True)
    assert not handle.fallbacks


@pytest.mark.parametrize("patch_size", [1, 3, (2, 4)])
def test_patch_sizes(patch_size: int | tuple[int, int]) -> None:
    x = torch.randn(2, 32, 11, 9, generator=torch.Generator().manual_seed(0))
    original, accelerated, _ = pair(zoo.timm_block(patch_size=patch_size), x)
    zoo.assert_same(original, accelerated, x, training=False)


def test_without_biases() -> None:
    from timm.models.mobilevit import LinearSelfAttention

    torch.manual_seed(0)
    x = torch.randn(2, 24, 4, 15)
    original, accelerated, handle = pair(LinearSelfAttention(24, bias=False), x)
    assert handle.replaced[0].path == ""
    zoo.assert_same(original, accelerated, x, training=True)


class GroupNormShapes(TorchDispatchMode):
    """Notes the shape of every tensor that a group norm normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.native_group_norm.default:
            self.seen.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("route", "shape"), [("all", (2, 32, 12, 12)), ("no map", (2, 32, 4, 36))])
def test_map_form_never_unfolds(route: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 32, 12, 12, generator=torch.Generator().manual_seed(0))
    _, accelerated, _ = pair(zoo.timm_block(), x, **ROUTES[route])
    with torch.no_grad(), GroupNormShapes() as shapes:
        accelerated.eval()(x)
    assert shapes.seen == [shape] * 5


def test_cross_attention_is_left_alone() -> None:
    from timm.models.mobilevit import LinearTransformerBlock

    torch.manual_seed(0)
    layer = LinearTransformerBlock(16)
    x, x_prev = torch.randn(2, 16, 4, 9), torch.randn(2, 16, 4, 7)
    accelerated = copy.deepcopy(layer)
    handle = vitkernels.accelerate(accelerated)
    outcomes = []
    for model in (layer, accelerated):
        try:
            outcomes.append(model(x, x_prev))
        except RuntimeError as error:  # timm 1.0.31 slices one row too few off the weight, and fails
            outcomes.append(str(error))
    assert torch.equal(*outcomes) if isinstance(outcomes[0], Tensor) else outcomes[0] == outcomes[1]
    assert handle.fallbacks == {"attn": "x_prev was given (cross-attention)"}
    assert "x_prev" in str(handle)


def test_block_built_for_export_is_left_alone() -> None:
    from timm.layers import set_exportable

    with set_exportable(True):
        block = zoo.timm_block()
    handle = vitkernels.accelerate(block)
    assert [(r.path, "export" in r.reason) for r in handle.skipped] == [("", True)]
    assert len(handle.replaced) == 4
    zoo.assert_same(copy.deepcopy(block), block, torch.randn(1, 32, 8, 8), training=False)


def test_unknown_activation_keeps_the_unfolded_form() -> None:
    block = zoo.timm_block()
    block.transformer[1].mlp.act = nn.Softmax(dim=-1)
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    original, accelerated, handle = pair(block, x)
    assert [(r.path, "Softmax" in r.reason) for r in handle.skipped] == [("", True)]
    zoo.assert_same(original, accelerated, x, training=False)
