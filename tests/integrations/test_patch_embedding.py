"""Patch embeddings in evaluation, and the original as soon as anything else is wanted."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
    pytest.mark.skipif(backends.why_not("patch_embedding", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]
OP = "patch_embedding"


def convolution() -> nn.Module:
    return nn.Conv2d(3, 20, (8, 10), (8, 10))


def sequence() -> nn.Module:
    from vit_pytorch import ViT

    return ViT(image_size=(32, 40), patch_size=(8, 10), num_classes=3, dim=20, depth=1, heads=1, mlp_dim=8).to_patch_embedding


KINDS: dict[str, Callable[[], nn.Module]] = {"convolution": convolution, "sequence": sequence}


@pytest.fixture(params=KINDS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return zoo.settle(KINDS[request.param](), torch.randn(2, 3, 32, 40)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def test_right_and_reversible(layer: nn.Module, images: Tensor) -> None:
    original, accelerated, handle = zoo.pair(layer, images)
    assert [record.op for record in handle.replaced] == [OP] and not handle.skipped
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)
    zoo.assert_same(original, accelerated, images, training=True)
    for x in (images.contiguous(memory_format=torch.channels_last), images[..., :16, :20], images[:0], images.expand(2, 3, 32, 40)[:1]):
        assert_right(accelerated.eval(), original.eval(), x)
    assert not handle.fallbacks
    assert_right(copy.deepcopy(accelerated), original, images)
    handle.remove()
    assert type(accelerated) is type(original) and torch.equal(infer(accelerated, images), infer(original, images))


def test_what_the_original_refuses(layer: nn.Module, images: Tensor) -> None:
    original, accelerated, _ = zoo.pair(layer, images)
    for model in (original.eval(), accelerated.eval()):
        with pytest.raises(Exception, match=r"channels|normalized_shape"):
            infer(model, images[:, :2])
        with pytest.raises(Exception, match=r"Kernel size|can't divide"):
            infer(model, images[..., :7])


def test_what_is_left_over(images: Tensor) -> None:
    """A convolution leaves the rest of an image out, einops refuses it."""
    torch.manual_seed(0)
    original, accelerated, handle = zoo.pair(convolution(), images)
    assert_right(accelerated.eval(), original.eval(), images[..., :31, :39])
    assert not handle.fallbacks
    _, accelerated, _ = zoo.pair(sequence(), images)
    with pytest.raises(Exception, match="divi"):
        infer(accelerated.eval(), images[..., :31, :39])


def test_follows_its_weights(layer: nn.Module, images: Tensor) -> None:
    original, accelerated = layer, copy.deepcopy(layer)
    handle = vitkernels.accelerate(accelerated)

    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        model(images).square().mean().backward()
        optimizer.step()
        model.eval()

    def first(model: nn.Module) -> nn.Module:
        return next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))

    assert_right(accelerated, original, images)
    assert_follows(step, accelerated, original, images)
    assert_follows(lambda model: first(model).weight.detach().mul_(1.5), accelerated, original, images)
    assert not handle.fallbacks
    seen: list[torch.Size] = []
    if first(accelerated) is not accelerated:
        first(accelerated).register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert_right(accelerated, original, images)
        assert len(seen) == 1 and "hook" in handle.fallbacks[""]


def test_a_convolution_that_is_changed(images: Tensor) -> None:
    torch.manual_seed(0)
    original, accelerated, handle = zoo.pair(convolution(), images)
    for model in (original.eval(), accelerated.eval()):
        infer(model, images)
        model.stride = (4, 5)
    assert_right(accelerated, original, images)
    assert handle.fallbacks == {"": "it is no convolution of patches side by side any more"}


def test_other_convolutions_are_unknown() -> None:
    for other in (
        nn.Conv2d(3, 8, 8, 4),
        nn.Conv2d(3, 8, 8, 8, padding=1),
        nn.Conv2d(3, 8, 8, 8, dilation=2),
        nn.Conv2d(3, 9, 8, 8, groups=3),
        nn.Conv2d(3, 8, 2, 2),  # PyTorch's own is as fast
    ):
        assert not vitkernels.accelerate(other).replaced


def test_a_slice_of_the_sequence(images: Tensor) -> None:
    """Masked autoencoders take the layers behind the Rearrange, as a Sequential of the same class."""
    torch.manual_seed(0)
    original, accelerated, _ = zoo.pair(sequence(), images)
    patches = original.eval()[0](images)
    assert_right(accelerated.eval()[1:], original[1:], patches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(layer: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    """Unless PyTorch's own has products in 16 bits and the kernels have not, which then is said to be why."""
    original = layer.to(dtype)
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    if left_to_pytorch(dtype) is not None:
        assert "left to PyTorch" in handle.skipped[0].reason
    else:
        assert [record.op for record in handle.replaced] == [OP]
        zoo.assert_same(original, accelerated, images.to(dtype), training=False, measure=zoo.inference)
        assert not handle.fallbacks


@pytest.mark.parametrize("name", ["transformers", "timm"])
def test_inside_of_models(name: str) -> None:
    torch.manual_seed(0)
    if name == "timm":
        from timm.models.vision_transformer import VisionTransformer

        model: nn.Module = VisionTransformer(img_size=48, patch_size=16, num_classes=10, embed_dim=48, depth=1, num_heads=3)
    else:
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
        model = ViTForImageClassification(ViTConfig(image_size=48, patch_size=16, **sizes))
    x = torch.randn(2, 3, 48, 48)
    original, accelerated, handle = zoo.pair(model, x)
    assert OP in {record.op for record in handle.replaced}
    assert_right(accelerated.eval(), original.eval(), x)
    assert not handle.fallbacks
    exported = torch.export.export(accelerated, (x,))
    assert not any("vitkernels" in str(node.target) for node in exported.graph.nodes)
