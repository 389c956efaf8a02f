"""Train a small DETR on scenes made of real photos, as it is and accelerated, and compare the two, step by step.

    python examples/detection/train_scenes.py --steps 300

A scene is a part of one photo, on which a face, a cat or a cup, cut out of others, are pasted at known places, in sizes that vary: so it has boxes.
Both models start from the same weights and see the same scenes. Every tenth step is printed: both losses, and the time that each has taken so far; at
the end, both losses in scenes never seen. The two agree to the last digits until roundings have grown into another assignment, as two runs of the
original on another machine would.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import vitkernels

SIZE = 64
OBJECTS = {"face": ("astronaut", (20, 200, 140, 310)), "cat": ("chelsea", (20, 270, 100, 350)), "cup": ("coffee", (90, 340, 150, 450))}
BACKGROUNDS = ("rocket", "retina", "hubble_deep_field")


def photo(name: str) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    return torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 127.5 - 1


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Of [3, H, W]."""
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def scenes(count: int, seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images [count, 3, SIZE, SIZE], and of each its ``class_labels`` [n] and ``boxes`` [n, 4], (centre x, centre y, width, height) by its side."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    cut = {name: photo(source)[:, top:bottom, left:right] for name, (source, (top, bottom, left, right)) in OBJECTS.items()}
    grounds = [resized(photo(name), 2 * SIZE, 2 * SIZE) for name in BACKGROUNDS]
    images, labels = [], []
    for _ in range(count):
        top, left = draw(0, SIZE), draw(0, SIZE)
        image = grounds[draw(0, len(grounds))][:, top : top + SIZE, left : left + SIZE].clone()
        names, boxes = [], []
        for _ in range(draw(1, 4)):
            kind, height, width = draw(0, len(cut)), draw(SIZE // 5, SIZE // 2), draw(SIZE // 5, SIZE // 2)
            y, x = draw(0, SIZE - height), draw(0, SIZE - width)
            image[:, y : y + height, x : x + width] = resized(list(cut.values())[kind], height, width)
            names.append(kind)
            boxes.append([x + width / 2, y + height / 2, width, height])
        images.append(image)
        labels.append({"class_labels": torch.tensor(names), "boxes": torch.tensor(boxes) / SIZE})
    return torch.stack(images), labels


def detector() -> Any:
    """A DETR of two encoder and three decoder layers, whose loss looks at each of the three."""
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"])
    layers = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    narrow = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "dropout": 0.0, "num_queries": 10, "num_labels": len(OBJECTS)}
    config = DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, auxiliary_loss=True, **layers, **narrow)
    return DetrForObjectDetection(config)


class Training:
    """A model, and what it takes to train it."""

    def __init__(self, model: Any) -> None:
        self.model, self.seconds = model.train(), 0.0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def step(self, images: Tensor, labels: list[dict[str, Tensor]]) -> float:
        """One step; its loss."""
        begin = time.perf_counter()
        loss = self.model(pixel_values=images, labels=labels).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds += time.perf_counter() - begin
        return loss.item()


@torch.no_grad()
def loss_of(model: Any, images: Tensor, labels: list[dict[str, Tensor]]) -> float:
    """In evaluation."""
    return model.eval()(pixel_values=images, labels=labels).loss.item()


def main() -> None:
    """Train both, and print how they go along."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--scenes", type=int, default=256, help="how many there are to train on")
    options = parser.parse_args()

    original = detector()
    accelerated = copy.deepcopy(original)
    print(vitkernels.accelerate(accelerated))
    both = [Training(original), Training(accelerated)]
    images, labels = scenes(options.scenes, seed=0)
    order = torch.Generator().manual_seed(0)
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(images), (options.batch,), generator=order)
        losses = [training.step(images[rows], [labels[row] for row in rows]) for training in both]
        if step % 10 == 0 or step == 1:
            times = " and ".join(f"{training.seconds:.1f}" for training in both)
            print(f"step {step}: loss {losses[0]:.4f}, accelerated {losses[1]:.4f}; {times} seconds", flush=True)
    unseen = scenes(64, seed=1)
    before, now, fast = (loss_of(model, *unseen) for model in (detector(), original, accelerated))
    print(f"in unseen scenes: loss {before:.2f} before, {now:.2f} now, accelerated {fast:.2f}")


if __name__ == "__main__":
    main()
