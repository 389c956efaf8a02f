"""Convolutions, inverted residuals and MLPs in evaluation: folded, in few passes, and the original as soon as anything is to be trained."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends
from vitkernels.integrations.folded import left_to_pytorch

from .. import zoo
from ..zoo import assert_follows, assert_right, infer

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not("inverted_bottleneck", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]


def timm_v1() -> nn.Module:
    return zoo.timm_model("mobilevit_xxs")


def timm_v2() -> nn.Module:
    return zoo.timm_model("mobilevitv2_050")


def transformers_v1() -> nn.Module:
    from transformers import MobileViTConfig, MobileViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "expand_ratio": 2.0, "num_labels": 10}
    return MobileViTForImageClassification(MobileViTConfig(**sizes))


def vit_pytorch_v1() -> nn.Module:
    from vit_pytorch.mobile_vit import MobileViT

    torch.manual_seed(0)
    return MobileViT((64, 64), [64, 80, 96], [16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 320], num_classes=10, expansion=2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mobilevit": timm_v1,
    "mobilevitv2": timm_v2,
    "transformers mobilevit": transformers_v1,
    "vit_pytorch mobilevit": vit_pytorch_v1,
}


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(64, 2)


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation(kind: str, images: Tensor) -> None:
    original, accelerated, handle = zoo.pair(MODELS[kind](), images)
    original.eval()
    accelerated.eval()
    folded = [record for record in handle.replaced if record.op in ("inverted_bottleneck", "batch_norm_act")]
    assert len(folded) >= 7 and {record.op for record in folded} == {"inverted_bottleneck", "batch_norm_act"}
    assert {record.backend for record in folded} == {"native"}
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)
    assert not handle.fallbacks


@pytest.mark.parametrize("channels", [48, 160, 480])
def test_long_sums(channels: int) -> None:
    """A dense 3x3 convolution sums up to thousands of products; in one chain, as oneDNN does of a channels_last map, that breaks the rule."""
    from timm.layers import ConvNormAct

    torch.manual_seed(0)
    original = ConvNormAct(channels, 80, 3, act_layer=nn.SiLU).eval()
    accelerated = copy.deepcopy(original)
    assert vitkernels.accelerate(accelerated).replaced
    assert_right(accelerated, original, torch.randn(2, channels, 12, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, images: Tensor) -> None:
    original, accelerated, _ = zoo.pair(timm_v1(), images)
    models = (original.to(dtype), accelerated.to(dtype))
    zoo.assert_same(*models, images.to(dtype), training=False, measure=zoo.inference)


def test_what_is_kept_follows_the_weights(images: Tensor) -> None:
    """Evaluation, training, evaluation again, a write in place, load_state_dict, a change of dtype and back, a copy, and remove()."""
    original, accelerated, handle = zoo.pair(timm_v2(), images)
    first = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    assert_right(accelerated.eval(), original.eval(), images)
    for model in (original, accelerated):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
        zoo.logits(model(images)).square().mean().backward()
        optimizer.step()
        model.eval()
    assert not torch.equal(accelerated.state_dict()["stem.bn.running_mean"], first["stem.bn.running_mean"])
    accelerated.load_state_dict(original.state_dict())
    assert_right(accelerated, original, images)
    for model in (original, accelerated):
        with torch.no_grad():
            model.stem.conv.weight.mul_(1.5)
            model.stages[0][0].conv2_kxk.bn.running_var.mul_(2.0)
    assert_right(accelerated, original, images)
    for model in (original, accelerated):
        model.load_state_dict(first)
    assert_right(accelerated, original, images)
    assert_right(copy.deepcopy(accelerated), original, images)
    assert_right(accelerated.bfloat16().float(), original.bfloat16().float(), images)
    handle.remove()
    assert torch.equal(infer(accelerated, images), infer(original, images))


def test_hooks_inside_are_called(images: Tensor) -> None:
    original, accelerated, handle = zoo.pair(timm_v2(), images)
    infer(accelerated.eval(), images)
    seen: list[torch.Size] = []
    accelerated.stages[0][0].conv2_kxk.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_right(accelerated, original.eval(), images)
    assert len(seen) == 1 and "hook" in handle.fallbacks["stages.0.0"]


def test_gradients_in_evaluation_go_through_the_original(images: Tensor) -> None:
    original, accelerated, _ = zoo.pair(timm_v2(), images)
    zoo.assert_same(original, accelerated, images, training=False)


def test_several_threads_at_once(images: Tensor) -> None:
    """As a server calls one model: each gets what it would get alone."""
    _, accelerated, _ = zoo.pair(timm_v2(), images)
    accelerated.eval()
    batches = [images + i for i in range(4)]
    expected = [infer(accelerated, batch) for batch in batches]
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def serve(i: int) -> None:
        for _ in range(3):
            found[i].append(infer(accelerated, batches[i]))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found[i]) == 3 and all(torch.equal(result, expected[i]) for result in found[i]) for i in range(4))


def test_export_and_compile_see_the_original() -> None:
    x = torch.randn(2, 32, 8, 8)
    original, accelerated, handle = zoo.pair(zoo.timm_block(), x)
    assert {"batch_norm_act", "separable_self_attention"} <= {record.op for record in handle.replaced}
    exported = torch.export.export(accelerated.eval(), (x,))
    assert not any("vitkernels" in str(node.target) for node in exported.graph.nodes)
    assert_right(exported.module(), original.eval(), x)
    torch.compiler.reset()
    assert_right(torch.compile(accelerated, fullgraph=True, backend="aot_eager"), original, x)


def test_another_norm_is_left_alone(images: Tensor) -> None:
    from timm.layers.conv_bn_act import ConvNormAct

    block = ConvNormAct(3, 8, 3, act_layer=nn.Tanh)
    handle = vitkernels.accelerate(block)
    assert zoo.reasons(handle) == {"": "its activation is a Tanh"}


# --- MLPs ----------------------------------------------------------------------------------------------------------------------------


def feed_forward(kind: str, *args: Any) -> nn.Module:
    """The MLP of a zoo, of tokens of 24 channels, moved away from its initial values."""
    zoo_module = importlib.import_module("timm.layers.mlp" if kind == "timm" else f"vit_pytorch.{kind}")
    torch.manual_seed(0)
    return zoo.settle((zoo_module.Mlp if kind == "timm" else zoo_module.FeedForward)(24, 50, *args), torch.randn(2, 5, 24)).eval()


def transformer(kind: str) -> nn.Module:
    """A small ViT, of two layers."""
    torch.manual_seed(0)
    if kind == "timm":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=64, patch_size=16, num_classes=10, embed_dim=48, depth=2, num_heads=3, init_values=0.1)
    zoo_module = importlib.import_module(f"vit_pytorch.{kind}")
    model = {"vit": "ViT", "simple_vit": "SimpleViT", "deepvit": "DeepViT"}[kind]
    small = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 72, "dim_head": 16}
    return getattr(zoo_module, model)(**small)


@pytest.mark.parametrize("kind", ["timm", "vit", "simple_vit", "deepvit"])
def test_the_mlps_of_a_transformer(kind: str, images: Tensor) -> None:
    original, accelerated, handle = zoo.pair(transformer(kind), images, only=["Mlp", "FeedForward"])
    assert [record.op for record in handle.replaced] == ["inverted_bottleneck"] * 2
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)
    zoo.assert_same(original, accelerated, images, training=True)
    assert not handle.fallbacks


@pytest.mark.parametrize("kind", ["timm", "vit", "mobile_vit"])
def test_tokens_in_any_arrangement(kind: str) -> None:
    original = feed_forward(kind)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    rows = [torch.randn(*shape, 24) for shape in [(7,), (2, 5), (0, 5), (2, 3, 4, 5)]]
    for x in (*rows, torch.randn(2, 24, 5).mT, torch.randn(2, 5, 48)[..., ::2], torch.randn(5, 24).expand(3, 5, 24)):
        assert_right(accelerated, original, x)
        assert infer(accelerated, x).is_contiguous()
    assert not handle.fallbacks
    for model in (original, accelerated):
        with pytest.raises(RuntimeError, match=r"mat1 and mat2|normalized_shape"):
            infer(model, torch.randn(2, 5, 25))


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_an_mlp_follows_its_weights(kind: str) -> None:
    """A step of training, writes in place, settings, a copy, and remove()."""
    x = torch.randn(2, 5, 24)
    original = feed_forward(kind)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)

    def changed(change: Callable[[nn.Module], object]) -> None:
        assert_follows(change, accelerated, original, x)

    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        model.eval()

    def place_of(model: nn.Module, kind: type[nn.Module]) -> tuple[nn.Module, str]:
        return next((parent, name) for parent in model.modules() for name, child in parent.named_children() if isinstance(child, kind))

    def first(model: nn.Module, kind: type[nn.Module]) -> Any:
        return next(module for module in model.modules() if isinstance(module, kind))

    assert_right(accelerated, original, x)
    changed(step)
    changed(lambda model: first(model, nn.Linear).weight.detach().mul_(1.5))
    changed(lambda model: first(model, nn.Linear).bias.detach().mul_(-2))
    if kind == "vit":
        changed(lambda model: setattr(first(model, nn.LayerNorm), "eps", 0.5))
    assert not handle.fallbacks
    assert_right(copy.deepcopy(accelerated), original, x)
    changed(lambda model: setattr(first(model, nn.GELU), "approximate", "tanh"))
    assert not handle.fallbacks
    changed(lambda model: setattr(*place_of(model, nn.GELU), nn.Mish()))
    assert handle.fallbacks == {"": "its activation is a Mish"}
    handle.remove()
    assert type(accelerated) is type(original) and torch.equal(infer(accelerated, x), infer(original, x))


def test_a_hook_inside_an_mlp_is_called() -> None:
    x, original = torch.randn(2, 5, 24), feed_forward("vit")
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    infer(accelerated, x)
    seen: list[torch.Size] = []
    accelerated.net[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert torch.equal(infer(accelerated, x), infer(original, x))
    assert seen == [(2, 5, 50)] and "hook" in handle.fallbacks[""]


LEFT = [dtype for dtype in (torch.bfloat16, torch.float16, torch.float64) if left_to_pytorch(dtype) is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_mlp_in_16_bits(dtype: torch.dtype) -> None:
    if dtype in LEFT:
        pytest.skip("PyTorch's own has products in 16 bits, and the kernels have not")
    x, original = torch.randn(2, 5, 24, dtype=dtype), feed_forward("vit").to(dtype)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    assert len(handle.replaced) == 1
    assert_right(accelerated, original, x)
    assert not torch.equal(infer(accelerated, x), infer(original, x)) and not handle.fallbacks


@pytest.mark.parametrize("dtype", LEFT, ids=str)
def test_mlps_of_other_dtypes_are_pytorchs(dtype: torch.dtype) -> None:
    x, original = torch.randn(2, 5, 24, dtype=dtype), feed_forward("vit")
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    assert torch.equal(infer(accelerated.to(dtype), x), infer(original.to(dtype), x))
    assert str(dtype) in handle.fallbacks[""] and str(dtype) in zoo.reasons(vitkernels.accelerate(original))[""]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_conv": True}, "a Conv2d stands where a plain Linear should"),
        ({"norm_layer": nn.LayerNorm}, "it has a LayerNorm in between"),
        ({"act_layer": nn.Tanh}, "its activation is a Tanh"),
    ],
    ids=["convolutions", "norm", "activation"],
)
def test_another_mlp_is_left_alone(options: dict[str, Any], words: str) -> None:
    from timm.layers import Mlp

    assert zoo.reasons(vitkernels.accelerate(Mlp(24, 50, **options))) == {"": words}
