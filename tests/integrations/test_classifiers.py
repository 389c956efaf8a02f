"""Classifiers whose head reads the first tokens: the last block makes no others, unless somebody looks at them."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends
from vitkernels.integrations import classifiers
from vitkernels.ops.blocks import op

from .. import zoo
from ..zoo import assert_follows, assert_right, infer, reasons

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not("inverted_bottleneck", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]


def timm(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 40, "depth": 3, "num_heads": 5, **options})


def vit_pytorch(kind: str, **options: Any) -> nn.Module:
    size = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 40, "depth": 3, "heads": 3, "dim_head": 12, "mlp_dim": 50}
    return getattr(importlib.import_module(f"vit_pytorch.{kind.lower()}"), kind)(**{**size, **options})


def transformers(name: str, **options: Any) -> nn.Module:
    import transformers as package

    small = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 50, "image_size": 32, "patch_size": 8}
    config = getattr(package, f"{name.partition('For')[0]}Config")(**{**small, "num_labels": 10, **options})
    return getattr(package, name)(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm,
    "timm, registers, one scale": lambda: timm(reg_tokens=2, init_values=0.3, qk_norm=True, norm_layer="layernorm"),
    "ViT": lambda: vit_pytorch("ViT"),
    "DeepViT": lambda: vit_pytorch("DeepViT"),
    "ViTForImageClassification": lambda: transformers("ViTForImageClassification"),
    "DeiTForImageClassification": lambda: transformers("DeiTForImageClassification"),
    "DeiTForImageClassificationWithTeacher": lambda: transformers("DeiTForImageClassificationWithTeacher"),
}
ALL_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "timm, mean": lambda: timm(global_pool="avg", class_token=False),
    "timm, attention": lambda: timm(global_pool="map"),
    "ViT, mean": lambda: vit_pytorch("ViT", pool="mean"),
    "ViT, no head": lambda: vit_pytorch("ViT", num_classes=0),
    "DeepViT, mean": lambda: vit_pytorch("DeepViT", pool="mean"),
}


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    torch.manual_seed(0)
    original, accelerated, handle = zoo.pair(make(), zoo.photos(32))
    return original.eval(), accelerated.eval(), handle


def reading_of(model: Any) -> classifiers.Reading:
    return classifiers.match(model)._vk_reads(model)  # type: ignore[union-attr, attr-defined, no-any-return]


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every call of the op so far, how many tokens it returned."""
    seen: list[int] = []
    run = op.run

    def watched(*args: Any) -> Tensor:
        y = run(*args)
        seen.append(y.shape[-1])
        return y

    monkeypatch.setattr(op, "run", watched)
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_block_makes_the_first_tokens_alone(kind: str, tokens: list[int]) -> None:
    original, accelerated, handle = pair(MODELS[kind])
    record = next(r for r in handle.replaced if r.path == "")
    assert record.op == "transformer_blocks" and "the head reads" in record.note and not handle.skipped
    assert type(accelerated).__name__ == type(original).__name__
    images = zoo.photos(32)
    assert_right(accelerated, original, images)
    assert tokens == [2 if "Teacher" in kind else 1] and not handle.fallbacks
    assert_right(accelerated, original, images[:1])
    handle.remove()
    assert [type(m) for m in accelerated.modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize("kind", ALL_TOKENS)
def test_a_model_that_reads_all_is_none(kind: str, tokens: list[int]) -> None:
    model = ALL_TOKENS[kind]().eval()
    images, expected = zoo.photos(32), infer(model, zoo.photos(32))
    handle = vitkernels.accelerate(model)
    assert not isinstance(model, classifiers.Classifier) and "" not in reasons(handle)
    torch.testing.assert_close(infer(model, images), expected, rtol=1e-4, atol=1e-4)
    assert tokens in ([16], [17])


@pytest.mark.parametrize("kind", MODELS)
def test_who_looks_at_the_tokens_sees_all(kind: str, tokens: list[int]) -> None:
    original, accelerated, _ = pair(MODELS[kind])
    images = zoo.photos(32)
    reading = reading_of(accelerated)
    for module in (reading.blocks, *reading.behind):
        seen: list[Any] = []
        hook = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        tokens.clear()
        assert_right(accelerated, original, images)
        assert tokens[0] > 2 and len(seen) == 1
        hook.remove()
        tokens.clear()
        infer(accelerated, images)
        assert tokens[0] <= 2


def test_timm_s_features_have_all_tokens() -> None:
    original, accelerated, _ = pair(MODELS["timm"])
    images: Any = zoo.photos(32)
    infer(accelerated, images)
    for name in ("forward_features", "forward_intermediates"):
        with torch.no_grad():
            ours, theirs = (getattr(model, name)(images) for model in (accelerated, original))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_another_head_is_read_as_it_reads(tokens: list[int]) -> None:
    original, accelerated, _ = pair(MODELS["timm"])
    images = zoo.photos(32)
    infer(accelerated, images)
    for model in (original, accelerated):
        torch.manual_seed(1)
        model.reset_classifier(10, "avg")
    assert_right(accelerated, original, images)
    assert tokens[-1] == 17
    accelerated.global_pool = original.global_pool = "token"
    expected = infer(original, images)
    for name in ("forward_features", "forward_head", "pool"):
        setattr(accelerated, name, getattr(accelerated, name))  # whatever it computes, on an instance it is somebody's own
        torch.testing.assert_close(infer(accelerated, images), expected, rtol=1e-4, atol=1e-4)
        assert tokens[-1] == 17
        delattr(accelerated, name)
    infer(accelerated, images)
    assert tokens[-1] == 1


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_what_transformers_records_is_of_all_tokens(kind: str) -> None:
    original, accelerated, _ = pair(MODELS[kind])
    images = zoo.photos(32)
    infer(accelerated, images)
    with torch.no_grad():
        ours, theirs = (model(images, output_hidden_states=True, labels=torch.tensor([1, 2])) for model in (accelerated, original))
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert [h.shape for h in ours.hidden_states] == [h.shape for h in theirs.hidden_states]


def scale_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize("kind", ["timm", "DeepViT", "ViTForImageClassification"])
def test_weights_training_copies_callers(kind: str) -> None:
    original, accelerated, _ = pair(MODELS[kind])
    images = zoo.photos(32)
    zoo.assert_same(original, accelerated, images, training=True)
    assert_follows(scale_weights, accelerated.eval(), original.eval(), images)
    expected = infer(accelerated, images)
    for twin in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert torch.equal(infer(twin, images), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: infer(accelerated, images), range(8)))


def test_blocks_that_are_left_alone() -> None:
    model = timm()
    assert reasons(vitkernels.accelerate(model, skip="blocks", dry_run=True))[""] == "its blocks are not replaced"
    model.norm.register_forward_hook(lambda *_: None)
    assert "a module behind its blocks has a hook" in reasons(vitkernels.accelerate(model, dry_run=True))[""]


def test_compile_and_export_see_the_original() -> None:
    original, accelerated, _ = pair(MODELS["timm"])
    images = zoo.photos(32)
    exported = torch.export.export(accelerated, (images,))
    assert not any("vitkernels" in str(node.target) for node in exported.graph.nodes)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(accelerated, fullgraph=True, backend="aot_eager")(images), original(images))
