"""Whole EfficientViTs in inference: as one chain where they can be, as they were where they cannot, and never with stale weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import native
from vitkernels.nn import _chain

from .. import zoo
from ..zoo import infer

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))]
MAKERS: dict[str, Callable[[], nn.Module]] = {"timm": zoo.small_efficientvit, "authors": zoo.cream_efficientvit}


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(128)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every chain that runs: by the number of its layers' records."""
    calls: list[int] = []
    run = _chain.op.run
    monkeypatch.setattr(_chain.op, "run", lambda x, packed: calls.append(len(packed.program)) or run(x, packed))
    return calls


def pair(model: nn.Module, images: Tensor, **options: Any) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    original = zoo.settle(model, images).eval()
    accelerated = copy.deepcopy(original)
    return original, accelerated, vitkernels.accelerate(accelerated, **options)


def assert_infers_the_same(original: nn.Module, accelerated: nn.Module, images: Tensor) -> None:
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)


@pytest.mark.parametrize(
    ("maker", "dtype"),
    [("timm", torch.float64), ("timm", torch.float32), ("timm", torch.bfloat16), ("timm", torch.float16), ("authors", torch.float32)],
    ids=str,
)
def test_one_call(maker: str, dtype: torch.dtype, images: Tensor, runs: list[int]) -> None:
    original, accelerated, handle = pair(MAKERS[maker](), images)
    assert [r.op for r in handle.replaced if r.path == ""] == ["layer_chain"]
    infer(accelerated.to(dtype), images.to(dtype))
    assert len(runs) == 1 and not handle.fallbacks
    if dtype is torch.float64:
        torch.testing.assert_close(infer(accelerated, images.double()), infer(original.double(), images.double()))
    else:
        assert_infers_the_same(original.to(dtype), accelerated, images.to(dtype))


@pytest.mark.parametrize(("batch", "size"), [(3, 250), (1, (192, 256)), (3, (128, 160))], ids=str)
def test_other_sizes(size: int | tuple[int, int], batch: int, runs: list[int]) -> None:
    images = zoo.photos(size, batch)
    original, accelerated, handle = pair(zoo.small_efficientvit(), zoo.photos(128))
    assert_infers_the_same(original, accelerated, images)
    assert runs and not handle.fallbacks


def test_memory_formats_and_an_empty_batch(images: Tensor) -> None:
    _, accelerated, handle = pair(zoo.small_efficientvit(), images)
    expected = infer(accelerated, images)
    assert torch.equal(infer(accelerated, images.to(memory_format=torch.channels_last)), expected)
    assert infer(accelerated, images[:0]).shape == (0, 10) and not handle.fallbacks
    with torch.no_grad():
        features = accelerated.forward_features(images)
    assert features.is_contiguous()


def test_norms_kept_in_float32(images: Tensor, runs: list[int]) -> None:
    original, accelerated, _ = pair(zoo.small_efficientvit(), images)
    for model in (original, accelerated):
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    assert_infers_the_same(original, accelerated, images.bfloat16())
    assert runs


def test_stages_by_themselves(images: Tensor, runs: list[int]) -> None:
    original, accelerated, _ = pair(zoo.small_efficientvit(), images)
    with torch.no_grad():
        for ours, theirs in zip(accelerated.forward_intermediates(images)[1], original.forward_intermediates(images)[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert len(runs) == 4  # the patch embedding and three stages


@pytest.mark.parametrize("maker", MAKERS)
def test_trained_between_evaluations(maker: str, images: Tensor, runs: list[int]) -> None:
    """Training is as it was, and what follows sees the new weights and statistics."""
    original, accelerated, handle = pair(MAKERS[maker](), images)
    for _ in range(2):
        infer(accelerated, images)
        chains = len(runs)
        for model in (original, accelerated):
            optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
            torch.manual_seed(0)
            model(images).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert len(runs) == chains
        original.load_state_dict(accelerated.state_dict())
        for model in (original, accelerated):
            model.train().eval()  # the original keeps its gathered bias otherwise
        assert_infers_the_same(original, accelerated, images)
        assert len(runs) > chains
    assert not handle.fallbacks


def test_gradients_in_evaluation_are_the_originals(images: Tensor, runs: list[int]) -> None:
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    zoo.assert_same(original, accelerated, images, training=False)
    assert not runs and not handle.fallbacks


def _write(model: Any) -> None:
    with torch.no_grad():
        model.stages[1].downsample.patchmerge.se.fc1.bias.add_(0.5)


def _load(model: Any) -> None:
    model.load_state_dict({name: value * 1.25 if value.is_floating_point() else value for name, value in model.state_dict().items()})


def _data(model: Any) -> None:
    model.patch_embed.conv1.conv.weight.data = model.patch_embed.conv1.conv.weight.data * 2


def _statistics(model: Any) -> None:
    model.stages[2].blocks[0].dw1.m.bn.running_mean.add_(0.5)


def _scale(model: Any) -> None:
    model.stages[0].blocks[0].mixer.m.attn.scale *= 3


def _eps(model: Any) -> None:
    model.stages[0].blocks[0].ffn0.m.pw1.bn.eps = 0.5


def _module(model: Any) -> None:
    torch.manual_seed(3)
    block = model.stages[1].blocks[0]
    block.ffn1.m.pw2 = type(block.ffn1.m.pw2)(96, 48).eval()


def _head_weight(model: Any) -> None:
    with torch.no_grad():
        model.head.linear.weight.mul_(1.5)


def _head_statistics(model: Any) -> None:
    model.head.bn.running_mean.add_(0.5)


def _head_eps(model: Any) -> None:
    model.head.bn.eps = 5.0


def _head_module(model: Any) -> None:
    torch.manual_seed(3)
    model.head = nn.Linear(model.head.linear.in_features, 10, bias=False)


_STALE = (_write, _load, _data, _statistics, _scale, _eps, _module, _head_weight, _head_statistics, _head_eps, _head_module)


@pytest.mark.parametrize("change", _STALE, ids=lambda f: f.__name__.strip("_"))
def test_never_stale(change: Callable[[Any], None], images: Tensor, runs: list[int]) -> None:
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    before = infer(accelerated, images)
    for model in (original, accelerated):
        change(model)
        model.train().eval()  # the original keeps its gathered bias otherwise
    assert not torch.allclose(infer(accelerated, images), before, rtol=1e-4)
    assert_infers_the_same(original, accelerated, images)
    assert not handle.fallbacks and len(runs) > 2


def _hooked_head(model: Any) -> None:
    model.head.linear.register_forward_hook(lambda module, args, output: output * 2)


def _hooked_pool(model: Any) -> None:
    model.global_pool.flatten.register_forward_hook(lambda module, args, output: output * 2)


def _largest(model: Any) -> None:
    model.global_pool.pool = nn.AdaptiveMaxPool2d(1)


def _dropping_head(model: Any) -> None:
    model.head.drop.p = 0.5
    model.head.drop.train()


def _norm_in_training(model: Any) -> None:
    model.head.bn.train()


def _longer_head(model: Any) -> None:
    model.head.add_module("end", nn.ReLU())


def _own_head(model: Any) -> None:
    model.forward_head = lambda x: x.amax((2, 3))


_HEADS = (_hooked_head, _hooked_pool, _largest, _dropping_head, _norm_in_training, _longer_head, _own_head)


@pytest.mark.parametrize("change", _HEADS, ids=lambda f: f.__name__.strip("_"))
def test_another_head_is_called(change: Callable[[Any], None], images: Tensor, runs: list[int]) -> None:
    """Behind the chain, which ends before it then. With the head the chain is longer by two layers."""
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    whole = infer(accelerated, images)
    for model in (original, accelerated):
        change(model)
    outputs = []
    for model in (accelerated, original):
        torch.manual_seed(0)
        outputs.append(infer(model, images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    assert outputs[0].shape != whole.shape or not torch.allclose(outputs[0], whole, rtol=1e-2)
    assert len(runs) == 2 and runs[0] == runs[1] + 9 and not handle.fallbacks


def test_a_head_for_other_channels_fails_as_before(images: Tensor) -> None:
    original, accelerated, _ = pair(zoo.small_efficientvit(), images)
    for model in (original.bfloat16(), accelerated.bfloat16()):
        model.head = nn.Linear(model.head.linear.in_features - 1, 10).bfloat16()  # as many pairs
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            infer(model, images.bfloat16())


def _patched(model: Any) -> None:
    conv = model.stages[1].downsample.res1[0].m.conv
    conv.forward = lambda x, forward=conv.forward: forward(x) * 1.5


def _dropping(model: Any) -> None:
    residual = model.stages[0].blocks[0].dw0
    residual.drop = 0.5
    residual.train().m.eval()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook on a stage": (lambda m: m.stages[0].register_forward_hook(lambda *_: None), "stages.0 has a hook"),
    "hook on a layer": (lambda m: m.stages[2].blocks[0].ffn0.m.act.register_forward_hook(lambda *_: None), "stages.2.blocks.0.ffn0.m.act has a hook"),
    "patched": (_patched, "stages.1.downsample.res1.0.m.conv has a hook (or a forward of its own)"),
    "another activation": (lambda m: setattr(m.stages[1].downsample.patchmerge, "act", nn.GELU()), "stages.1.downsample.patchmerge.act is a GELU"),
    "another gate": (lambda m: setattr(m.stages[1].downsample.patchmerge.se, "gate", nn.Hardsigmoid()), "gate is a Hardsigmoid"),
    "maximum": (lambda m: setattr(m.stages[1].downsample.patchmerge.se, "add_maxpool", True), "takes the maximum, too"),
    "dilated": (lambda m: setattr(m.patch_embed.conv2.conv, "dilation", (2, 2)), "patch_embed.conv2 is a convolution that is not square, or dilated"),
    "another layer": (lambda m: m.patch_embed.add_module("extra", nn.Tanh()), "patch_embed.extra is a Tanh, which is not known"),
    "drops": (_dropping, "drops samples"),
}  # fmt: skip


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layer_is_honoured(change: str, later: bool, images: Tensor) -> None:
    apply, words = CHANGES[change]
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    if later:
        infer(accelerated, images)
        apply(accelerated)
    else:
        handle.remove()
        apply(accelerated)
        handle = vitkernels.accelerate(accelerated)
    apply(original)
    outputs = []
    for model in (accelerated, original):
        torch.manual_seed(0)
        outputs.append(infer(model, images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    assert words in (handle.fallbacks if later else zoo.reasons(handle))[""]


def test_an_attention_that_is_to_stay_stays(images: Tensor) -> None:
    _, _, handle = pair(zoo.small_efficientvit(), images, skip="stages.1.*")
    reasons = zoo.reasons(handle)
    assert "stages.1.blocks.0.mixer.m.attn is not replaced" in reasons[""]
    assert {r.path for r in handle.replaced if r.op == "layer_chain"} == {"patch_embed", "stages.0", "stages.2", "stages.1"} - set(reasons)


def test_autocast_and_another_backend_run_the_layers(images: Tensor, runs: list[int]) -> None:
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    with torch.autocast("cpu", torch.bfloat16):
        assert infer(accelerated, images).dtype is infer(original, images).dtype
    assert not runs and "autocast" in handle.fallbacks[""]
    with vitkernels.backend("reference"):
        torch.testing.assert_close(infer(accelerated, images), infer(original, images), rtol=1e-3, atol=1e-3)
    assert not runs


def test_weights_and_images_of_two_dtypes_fail_as_they_did(images: Tensor) -> None:
    original, accelerated, _ = pair(zoo.small_efficientvit(), images)
    infer(accelerated, images)
    for model in (original, accelerated):
        with pytest.raises(RuntimeError, match=r"scalar type|should be the same|Input type"):
            infer(model, images.double())


def test_copies_pickles_and_removal(images: Tensor) -> None:
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    fast = infer(accelerated, images)
    for twin in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert torch.equal(infer(twin, images), fast)
    handle.remove()
    assert [type(m) for m in accelerated.modules()] == [type(m) for m in original.modules()]
    assert torch.equal(infer(accelerated, images), infer(original, images))


def test_several_threads(images: Tensor) -> None:
    _, accelerated, _ = pair(zoo.small_efficientvit(), images)
    inputs = [images + i for i in range(4)]
    expected = [infer(accelerated, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            assert all(map(torch.equal, pool.map(lambda x: infer(accelerated, x), inputs), expected))


def test_export_gives_the_original_graph(images: Tensor) -> None:
    _, accelerated, _ = pair(zoo.small_efficientvit(), images)
    expected = infer(accelerated, images)
    with torch.no_grad():
        program = torch.export.export(accelerated, (images,))
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any("batch_norm" in target for target in targets) and not [target for target in targets if "vitkernels" in target]
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-3, atol=1e-3)


def test_authors_model_takes_its_own_size_alone(images: Tensor) -> None:
    _, accelerated, handle = pair(zoo.cream_efficientvit(), images)
    with pytest.raises(AssertionError, match="wrong size"):
        infer(accelerated, zoo.photos(160))
    assert "size" in handle.fallbacks[""]


def test_a_model_that_only_looks_like_the_authors(images: Tensor) -> None:
    class EfficientViT(zoo.EfficientViT):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.001

    handle = vitkernels.accelerate(EfficientViT())
    assert "computes something else" in zoo.reasons(handle)[""]
