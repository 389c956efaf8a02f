"""Random numbers of one image, drawn from a torch.Generator."""

from __future__ import annotations

import math

import numpy as np
import torch


def uniform(generator: torch.Generator | None) -> float:
    """From [0, 1)."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def truncated_normal(mean: float, std: float, low: float, high: float, generator: torch.Generator | None) -> float:
    """A normal distribution of that mean and standard deviation restricted to [low, high], by the inverse of its distribution function."""
    u = uniform(generator)
    if std == 0 or low == high:
        return min(max(mean, low), high)
    a, b = (low - mean) / std, (high - mean) / std
    # In the upper tail, 1 - cdf keeps the digits that cdf has lost: draw the mirror image there.
    sign = -1 if a > 0 else 1
    a, b = (a, b) if sign == 1 else (-b, -a)
    below, above = (0.5 * math.erfc(-x / math.sqrt(2)) for x in (a, b))
    value = mean + sign * std * float(torch.special.ndtri(torch.tensor(below + u * (above - below), dtype=torch.float64)))
    return min(max(value, low), high)


def beta(mean: float, std: float, generator: torch.Generator | None) -> float:
    """From the Beta distribution of that mean and standard deviation."""
    concentration = mean * (1 - mean) / std**2 - 1
    seed = int(torch.randint(2**63 - 1, (), generator=generator))  # torch.distributions takes no generator
    return float(np.random.default_rng(seed).beta(mean * concentration, (1 - mean) * concentration))
