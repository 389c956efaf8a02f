"""A small DETR on scenes of real photos with boxes (examples/detection): original and accelerated, the loss curves agree as well as two runs of the
original can. Matching is discrete, so what a rounding changes can be a whole assignment: the yardstick is that of test_training.py.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels

from .. import zoo

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "detection" / "train_scenes.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the examples are not part of this copy")
STEPS, BATCH = 40, 6


def test_loss_curves_agree() -> None:
    example: dict[str, Any] = runpy.run_path(str(SCRIPT))
    images, labels = example["scenes"](2 * BATCH, seed=0)

    def run(change: Callable[[nn.Module], nn.Module]) -> Tensor:
        training = example["Training"](change(example["detector"]()))
        losses = []
        for step in range(STEPS):
            rows = [(step * BATCH + i) % len(images) for i in range(BATCH)]
            losses.append(training.step(images[rows], [labels[row] for row in rows]))
        return torch.tensor(losses, dtype=torch.float64)

    original = run(lambda model: model)

    def accelerate(model: nn.Module) -> nn.Module:
        assert len(vitkernels.accelerate(model).replaced) == 1 + 2 + 2 + 2 * 3
        return model

    ours = run(accelerate)
    zoo.assert_curves_agree(original, ours, lambda seed: run(lambda model: zoo.jitter(model, seed)))
    assert ours[-6:].mean() < 0.9 * ours[:6].mean(), "it agrees, but nothing was learnt"


def test_the_example() -> None:
    # By way of conftest, which lets a torchvision for GPUs be imported.
    options = ["--steps", "10", "--batch", "4", "--scenes", "16"]
    run = f"import tests.conftest, runpy, sys; sys.argv = {[str(SCRIPT), *options]!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [tuple(map(float, pair)) for pair in re.findall(r"loss ([\d.]+), accelerated ([\d.]+)", done.stdout)]
    assert len(losses) == 2 and all(a == pytest.approx(b, rel=1e-3) for a, b in losses), done.stdout
    assert "in unseen scenes" in done.stdout
