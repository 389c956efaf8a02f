"""The targets of a batch, one image after the other, as the ops read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkernels.ops import TargetLayout

Targets = Sequence[Mapping[str, Tensor]]
"""For each image its labels [T_b] and boxes [T_b, 4] (centre x, centre y, width, height), as DETRs are trained on."""


@dataclass(frozen=True)
class PackedTargets:
    """Made once a batch by :meth:`pack`, and read by the matching and the loss of every layer.

    Attributes:
        labels: int64 [T].
        boxes: [T, 4], (centre x, centre y, width, height).
        layout: which of them belong to which image.
    """

    labels: Tensor
    boxes: Tensor
    layout: TargetLayout

    @classmethod
    def pack(cls, targets: Targets, *, labels: str = "labels") -> PackedTargets:
        """From the list of dicts, whose labels are under that key.

        Raises:
            ValueError: labels and boxes that do not fit each other, or on different devices; the message names the image. No image at all.
            TypeError: something that is no list of dicts of tensors.
            KeyError: an image without labels or boxes; the message names it.
        """
        if isinstance(targets, Mapping) or not isinstance(targets, Sequence):
            raise TypeError(f"targets is a {type(targets).__name__}; it must be a list with a dict for each image")
        if not targets:
            raise ValueError("targets is empty; it must have a dict for each image")
        layout = TargetLayout.from_targets(targets, labels=labels)
        return cls(torch.cat([target[labels] for target in targets]), torch.cat([target["boxes"] for target in targets]), layout)
