"""vitkernels.nn against the zoo's modules whose checkpoints it shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.nn import CascadedGroupAttention, EfficientViTBlock

from .. import zoo

pytestmark = pytest.mark.usefixtures("poison")
MEASURES: dict[str, tuple[zoo.Measure, bool]] = {"inference": (zoo.inference, False), "eval": (zoo.results, False), "train": (zoo.trained, True)}
SHAPES: dict[str, dict[str, Any]] = {
    "windows": {"dim": 32, "num_heads": 2, "resolution": 10, "window_resolution": 4, "kernels": (5, 3)},
    "one window": {"dim": 48, "num_heads": 3, "resolution": 4, "window_resolution": 7, "kernels": (7, 5, 3)},
}


def timm_block(dim: int, num_heads: int, **options: Any) -> nn.Module:
    from timm.models.efficientvit_msra import EfficientVitBlock

    torch.manual_seed(0)
    return zoo.awake(EfficientVitBlock(dim, 16, num_heads, dim / num_heads / 16, **options))


def sample(dim: int, resolution: int, **_: Any) -> Tensor:
    return torch.randn(2, dim, resolution, resolution, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_block_is_timms(shape: str, measure: str) -> None:
    x = sample(**SHAPES[shape])
    theirs = zoo.settle(timm_block(**SHAPES[shape]), x).eval()
    ours = EfficientViTBlock(**SHAPES[shape]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    function, training = MEASURES[measure]
    zoo.assert_same(theirs, ours, x, training=training, measure=function)


@pytest.mark.parametrize("size", [(10, 10), (9, 13), (3, 10)], ids=str)
def test_attention_on_any_map(size: tuple[int, int]) -> None:
    x = torch.randn(2, 32, *size, generator=torch.Generator().manual_seed(0))
    theirs = zoo.settle(zoo.timm_window_attention(), torch.randn(2, 32, 10, 10)).eval()
    ours = CascadedGroupAttention(32, num_heads=2, resolution=4, kernels=(5, 3), partition=True).eval()
    ours.load_state_dict(theirs.attn.state_dict(), strict=True)
    wrapped = nn.Sequential()
    wrapped.attn = ours  # the same names
    for function, training in MEASURES.values():
        zoo.assert_same(theirs, wrapped, x, training=training, measure=function)


def test_attention_on_one_window() -> None:
    from timm.models.efficientvit_msra import CascadedGroupAttention as Timms

    x = torch.randn(3, 32, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    theirs = zoo.settle(zoo.awake(nn.Sequential(Timms(32, 16, 2, 1, 7, (5, 5)))), x).eval()
    ours = nn.Sequential(CascadedGroupAttention(32, num_heads=2)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for function, training in MEASURES.values():
        zoo.assert_same(theirs, ours, x, training=training, measure=function)
    with pytest.raises(RuntimeError):
        ours(torch.randn(1, 32, 14, 14))


def test_changed_layers_are_called() -> None:
    """What stands where a layer stood, and every hook, has its say."""
    x = sample(**SHAPES["windows"])
    block = EfficientViTBlock(**SHAPES["windows"])
    zoo.settle(zoo.awake(block), x).eval()
    attention = block.mixer.m.attn
    seen: list[str] = []
    for name, module in block.named_modules():
        if name.endswith(("conv", "bn")):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    hooked = block(x)
    assert len(seen) == len(set(seen)) == 2 * (2 + 4 + 5)
    for module in block.modules():
        module._forward_hooks.clear()
    with torch.no_grad():
        torch.testing.assert_close(block(x), hooked)
    assert len(seen) == 22
    attention.proj[0] = nn.GELU()
    assert not torch.allclose(block(x), hooked)


def test_sync_batch_norm_runs_layer_by_layer() -> None:
    x = sample(**SHAPES["windows"])
    block = EfficientViTBlock(**SHAPES["windows"])
    zoo.settle(zoo.awake(block), x).eval()
    expected = block(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(block)(x), expected)


def test_new_weights_are_used() -> None:
    x = sample(**SHAPES["windows"])
    block = EfficientViTBlock(**SHAPES["windows"])
    zoo.settle(zoo.awake(block), x).eval()
    other = copy.deepcopy(block)
    with torch.no_grad():
        first = block(x)
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.2)
        block.load_state_dict(other.state_dict())
        assert not torch.allclose(block(x), first)
        assert torch.equal(block(x), other(x))


def test_drop_leaves_out_samples() -> None:
    x = sample(**SHAPES["windows"])
    block = EfficientViTBlock(**SHAPES["windows"], drop=0.5)
    zoo.awake(block)
    torch.manual_seed(0)
    dropped = block.dw0(x) - x
    kept = dropped.abs().amax((1, 2, 3)) > 0
    torch.manual_seed(0)
    assert torch.equal(kept, torch.rand(2, 1, 1, 1).flatten() >= 0.5)
    torch.testing.assert_close(dropped[kept], (block.dw0.m(x) * 2)[kept])


def test_accelerate_leaves_it_alone() -> None:
    block = EfficientViTBlock(32)
    handle = vitkernels.accelerate(block)
    assert not handle.replaced and not handle.skipped


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 30, "num_heads": 4}, "multiple of num_heads"),
        ({"dim": 32, "num_heads": 2, "attn_ratio": 2}, "attn_ratio 2"),
        ({"dim": 32, "kernels": 4}, "kernels is 4"),
        ({"dim": 32, "kernels": (3, 3)}, "one per head"),
        ({"dim": 32, "resolution": 0}, "resolution is 0"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CascadedGroupAttention(**options)
