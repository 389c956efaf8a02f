"""vit_pytorch's ``learnable_memory_vit``: adapters alone and several over one ViT, and the attention of that ViT."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.accuracy import compare_tensors
from vitkernels.memory import run_adapters

from .. import zoo
from ..zoo import pair, reasons

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(32)


def a_vit(**options: Any) -> nn.Module:
    from vit_pytorch.learnable_memory_vit import ViT

    torch.manual_seed(0)
    small = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 64, "dim_head": 16}
    return ViT(**{**small, **options})


def adapter(memories: int = 6, vit: nn.Module | None = None, **options: Any) -> nn.Module:
    """An adapter of vit_pytorch over a small ViT."""
    from vit_pytorch.learnable_memory_vit import Adapter

    vit = a_vit(**options) if vit is None else vit
    torch.manual_seed(memories)
    return Adapter(vit=vit, num_memories_per_layer=memories, num_classes=10)


# --- one adapter -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measure", "training"), [(zoo.inference, False), (zoo.results, False), (zoo.results, True)], ids=["infer", "eval", "train"])
@pytest.mark.parametrize("memories", [1, 6])
def test_adapter(memories: int, measure: zoo.Measure, training: bool, images: Tensor) -> None:
    original, accelerated, handle = pair(adapter(memories), images)
    assert [(r.path, r.op) for r in handle.replaced] == [
        ("", "memory_attention"),
        ("vit.to_patch_embedding", "patch_embedding"),
        *((f"vit.transformer.layers.{i}.0", "attention") for i in range(2)),
    ]
    assert not handle.skipped
    zoo.assert_same(original, accelerated, images, training=training, measure=measure)
    accelerated(images)
    assert not handle.fallbacks
    handle.remove()
    assert [type(m) for m in accelerated.modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapter_in_other_dtypes(dtype: torch.dtype, images: Tensor) -> None:
    original, accelerated, handle = pair(adapter(), images)
    zoo.assert_same(original.to(dtype), accelerated.to(dtype), images.to(dtype), training=False)
    accelerated(images.to(dtype))
    assert not handle.fallbacks


def test_an_unfrozen_vit_is_trained(images: Tensor) -> None:
    original, accelerated, handle = pair(adapter().requires_grad_(True), images)
    zoo.assert_same(original, accelerated, images, training=True)
    accelerated(images)
    assert accelerated.vit.transformer.layers[0][1].net[1].weight.requires_grad and not handle.fallbacks


def test_state_dict_and_pickles(images: Tensor) -> None:
    original, accelerated, _ = pair(adapter(), images)
    assert list(original.state_dict()) == list(accelerated.state_dict())
    accelerated.eval()
    with torch.no_grad():
        expected = accelerated(images)
        for twin in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
            assert torch.equal(twin(images), expected)


def test_the_frozen_vit_keeps_nothing_for_the_backward(images: Tensor) -> None:
    original, accelerated, _ = pair(adapter(), images)
    assert zoo.saved_bytes(accelerated, images) < 0.5 * zoo.saved_bytes(original, images)


def test_dropout_is_named_and_evaluation_has_none(images: Tensor) -> None:
    original, accelerated, handle = pair(adapter(dropout=0.2), images)
    assert "dropout draws other masks" in handle.replaced[0].note
    zoo.assert_same(original, accelerated, images, training=False)
    accelerated.train()
    with torch.no_grad():
        assert not torch.equal(accelerated(images), accelerated(images))


def test_another_mask_runs_the_original(images: Tensor) -> None:
    model = adapter()
    model.attn_mask[3, 0] = True
    original, accelerated, handle = pair(model, images)
    assert reasons(handle)[""] == "its attn_mask is not the one it was made with"
    zoo.assert_same(original, accelerated, images, training=False)
    # And one that changes later.
    original, accelerated, handle = pair(adapter(), images)
    for changed in (original, accelerated):
        changed.attn_mask[3, 0] = True
    zoo.assert_same(original, accelerated, images, training=False)
    accelerated(images)
    assert handle.fallbacks[""] == "its attn_mask is not the one it was made with"


def test_a_hook_inside_the_vit_runs_the_original(images: Tensor) -> None:
    original, accelerated, handle = pair(adapter(), images)
    seen: list[int] = []
    accelerated.vit.transformer.layers[1][1].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)
    accelerated(images)
    assert set(seen) == {1 + 1 + 16}, "the hook did not see the original's tokens"
    assert "hook" in handle.fallbacks[""]


def test_other_layers_are_left_alone(images: Tensor) -> None:
    model = adapter()

    class Special(type(model.vit.transformer.layers[0][1])):  # type: ignore[misc]
        pass

    model.vit.transformer.layers[0][1].__class__ = Special
    handle = vitkernels.accelerate(model)
    assert reasons(handle)[""].startswith("a layer of vit is a") and "Special" in reasons(handle)[""]


# --- several over one ViT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True], ids=["original", "accelerated"])
def test_several_adapters_share_one_pass(accelerated: bool, images: Tensor) -> None:
    vit = a_vit()
    adapters = nn.ModuleList(adapter(memories, vit) for memories in (6, 0, 11))
    wide = copy.deepcopy(adapters).double()
    exact = [a(images.double()) for a in wide]
    eager = [a(images) for a in copy.deepcopy(adapters)]
    if accelerated:
        vitkernels.accelerate(adapters)
    calls: list[int] = []
    vit.transformer.register_forward_hook(lambda module, args, output: calls.append(output.shape[1]))
    found = run_adapters(list(adapters), images)
    assert calls == [17], "the ViT must run once, on its own tokens"
    for index, (got, theirs, right) in enumerate(zip(found, eager, exact, strict=True)):
        comparison = compare_tensors(f"adapter {index}", got, theirs, right)
        assert comparison.holds, comparison
    sum(logits.square().sum() for logits in found).backward()
    sum(logits.square().sum() for logits in exact).backward()
    for parameter, twin in zip(adapters.parameters(), wide.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None)
        if parameter.grad is not None and parameter.numel():
            torch.testing.assert_close(parameter.grad.double(), twin.grad, rtol=1e-3, atol=1e-5)


def test_run_adapters_refuses(images: Tensor) -> None:
    with pytest.raises(ValueError, match="adapters is empty"):
        run_adapters([], images)
    with pytest.raises(TypeError, match=r"holds a torch\.nn\.modules\.linear\.Linear"):
        run_adapters([nn.Linear(2, 2)], images)
    with pytest.raises(ValueError, match="must share one vit"):
        run_adapters([adapter(), adapter()], images)


# --- the attention alone -----------------------------------------------------------------------------------------------------------


class _Calls(nn.Module):
    """The attention, called in one way."""

    def __init__(self, attention: nn.Module, way: str) -> None:
        super().__init__()
        self.attention, self.way = attention, way
        self.memory = nn.Parameter(torch.randn(*((2,) if "batch" in way else ()), 5, 48, generator=torch.Generator().manual_seed(1)))
        mask = torch.rand(9, 9 + 5 * ("memory" in way), generator=torch.Generator().manual_seed(2)) < 0.7
        mask[4] = False
        self.register_buffer("mask", mask if "blind" in way else mask | (torch.arange(mask.shape[1]) == 2))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask if "mask" in self.way else None
        return self.attention(x, attn_mask=mask, memories=self.memory if "memory" in self.way else None)


@pytest.mark.parametrize("way", ["plain", "memory", "memory of a batch", "mask", "mask and memory", "mask with a blind query"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_attention(way: str, training: bool) -> None:
    model = _Calls(a_vit().transformer.layers[0][0], way)
    original, accelerated, handle = pair(model, torch.randn(2, 9, 48))
    assert [r.path for r in handle.replaced] == ["attention"]
    zoo.assert_same(original, accelerated, torch.randn(2, 9, 48), training=training)
    accelerated(torch.randn(2, 9, 48))
    assert bool(handle.fallbacks) == ("blind" in way)
