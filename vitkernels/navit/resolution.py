"""At which resolution an image is seen in training (NaViT, arXiv 2307.06304, sections 2.2 and 3.2): drawn anew each time, the aspect ratio kept."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.navit import _random


class ResolutionSampler:
    """Draws a resolution R and gives the size with the image's aspect ratio and an area of at most R x R, in whole patches.

    Args:
        low: the smallest R in pixels.
        high: the largest R.
        patch_size: side of a patch in pixels; both sides of a size are multiples of it.
        sample: ``"side"`` draws R itself, from [low, high], ``"area"`` draws R * R, from [low ** 2, high ** 2].
        distribution: ``"uniform"``, or ``"truncated_normal"``: N(mean, std) cut off at -1 and 1, and the interval [-1, 1] stretched over the range.
        mean: of the normal distribution. The paper's best, -0.5, prefers small images.
        std: of the normal distribution.

    A size never has more than ``(high / patch_size) ** 2`` patches, so that is a safe ``max_tokens`` of :func:`pack`; sides are rounded down to whole
    patches (at least one).
    """

    def __init__(
        self,
        low: int,
        high: int,
        patch_size: int,
        *,
        sample: Literal["side", "area"] = "side",
        distribution: Literal["uniform", "truncated_normal"] = "uniform",
        mean: float = -0.5,
        std: float = 1.0,
    ) -> None:
        if not 0 < patch_size <= low <= high:
            raise ValueError(f"ResolutionSampler: patch_size is {patch_size}, low {low} and high {high}; it must be 0 < patch_size <= low <= high")
        if sample not in ("side", "area"):
            raise ValueError(f"ResolutionSampler: sample is {sample!r}; it must be 'side' or 'area'")
        if distribution not in ("uniform", "truncated_normal"):
            raise ValueError(f"ResolutionSampler: distribution is {distribution!r}; it must be 'uniform' or 'truncated_normal'")
        if std <= 0:
            raise ValueError(f"ResolutionSampler: std is {std}; it must be positive")
        self.low, self.high, self.patch_size, self.sample, self.distribution, self.mean, self.std = (
            low,
            high,
            patch_size,
            sample,
            distribution,
            mean,
            std,
        )

    def resolution(self, generator: torch.Generator | None = None) -> float:
        """A draw of R, in pixels."""
        if self.distribution == "uniform":
            share = _random.uniform(generator)
        else:
            share = (1 + _random.truncated_normal(self.mean, self.std, -1.0, 1.0, generator)) / 2
        power = 1 if self.sample == "side" else 2
        return (self.low**power + share * (self.high**power - self.low**power)) ** (1 / power)

    def size(self, height: int, width: int, generator: torch.Generator | None = None) -> tuple[int, int]:
        """A draw for an image of ``height`` x ``width`` pixels: the height and width it is to be resized to."""
        patches = self.resolution(generator) / self.patch_size  # the side of the square of patches
        budget = int(patches**2 + 1e-9)
        rows = min(max(int(patches * (height / width) ** 0.5 + 1e-9), 1), budget)
        cols = min(max(int(patches * (width / height) ** 0.5 + 1e-9), 1), max(budget // rows, 1))
        return rows * self.patch_size, cols * self.patch_size

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``image`` [C, H, W], resized to a draw of :meth:`size`: bilinear, antialiased."""
        size = self.size(image.shape[1], image.shape[2], generator)
        return F.interpolate(image[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
