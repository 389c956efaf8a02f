"""vit_pytorch's ``Adapter``, several of them over one ViT that runs once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.integrations._fused import original_name
from vitkernels.memory.beside import Rows, project_memory, run_beside
from vitkernels.memory.layers import frame_of

ADAPTER = "vit_pytorch.learnable_memory_vit.Adapter"


def run_adapters(adapters: Sequence[nn.Module], img: Tensor) -> list[Tensor]:
    """What each adapter returns for these images, with the ViT that they share run once for all of them.

    Outputs and gradients are the same as those of the adapters called one after the other, up to rounding. Dropout draws other masks of the same
    probability, and the adapters see the same ones in the ViT.

    Args:
        adapters: ``vit_pytorch.learnable_memory_vit.Adapter`` over one and the same ``vit``, as they are or accelerated.
        img: [B, channels, height, width].

    Returns:
        The logits [B, classes] of each adapter.

    Raises:
        ValueError: no adapter, or adapters over different ViTs.
        TypeError: something else than an adapter.
    """
    if not adapters:
        raise ValueError("run_adapters: adapters is empty; there must be at least one")
    for adapter in adapters:
        name = original_name(adapter)
        if name != ADAPTER:
            raise TypeError(f"run_adapters: adapters holds a {name}; it must hold {ADAPTER}")
    first: Any = adapters[0]
    vit = first.vit
    others: list[Any] = list(adapters)
    if any(adapter.vit is not vit for adapter in others):
        raise ValueError("run_adapters: adapters are over different ViTs; they must share one vit object")
    layers = frame_of(vit).layers
    memories = [adapter.memories_per_layer for adapter in others]
    rows = Rows(
        torch.stack([adapter.memory_cls_token for adapter in others]),
        project_memory(layers, memories, [False] * len(others)),
        tuple(memory.shape[1] for memory in memories),
    )
    base_grad = img.requires_grad or any(p.requires_grad for p in vit.parameters())
    # Not the ViT's head: nobody asked for it.
    _, tokens = run_beside(lambda: vit.transformer(vit.img_to_tokens(img)), layers, [rows], base_grad=base_grad)
    return [adapter.mlp_head(tokens[:, i]) for i, adapter in enumerate(others)]
