"""Convolutions and inverted residuals in evaluation: folded, in few passes, and the original as soon as anything is to be trained."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends
from vitkernels.accuracy import compare_tensors

from .. import zoo

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


MODELS: dict[str, Callable[[], nn.Module]] = {"mobilevit": timm_v1, "mobilevitv2": timm_v2, "transformers mobilevit": transformers_v1}


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return zoo.logits(model(images))


def assert_right(model: nn.Module, original: nn.Module, images: Tensor) -> None:
    exact = run(copy.deepcopy(original).double(), images.double())
    found = compare_tensors("logits", run(model, images), run(original, images), exact)
    assert found.holds, found


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(64, 2)


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation(kind: str, images: Tensor) -> None:
    original, accelerated, handle = zoo.pair(MODELS[kind](), images)
    original.eval()
    accelerated.eval()
    folded = [record for record in handle.replaced if record.op == "inverted_bottleneck"]
    assert len(folded) >= 7 and {record.backend for record in folded} == {"native"}
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
    assert torch.equal(run(accelerated, images), run(original, images))


def test_hooks_inside_are_called(images: Tensor) -> None:
    original, accelerated, handle = zoo.pair(timm_v2(), images)
    run(accelerated.eval(), images)
    seen: list[torch.Size] = []
    accelerated.stages[0][0].conv2_kxk.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_right(accelerated, original.eval(), images)
    assert len(seen) == 1 and "hook" in handle.fallbacks["stages.0.0"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_go_through_the_original(training: bool, images: Tensor) -> None:
    original, accelerated, _ = zoo.pair(timm_v2(), images)
    zoo.assert_same(original, accelerated, images, training=training)


def test_several_threads_at_once(images: Tensor) -> None:
    """As a server calls one model: each gets what it would get alone."""
    _, accelerated, _ = zoo.pair(timm_v2(), images)
    accelerated.eval()
    batches = [images + i for i in range(4)]
    expected = [run(accelerated, batch) for batch in batches]
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def serve(i: int) -> None:
        for _ in range(3):
            found[i].append(run(accelerated, batches[i]))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found[i]) == 3 and all(torch.equal(result, expected[i]) for result in found[i]) for i in range(4))


def test_export_and_compile_see_the_original(images: Tensor) -> None:
    original, accelerated, _ = zoo.pair(timm_v2(), images)
    exported = torch.export.export(accelerated.eval(), (images,))
    assert not any("vitkernels" in str(node.target) for node in exported.graph.nodes)
    assert_right(exported.module(), original.eval(), images)
    torch.compiler.reset()
    assert_right(torch.compile(accelerated, fullgraph=True, backend="aot_eager"), original, images)


def test_another_norm_is_left_alone(images: Tensor) -> None:
    from timm.layers.conv_bn_act import ConvNormAct

    block = ConvNormAct(3, 8, 3, act_layer=nn.Tanh)
    handle = vitkernels.accelerate(block)
    assert zoo.reasons(handle) == {"": "its activation is a Tanh"}
