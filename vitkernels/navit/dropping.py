"""How many patches of an image are dropped in training, and which (NaViT, arXiv 2307.06304, sections 2.2 and 3.3): continuous token dropping."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.navit import _random


class TokenDrop:
    """Drops a share of an image's patches, the same for all images, chosen uniformly without replacement. The base of the other two.

    Args:
        rate: the share to drop, in [0, 1). At least one patch is always kept.
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"{type(self).__name__}: rate is {rate}; it must be in [0, 1)")
        self.mean = rate

    def rate(self, rows: int, cols: int, generator: torch.Generator | None = None) -> float:
        """The share to drop of an image of ``rows`` x ``cols`` patches; a new draw at each call where it is random."""
        return self.mean

    def keep(self, rows: int, cols: int, generator: torch.Generator | None = None) -> Tensor:
        """The patches to keep, int64, ascending, as ``row * cols + col``."""
        patches = rows * cols
        kept = max(1, round((1 - self.rate(rows, cols, generator)) * patches))
        return torch.randperm(patches, generator=generator)[:kept].sort().values


class BetaTokenDrop(TokenDrop):
    """A drop rate for each image, from a Beta distribution.

    Args:
        mean: of the drop rate, in (0, 1).
        std: of the drop rate; less than ``sqrt(mean * (1 - mean))``, beyond which no Beta distribution has it.
    """

    def __init__(self, mean: float, std: float) -> None:
        if not 0 < mean < 1:
            raise ValueError(f"BetaTokenDrop: mean is {mean}; it must be in (0, 1)")
        if not 0 < std < (limit := (mean * (1 - mean)) ** 0.5):
            raise ValueError(f"BetaTokenDrop: std is {std}; it must be in (0, {limit:.4g}), the bound for a mean of {mean}")
        self.mean, self.std = mean, std

    def rate(self, rows: int, cols: int, generator: torch.Generator | None = None) -> float:
        """A draw from the Beta distribution."""
        return _random.beta(self.mean, self.std, generator)


class ResolutionTokenDrop(TokenDrop):
    """A drop rate that grows (or falls) with the image: a truncated normal distribution whose mean is linear in the number of patches.

    Args:
        low: the mean rate of an image of ``min_tokens`` patches, or fewer.
        high: the mean rate of an image of ``max_tokens`` patches, or more.
        min_tokens: the fewest patches an image has.
        max_tokens: the most; more than ``min_tokens``.
        std: of the normal distribution, which is cut off at twice that on both sides and at 0 and 1.
    """

    def __init__(self, low: float, high: float, min_tokens: int, max_tokens: int, std: float = 0.02) -> None:
        for name, value in (("low", low), ("high", high)):
            if not 0 <= value < 1:
                raise ValueError(f"ResolutionTokenDrop: {name} is {value}; it must be in [0, 1)")
        if not 0 < min_tokens < max_tokens:
            raise ValueError(f"ResolutionTokenDrop: min_tokens is {min_tokens} and max_tokens {max_tokens}; it must be 0 < min_tokens < max_tokens")
        if std < 0:
            raise ValueError(f"ResolutionTokenDrop: std is {std}; it must not be negative")
        self.low, self.high, self.min_tokens, self.max_tokens, self.std = low, high, min_tokens, max_tokens, std

    def rate(self, rows: int, cols: int, generator: torch.Generator | None = None) -> float:
        """A draw from the truncated normal distribution of an image of this size."""
        share = (rows * cols - self.min_tokens) / (self.max_tokens - self.min_tokens)
        mean = self.low + (self.high - self.low) * min(max(share, 0.0), 1.0)
        low, high = max(mean - 2 * self.std, 0.0), min(mean + 2 * self.std, 1.0)
        return _random.truncated_normal(mean, self.std, low, high, generator)
