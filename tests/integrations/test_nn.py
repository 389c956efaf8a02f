"""vitkernels.nn against the zoo's modules whose checkpoints it shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.nn import CascadedGroupAttention, EfficientViTBlock, interpolate_position_embedding

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


# --- interpolate_position_embedding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("old", "new", "prefix"), [((14, 14), (24, 24), 1), ((14, 14), (7, 20), 5), ((6, 9), (9, 6), 0), ((3, 3), (1, 1), 1)], ids=str)
def test_positions_are_timms(old: tuple[int, int], new: tuple[int, int], prefix: int, mode: str, antialias: bool, dtype: torch.dtype) -> None:
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, prefix + old[0] * old[1], 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = interpolate_position_embedding(table, old, new, num_prefix_tokens=prefix, mode=mode, antialias=antialias)
    expected = resample_abs_pos_embed(table, list(new), list(old), prefix, interpolation=mode, antialias=antialias)
    assert found.dtype is dtype and torch.equal(found, expected)
    without_batch = interpolate_position_embedding(table[0], old, new, num_prefix_tokens=prefix, mode=mode, antialias=antialias)
    assert torch.equal(without_batch, expected[0])


def test_positions_are_differentiable_in_float64() -> None:
    table = torch.randn(1, 1 + 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: interpolate_position_embedding(t, (2, 3), (4, 4), num_prefix_tokens=1), (table,))
    assert interpolate_position_embedding(table, (2, 3), (2, 3), num_prefix_tokens=1) is table


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.zeros(1, 10, 4), (3, 3), (4, 4)), {}, ValueError, r"shape \[1, 10, 4\]; it must be \[1, 9, D\]"),
        ((torch.zeros(2, 9, 4), (3, 3), (4, 4)), {}, ValueError, r"shape \[2, 9, 4\]"),
        ((torch.zeros(9), (3, 3), (4, 4)), {}, ValueError, r"shape \[9\]"),
        ((torch.zeros(9, 4), (3, 3), (0, 4)), {}, ValueError, "new_grid is"),
        ((torch.zeros(9, 4), (9,), (4, 4)), {}, ValueError, "old_grid is"),
        ((torch.zeros(9, 4), (3, 3), (4, 4)), {"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens is -1"),
        ((torch.zeros(9, 4), (3, 3), (4, 4)), {"mode": "nearest"}, ValueError, "mode is 'nearest'"),
        ((torch.zeros(9, 4, dtype=torch.int), (3, 3), (4, 4)), {}, TypeError, "pos_embed"),
        (([[0.0]], (1, 1), (4, 4)), {}, TypeError, "pos_embed"),
    ],
    ids=str,
)
def test_positions_refused(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^interpolate_position_embedding: .*{words}"):
        interpolate_position_embedding(*arguments, **options)
