"""MobileViT's blocks, v1 and v2, as wholes in evaluation; as they are in training is in test_mobilevit.py and test_timm.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends
from vitkernels.integrations import mobilevit
from vitkernels.nn import _derived

from .. import zoo
from ..zoo import assert_follows, assert_right, infer
from .test_mobilevit import timm_block, transformers_block, vit_pytorch_block

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not("inverted_bottleneck", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]


def timm_v2(dim: int = 40, **options: Any) -> nn.Module:
    from timm.models.byobnet import LayerFn
    from timm.models.mobilevit import MobileVitV2Block

    torch.manual_seed(0)
    layers = LayerFn(act=nn.SiLU)
    small = {"in_chs": 24, "transformer_dim": dim, "transformer_depth": 2, "patch_size": 2, "bottle_ratio": 0.5, "layers": layers}
    return MobileVitV2Block(**{**small, **options})


def transformers_v2(dim: int = 40, stride: int = 1, **options: Any) -> nn.Module:
    from transformers import MobileViTV2Config
    from transformers.models.mobilevitv2.modeling_mobilevitv2 import MobileViTV2Layer

    torch.manual_seed(0)
    return MobileViTV2Layer(MobileViTV2Config(**options), in_channels=24, out_channels=24, attn_unit_dim=dim, stride=stride)


def transformers_with_stride(dim: int = 40) -> nn.Module:
    """Which begins with an inverted residual."""
    from transformers import MobileViTConfig
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTLayer

    torch.manual_seed(0)
    return MobileViTLayer(MobileViTConfig(hidden_dropout_prob=0.0), in_channels=24, out_channels=32, stride=2, hidden_size=dim, num_stages=1)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "timm v1": timm_block,
    "timm v2": timm_v2,
    "transformers v1": transformers_block,
    "transformers v1 with stride": transformers_with_stride,
    "transformers v2": transformers_v2,
    "transformers v2 with stride": lambda dim=40: transformers_v2(dim, stride=2),
    "vit_pytorch v1": vit_pytorch_block,
}


def feature_map(height: int = 8, width: int = 12, batch: int = 4) -> Tensor:
    return torch.randn(batch, 24, height, width, generator=torch.Generator().manual_seed(1)) + 0.5


def pair(kind: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    original, accelerated, handle = zoo.pair(BLOCKS[kind](*args, **options), feature_map())
    assert handle.replaced[0].path == "" and not handle.replaced[0].note
    return original.eval(), accelerated.eval(), handle


def ran_whole(model: nn.Module) -> bool:
    """Whether weights of the block itself were packed: the latest call was of the whole."""
    assert isinstance(model, mobilevit.Whole)
    return any(module is model and entry._state.kept for derived in _derived._all for module, entry in derived._entries.items())


@pytest.mark.parametrize("dim", [32, 40, 72])
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_whole(kind: str, dim: int) -> None:
    original, accelerated, handle = pair(kind, dim)
    for x in (feature_map(), feature_map(4, 4, 1), feature_map().to(memory_format=torch.channels_last), feature_map()[:1].expand(3, -1, -1, -1)):
        assert_right(accelerated, original, x)
    assert ran_whole(accelerated) and not handle.fallbacks


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 9)], ids=str)
@pytest.mark.parametrize("kind", ["timm v1", "timm v2", "transformers v1", "transformers v1 with stride"])
def test_maps_of_parts_of_patches(kind: str, size: tuple[int, int]) -> None:
    """Resized, and back, as each model does it."""
    original, accelerated, handle = pair(kind)
    assert_right(accelerated, original, feature_map(*size))
    assert ran_whole(accelerated) and not handle.fallbacks


@pytest.mark.parametrize("kind", ["transformers v2", "transformers v2 with stride"])
def test_maps_that_are_cut(kind: str) -> None:
    """The original drops what fills no patch, and gives it back as zeros."""
    original, accelerated, handle = pair(kind)
    for size in ((5, 7), (9, 10)):
        assert_right(accelerated, original, feature_map(*size))
    assert not handle.fallbacks


def test_what_the_original_refuses_is_refused() -> None:
    original, accelerated, _ = pair("vit_pytorch v1")
    for model in (original, accelerated):
        with pytest.raises(Exception, match="divide axis of length 7"):
            infer(model, feature_map(7, 8))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "other patches": ("timm v1", {"patch_size": 4}),
    "no fusion": ("timm v1", {"no_fusion": True}),
    "head dim 72": ("timm v1", {"dim": 72, "num_heads": 1}),
    "no bias": ("transformers v1", {"qkv_bias": False, "hidden_act": "gelu"}),
    "flat patches": ("vit_pytorch v1", {"patch_size": (2, 4)}),
    "other patches v2": ("timm v2", {"patch_size": 4}),
    "wide mlp": ("transformers v2", {"ffn_multiplier": 3, "hidden_act": "relu"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    kind, options = VARIANTS[name]
    original, accelerated, handle = pair(kind, **options)
    assert_right(accelerated, original, feature_map())
    assert ran_whole(accelerated) and not handle.fallbacks


@pytest.mark.parametrize("kind", ["timm v1", "timm v2", "transformers v2"])
def test_it_follows_its_weights(kind: str) -> None:
    """A step of training, writes in place, settings, load_state_dict, a change of dtype and back, a copy, and remove()."""
    x = feature_map()
    original, accelerated, handle = pair(kind)
    first = {name: tensor.clone() for name, tensor in original.state_dict().items()}

    def changed(change: Callable[[nn.Module], object]) -> None:
        assert_follows(change, accelerated, original, x)
        assert ran_whole(accelerated)

    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
        model.eval()

    def norm(model: nn.Module) -> Any:
        return [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)][1]

    assert_right(accelerated, original, x)
    changed(step)
    accelerated.load_state_dict(original.state_dict())
    with torch.no_grad():
        for name in dict(original.named_parameters()):
            changed(lambda model, name=name: model.get_parameter(name).mul_(1.5).add_(0.01))
    changed(lambda model: norm(model).__setattr__("eps", 0.5))
    changed(lambda model: model.load_state_dict(first))
    assert_right(copy.deepcopy(accelerated), original, x)
    assert_right(accelerated.bfloat16().float(), original.bfloat16().float(), x)
    handle.remove()
    assert type(accelerated) is type(original) and torch.equal(infer(accelerated, x), infer(original, x))


@pytest.mark.parametrize("kind", ["timm v1", "timm v2"])
def test_calls_that_are_not_for_it(kind: str) -> None:
    """Gradients, training, autocast, other dtypes, compilation: the layers one by one, and nothing to report."""
    x = feature_map()
    original, accelerated, handle = pair(kind)
    zoo.assert_same(original, accelerated, x, training=True)
    zoo.assert_same(original, accelerated, x, training=False)
    zoo.assert_same_in(torch.float16, copy.deepcopy(original), copy.deepcopy(accelerated), x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert accelerated.eval()(x).dtype == original.eval()(x).dtype
    assert not ran_whole(accelerated)
    torch.compiler.reset()
    assert_right(torch.compile(accelerated, fullgraph=True, backend="aot_eager"), original, x)
    assert not handle.fallbacks


@pytest.mark.parametrize("path", ["conv_kxk", "transformer.1.mlp.act", "transformer.0", "norm", "conv_proj"])
@pytest.mark.parametrize("kind", ["timm v1", "timm v2"])
def test_a_hook_inside_is_called(kind: str, path: str) -> None:
    x = feature_map()
    original, accelerated, _ = pair(kind)
    assert_right(accelerated, original, x)
    seen: list[torch.Size] = []
    handle = accelerated.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_right(accelerated, original, x)
    assert len(seen) == 1
    handle.remove()
    assert_right(accelerated, original, x)
    assert len(seen) == 1 and ran_whole(accelerated)


def test_layers_it_does_not_know() -> None:
    """The block is replaced as ever, and says that its layers run one by one."""
    x, model = feature_map(), timm_v2().eval()
    model.transformer[1].mlp.act = nn.Tanh()
    accelerated = copy.deepcopy(model)
    handle = vitkernels.accelerate(accelerated)
    assert handle.replaced[0].note == "runs its layers one by one: its activation is a Tanh"
    assert_right(accelerated, model, x)
    assert not handle.fallbacks
