"""A small MobileViTv2 and EfficientViT of timm's blocks, a small NaViT and a narrow DeepViT of vit_pytorch, and real images to train them on:
scikit-learn's handwritten digits, upsampled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Digits(nn.Module):
    """Two MobileViTv2 blocks, with the strided convolutions that stand before each in the real network."""

    def __init__(self) -> None:
        from timm.models.mobilevit import MobileVitV2Block

        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.first = MobileVitV2Block(16, transformer_dim=16, transformer_depth=1, patch_size=2)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.SiLU())
        self.second = MobileVitV2Block(32, transformer_dim=32, transformer_depth=2, patch_size=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = self.second(self.down(x))
        return self.head(x.mean((2, 3)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Digits()


class EfficientViTDigits(nn.Module):
    """Two EfficientViT blocks: maps of 12 pixels in windows of 5, filled up, and maps that are one window."""

    def __init__(self) -> None:
        from timm.models.efficientvit_msra import EfficientVitBlock

        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.first = EfficientVitBlock(16, key_dim=8, num_heads=2, attn_ratio=1, resolution=12, window_resolution=5, kernels=(5, 3))
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.second = EfficientVitBlock(32, key_dim=8, num_heads=4, attn_ratio=1, resolution=6, window_resolution=7, kernels=(5, 5, 3, 3))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = self.second(self.down(x))
        return self.head(x.mean((2, 3)))


def efficientvit() -> nn.Module:
    torch.manual_seed(0)
    return EfficientViTDigits()


class NaViTDigits(nn.Module):
    """vit_pytorch's NaViT on digits of mixed resolutions, a tenth of whose tokens are dropped in training."""

    SIZES = ((24, 24), (18, 12), (12, 24), (24, 18), (12, 12))

    def __init__(self) -> None:
        from vit_pytorch.na_vit import NaViT

        super().__init__()
        small = {"dim": 64, "depth": 1, "heads": 4, "mlp_dim": 128, "dim_head": 16}
        self.navit = NaViT(image_size=24, patch_size=6, channels=1, num_classes=10, token_dropout_prob=0.1, **small)

    def forward(self, x: Tensor) -> Tensor:
        sized = [
            F.interpolate(image[None], self.SIZES[i % len(self.SIZES)], mode="bilinear", antialias=True, align_corners=False)[0]
            for i, image in enumerate(x)
        ]
        return self.navit(sized, group_images=True, group_max_seq_len=128)


def navit() -> nn.Module:
    torch.manual_seed(0)
    return NaViTDigits()


def deepvit() -> nn.Module:
    """vit_pytorch's DeepViT of 32 blocks, narrow: four heads of eight channels over nine patches and the class token."""
    from vit_pytorch.deepvit import DeepViT

    torch.manual_seed(0)
    small = {"dim": 32, "heads": 4, "dim_head": 8, "mlp_dim": 64}
    return DeepViT(image_size=24, patch_size=8, channels=1, num_classes=10, depth=32, pool="mean", **small)


def images(size: int = 24) -> tuple[Tensor, Tensor]:
    """All 1797 digits as [n, 1, size, size] in [-1, 1], shuffled, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(digits.images).float()[order, None] / 8 - 1
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False), torch.from_numpy(digits.target).long()[order]
