"""The attention block by itself: the right blocks, on their real inputs, against a baseline with BatchNorm folded away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels as package
from vitkernels import accuracy
from vitkernels.cli import _blocks, _zoo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> _zoo.ZooModel:
    return _zoo.load("efficientvit_m0")


def found(model: _zoo.ZooModel, dtype: torch.dtype = torch.float32, **options: Any) -> list[_blocks.Block]:
    return _blocks.compare(model, batch=2, dtype=dtype, device=CPU, rounds=1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_row_for_each_kind_and_mode(model: _zoo.ZooModel, dtype: torch.dtype) -> None:
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    rows = found(model, dtype)
    assert [row.mode for row in rows] == [*_blocks.MODES] * 3
    assert [row.block for row in rows[::3]] == [
        "stages.0.blocks.0.mixer.m, 64x14x14",
        "stages.1.blocks.0.mixer.m and 1 more, 128x7x7",
        "stages.2.blocks.0.mixer.m and 2 more, 192x4x4",
    ]
    for row in rows:
        assert row.holds, row
        assert 0 < row.original_error < 0.1
        summary = row.summary()
        assert summary["baseline"] == ("original" if row.mode == "training" else "original, BatchNorm folded")
        assert summary["original_p50_ms"] > 0
        assert summary["accelerated_p50_ms"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items()), "the model was changed"


def test_the_baseline_has_no_batch_norm_left(model: _zoo.ZooModel) -> None:
    block = model.module.get_submodule("stages.0.blocks.0.mixer.m")
    folded = _blocks._folded(block)
    assert any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(1, 64, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), block(x), rtol=1e-4, atol=1e-5)


def test_inputs_are_those_of_the_model(model: _zoo.ZooModel) -> None:
    path = "stages.1.blocks.0.mixer.m"
    x, _ = _zoo.images(model, 1)
    seen: list[Tensor] = []
    block = model.module.get_submodule(path)
    hook = block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        captured = _blocks._inputs(model.module, [path], x)[path]
        hook.remove()
        torch.testing.assert_close(block(captured), seen[0], rtol=0, atol=0)
    assert not block._forward_pre_hooks, "a hook stays behind"


def test_a_wrong_block_does_not_hold(model: _zoo.ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(module: nn.Module, **options: Any) -> Any:
        handle = original(module, **options)
        if not options:
            with torch.no_grad():
                list(module.parameters())[-1].add_(0.01)  # the last bias: the convolution's, or its norm's
        return handle

    original = package.accelerate
    monkeypatch.setattr(package, "accelerate", spoil)
    assert [row.holds for row in found(model, modes=("forward", "training"))] == [False] * 6


def test_a_model_without_such_blocks_has_no_rows() -> None:
    assert found(_zoo.load("mobilevitv2_050", size=64)) == []


def test_every_branch_of_a_fresh_model_reaches_the_logits(model: _zoo.ZooModel) -> None:
    """EfficientViT starts the last norm of each branch at zero: what the attention computes would not matter."""
    x, _ = _zoo.images(model, 2)
    proj = model.module.get_submodule("stages.2.blocks.0.mixer.m.attn.proj.1.conv")
    kept = proj.weight.detach().clone()
    with torch.no_grad():
        logits = model.module(x)
        proj.weight.zero_()
        changed = model.module(x)
        proj.weight.copy_(kept)
    assert (changed - logits).abs().max() > 1e-2 * logits.abs().max()
    assert not accuracy.compare_tensors("logits", changed, logits, logits.double()).holds


@pytest.mark.parametrize("name", ["mobilevit_xxs", "hf:mobilevit", "vit_pytorch:MobileViT"])
def test_blocks_of_mobilevit(name: str) -> None:
    """Their BatchNorm is in both what it was; dropout, which transformers' has in training, is the same in both."""
    rows = found(_zoo.load(name, size=64), modes=("forward", "training"))
    assert len(rows) == 6 and {row.baseline for row in rows} == {_blocks.LIVE}
    assert all(row.holds and 0 < row.original_error < 0.1 for row in rows), rows
