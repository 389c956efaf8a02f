"""Teach a frozen ViT two label sets, one after the other, without losing the first: learnable memory on scikit-learn's digits.

    python examples/memory/learn_two_tasks.py

A small ViT learns the digits 0 to 4 and is frozen. Then two tasks are trained beside it, each apart from the other: which of 5 to 9 a digit is, and
whether any digit is even. Each is saved in a file of its own, both are put beside the ViT, which runs once for both, and nothing has changed: not the
ViT's logits, and not the first task's, to the last bit.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from vitkernels.memory import MemoryViT

SIZE = 16


class Digits:
    """The digits that a task is about, and their labels, to train on and to test on."""

    def __init__(self, images: Tensor, labels: Tensor, kept: Tensor) -> None:
        rows = kept.nonzero()[:, 0]
        train, self.test = (torch.as_tensor(part) for part in train_test_split(rows.numpy(), test_size=0.2, random_state=0))
        self.images, self.labels = images, labels
        self.loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)

    def accuracy(self, logits: Tensor) -> float:
        """Of the logits of the images to test on."""
        return (logits.argmax(1) == self.labels[self.test]).float().mean().item()


def fit(module: nn.Module, logits_of: Callable[[Tensor], Tensor], digits: Digits, epochs: int, lr: float) -> None:
    """Train what is not frozen."""
    optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=lr, weight_decay=0.01)
    module.train()
    for _ in range(epochs):
        for images, labels in digits.loader:
            loss = F.cross_entropy(logits_of(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    module.eval()


def main() -> None:
    """Train, save, put together, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of the ViT")
    parser.add_argument("--task-epochs", type=int, default=30, help="of each task")
    parser.add_argument("--memories", type=int, default=8, help="tokens of memory a layer")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the tasks")
    parser.add_argument("--files", type=Path, default=None, help="folder for the two tasks; default: one that is removed again")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(pixels, size=SIZE, mode="bilinear", align_corners=False)
    digit = torch.from_numpy(digits.target).long()
    low, high, parity = Digits(images, digit, digit < 5), Digits(images, digit - 5, digit >= 5), Digits(images, digit % 2, digit >= 0)

    small = {"image_size": SIZE, "patch_size": 4, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    vit = ViTForImageClassification(ViTConfig(**small, intermediate_size=128, num_labels=5))
    fit(vit, lambda x: vit(x).logits, low, arguments.epochs, 1e-3)
    with torch.no_grad():
        before = vit(images).logits
    print(f"the ViT on 0 to 4: {low.accuracy(before[low.test]):.1%}")

    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files or Path(folder)
        files.mkdir(parents=True, exist_ok=True)
        alone = {}
        for name, data, classes in (("high", high, 5), ("parity", parity, 2)):
            model = MemoryViT(vit, apart=True)
            model.add_task(name, classes, arguments.memories)
            fit(model, lambda x, model=model, name=name: model(x).tasks[name], data, arguments.task_epochs, arguments.lr)
            model.save_task(name, files / f"{name}.pt")
            with torch.no_grad():
                alone[name] = model(images).tasks[name]
            size = (files / f"{name}.pt").stat().st_size / 1024
            print(f"task {name}: {data.accuracy(alone[name][data.test]):.1%}, {size:.0f} kB")

        together = MemoryViT(vit, apart=True).eval()
        for name in alone:
            together.load_task(files / f"{name}.pt")
        with torch.no_grad():
            base, tasks = together(images)
    print(f"beside the other: high {high.accuracy(tasks['high'][high.test]):.1%}, parity {parity.accuracy(tasks['parity'][parity.test]):.1%}")
    print(f"the ViT's logits are the same to the bit: {torch.equal(base.logits, before)}")
    print(f"each task's logits are the same to the bit: {all(torch.equal(tasks[name], alone[name]) for name in alone)}")


if __name__ == "__main__":
    main()
