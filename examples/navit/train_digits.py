"""Train a NaViT on scikit-learn's digits at random resolutions, packed by DataLoader workers into batches of one fixed shape.

    python examples/navit/train_digits.py --epochs 8 --workers 2

Each image is drawn at its own resolution (16 to 48 pixels, small ones preferred) and loses its own share of patches; what is left is packed into
sequences of 1024 tokens. Every batch has the same shapes, so ``--compile`` compiles the model once.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from vitkernels.navit import BetaTokenDrop, NaViT, PackedCollate, ResolutionSampler, padding

PATCH, MAX_TOKENS, MAX_IMAGES = 4, 1024, 64


def loaders(count: int, workers: int, seed: int) -> tuple[DataLoader, DataLoader]:
    """Packed batches of digits, 512 of them packed at a time, for training and for testing."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # [1797, 1, 8, 8]
    train, test = train_test_split(list(zip(images, torch.from_numpy(digits.target), strict=True))[:count], test_size=0.2, random_state=0)
    sizes = ResolutionSampler(16, 48, PATCH, distribution="truncated_normal", mean=-0.5)
    collate = PackedCollate(PATCH, MAX_TOKENS, max_images=MAX_IMAGES, resolution=sizes, token_drop=BetaTokenDrop(0.2, 0.1))
    plain = PackedCollate(PATCH, MAX_TOKENS, max_images=MAX_IMAGES, resolution=ResolutionSampler(32, 32, PATCH))
    generator = torch.Generator().manual_seed(seed)
    return (
        DataLoader(_dataset(train), batch_size=512, shuffle=True, num_workers=workers, generator=generator, collate_fn=collate),
        DataLoader(_dataset(test), batch_size=512, num_workers=workers, collate_fn=plain),
    )


def _dataset(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> TensorDataset:
    return TensorDataset(*(torch.stack(column) for column in zip(*samples, strict=True)))


def main() -> None:
    """Train, and after each epoch print the loss, the padding and the accuracy at 32 pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1797, help="how many of the 1797 digits to use, a fifth of them for testing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = NaViT(PATCH, dim=64, depth=4, heads=4, out_features=10, in_channels=1, position="fractional", max_size=16)
    call = torch.compile(model, fullgraph=True) if arguments.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    train, test = loaders(arguments.images, arguments.workers, seed=0)
    for epoch in range(arguments.epochs):
        model.train()
        losses, lengths = [], []
        for batch in (batch for packed in train for batch in packed):
            loss = F.cross_entropy(call(batch)[: len(batch)], batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            lengths.append(int(batch.layout.cu_seqlens_q[-1]))
        model.eval()
        with torch.no_grad():
            right = [(call(batch)[: len(batch)].argmax(1) == batch.targets) for packed in test for batch in packed]
        loss, share = sum(losses) / len(losses), padding(lengths, [[i] for i in range(len(lengths))], MAX_TOKENS)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, padding {share:.1%}, accuracy {torch.cat(right).float().mean():.1%}", flush=True)


if __name__ == "__main__":
    main()
