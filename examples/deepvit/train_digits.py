"""Train a small, deep DeepViT of ``vitkernels.nn.ReAttention`` on scikit-learn's digits.

    python examples/deepvit/train_digits.py --depth 16 --norm batch

Prints the accuracy after each epoch, and at the end how alike the maps of one block and the next are, before they are mixed and as they are applied:
what the paper's figures on attention collapse show. (Its BatchNorm also takes out of the mixed maps the mean, which all maps have in common.)
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vitkernels import inspection
from vitkernels.nn import ReAttention

SIZE, PATCH = 16, 4


class Block(nn.Module):
    """Re-Attention and a feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, dim: int, heads: int, norm: str | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ReAttention(dim, heads, qkv_bias=True, norm=norm)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] to the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeepViT(nn.Module):
    """A DeepViT for images [B, 1, 16, 16]: 16 patches, no class token, the mean over them to the classes."""

    def __init__(self, dim: int, depth: int, heads: int, norm: str | None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(1, (SIZE // PATCH) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, norm) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10]."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@torch.no_grad()
def similarity_of_mixed_maps(model: DeepViT, images: Tensor) -> list[float]:
    """Mean cosine similarity of the maps that each block applies to those of the block before, by columns as the paper has it."""
    x = model.patches(images).flatten(2).transpose(1, 2) + model.position
    maps = []
    for block in model.blocks:
        maps.append(block.attn(block.norm1(x), return_map=True)[1])
        x = block(x)
    return [F.cosine_similarity(*pair, dim=-2).mean().item() for pair in itertools.pairwise(maps)]


def main() -> None:
    """Train, and after each epoch print the loss and the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1797, help="how many of the 1797 digits to use, a fifth of them for testing")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--plot", type=Path, default=None, help="folder for a plot and a CSV of the similarity by depth")
    parser.add_argument("--norm", choices=("batch", "layer", "none"), default="batch", help="of the mixed maps: the authors', vit-pytorch's, none")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.from_numpy(digits.images[: arguments.images]).float()[:, None] / 8 - 1  # [n, 1, 8, 8]
    images = F.interpolate(pixels, size=SIZE, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target[: arguments.images]).long()
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)

    model = DeepViT(dim=48, depth=arguments.depth, heads=6, norm=None if arguments.norm == "none" else arguments.norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in range(arguments.epochs):
        model.train()
        losses = []
        for batch, targets in loader:
            loss = F.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, accuracy {accuracy:.1%}", flush=True)

    seen = images[test][:64]
    found = inspection.layer_similarities(model, seen)
    plain = [layer.adjacent.mean().item() for layer in found.layers[1:]]
    print("similarity of a block's maps to those of the block before")
    print("  before mixing:", " ".join(f"{value:.2f}" for value in plain))
    print("  after mixing: ", " ".join(f"{value:.2f}" for value in similarity_of_mixed_maps(model, seen)))
    if arguments.plot is not None:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        print("written:", *inspection.write(arguments.plot, {f"DeepViT of {arguments.depth} blocks": found}, "deepvit"))


if __name__ == "__main__":
    main()
