"""Convolutions with live norms, in training: in channels_last, each norm and the activation behind it in one op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends
from vitkernels.nn import _live

from .. import zoo
from .test_folded import MODELS

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not("batch_norm_act", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(64, 2)


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that the op was called on."""
    shapes: list[torch.Size] = []
    run = _live._normalised

    def spy(norm: nn.BatchNorm2d, activation: str, y: Tensor) -> Tensor:
        shapes.append(y.shape)
        return run(norm, activation, y)

    monkeypatch.setattr(_live, "_normalised", spy)
    return shapes


def conv_norm_act(**options: Any) -> Any:
    """timm's, of 12 channels, moved away from its initial values."""
    from timm.layers import ConvNormAct

    torch.manual_seed(0)
    return zoo.settle(ConvNormAct(12, 24, 3, **{"act_layer": nn.SiLU, **options}), torch.randn(2, 12, 9, 9))


def pair(layer: nn.Module) -> tuple[Any, Any, vitkernels.Handle]:
    """It as it is, and accelerated, in training."""
    fast = copy.deepcopy(layer)
    handle = vitkernels.accelerate(fast)
    return layer.train(), fast.train(), handle


@pytest.mark.parametrize("kind", MODELS)
def test_training(kind: str, images: Tensor, normalised: list[torch.Size]) -> None:
    """Three steps: every gradient, every parameter, every running statistic."""
    original, accelerated, handle = zoo.pair(MODELS[kind](), images)
    zoo.assert_same(original, accelerated, images, training=True, measure=zoo.trained)
    accelerated.train()
    normalised.clear()
    accelerated(images)
    norms = sum(type(module) is nn.BatchNorm2d or "BatchNormAct2d" in type(module).__name__ for module in accelerated.modules())
    assert len(normalised) == norms - 2 * kind.startswith("vit_pytorch")  # whose stem and last convolution stand in no block
    assert not any("random numbers" not in reason for reason in handle.fallbacks.values())  # of dropout in a transformer


@pytest.mark.parametrize("kind", ["mobilevit", "mobilevitv2"])
def test_autocast(kind: str, images: Tensor, normalised: list[torch.Size]) -> None:
    original, accelerated, _ = zoo.pair(MODELS[kind](), images)
    zoo.assert_same_under_autocast(original, accelerated, images)
    assert normalised


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, None], ids=["silu", "relu", "none"])
def test_layer(dtype: torch.dtype, activation: type[nn.Module] | None, normalised: list[torch.Size]) -> None:
    options = {"apply_act": False} if activation is None else {"act_layer": activation}
    original, fast, _ = pair(conv_norm_act(**options))
    x = torch.randn(3, 12, 10, 11)
    zoo.assert_same(original, fast, x, training=True, measure=zoo.trained)
    zoo.assert_same(original.to(dtype), fast.to(dtype), x.to(dtype), training=True)
    assert normalised


def test_gradient_of_the_input(normalised: list[torch.Size]) -> None:
    original, fast, _ = pair(conv_norm_act(stride=2, groups=4))
    x = torch.randn(3, 12, 10, 11)
    grad = torch.randn(3, 24, 5, 6)
    exact = torch.autograd.grad(copy.deepcopy(original).double()(leaf := x.double().requires_grad_()), leaf, grad.double())[0]
    eager, ours = (torch.autograd.grad(layer(leaf := x.clone().requires_grad_()), leaf, grad)[0] for layer in (original, fast))
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
    assert len(normalised) == 1


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_running_statistics(momentum: float | None, normalised: list[torch.Size]) -> None:
    """Also without gradients: how people calibrate the norms of a model."""
    original, fast, _ = pair(conv_norm_act())
    for layer in (original, fast):
        layer.bn.momentum = momentum
        with torch.no_grad():
            for i in range(3):
                layer(torch.randn(2, 12, 7, 7, generator=torch.Generator().manual_seed(i)))
    assert len(normalised) == 3
    for name, expected in original.bn.named_buffers():
        torch.testing.assert_close(getattr(fast.bn, name), expected, rtol=1e-6, atol=1e-6)


def test_less_is_saved_for_the_backward() -> None:
    """The map in front of the norm and the one behind the activation; PyTorch keeps a third, between the two."""
    original, fast, _ = pair(conv_norm_act())
    x = torch.randn(4, 12, 32, 32)
    one = 4 * 24 * 32 * 32 * 4
    assert zoo.saved_bytes(original, x) - zoo.saved_bytes(fast, x.contiguous(memory_format=torch.channels_last)) > 0.9 * one


@pytest.mark.parametrize("child", ["conv", "bn", "bn.act"])
def test_hooks_inside_are_called(child: str, normalised: list[torch.Size]) -> None:
    original, fast, handle = pair(conv_norm_act())
    seen: list[torch.Size] = []
    hook = fast.get_submodule(child).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = torch.randn(2, 12, 9, 9)
    assert torch.equal(fast(x), original(x))
    assert len(seen) == 1 and not normalised and "hook" in handle.fallbacks[""]
    hook.remove()
    fast(x)
    assert len(seen) == 1 and len(normalised) == 1


def test_frozen_norms_run_the_original(normalised: list[torch.Size]) -> None:
    original, fast, handle = pair(conv_norm_act())
    for layer in (original, fast):
        layer.bn.eval()
    x = torch.randn(2, 12, 9, 9)
    assert torch.equal(fast(x), original(x))
    assert not normalised and "frozen" in handle.fallbacks[""]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: nn.SyncBatchNorm.convert_sync_batchnorm(layer), "norm"),
        (lambda layer: setattr(layer.bn, "act", nn.Tanh()), "Tanh"),
        (lambda layer: setattr(layer.bn, "track_running_stats", False), "running statistics"),
    ],
    ids=["SyncBatchNorm", "Tanh", "no running statistics"],
)
def test_left_alone(change: Callable[[Any], object], reason: str) -> None:
    layer = conv_norm_act()
    change(layer)
    handle = vitkernels.accelerate(layer)
    assert not handle.replaced and reason in zoo.reasons(handle)[""]


def test_an_activation_that_only_evaluation_knows(normalised: list[torch.Size]) -> None:
    original, fast, handle = pair(conv_norm_act(act_layer=nn.GELU))
    x = torch.randn(2, 12, 9, 9)
    assert torch.equal(fast(x), original(x))
    assert not normalised and "gelu" in handle.fallbacks[""]
    zoo.assert_right(fast.eval(), original.eval(), x)


def test_one_value_a_channel_is_refused_as_before() -> None:
    original, fast, _ = pair(conv_norm_act())
    messages = []
    for layer in (original, fast):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            layer(torch.randn(1, 12, 1, 1))
        messages.append(str(error.value))
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers() if "tracked" not in name)
    assert messages[0] == messages[1]


def test_remove_brings_the_original_back(images: Tensor, normalised: list[torch.Size]) -> None:
    original, accelerated, handle = zoo.pair(MODELS["vit_pytorch mobilevit"](), images)
    accelerated.train()(images)
    assert normalised
    handle.remove()
    normalised.clear()
    accelerated.load_state_dict(original.state_dict())
    assert torch.equal(accelerated.train()(images), original.train()(images)) and not normalised
    assert {type(a) for a in accelerated.modules()} == {type(b) for b in original.modules()}
