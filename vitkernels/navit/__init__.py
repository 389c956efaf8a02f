"""NaViT: vision transformers on images of any sizes, packed (Patch n' Pack, arXiv 2307.06304).

From images to a loss: :class:`ResolutionSampler` and :class:`TokenDrop` in a :class:`PackedCollate`, which patchifies and packs; :class:`NaViT` on
the :class:`PackedBatch` it makes, or on a plain list of images; :func:`contrastive_loss` over all processes.
"""

from vitkernels.navit.collate import PackedCollate
from vitkernels.navit.contrastive import contrastive_loss
from vitkernels.navit.dropping import BetaTokenDrop, ResolutionTokenDrop, TokenDrop
from vitkernels.navit.model import NaViT
from vitkernels.navit.packing import pack, padding
from vitkernels.navit.patchify import PackedBatch, patchify
from vitkernels.navit.pooling import AttentionPooling
from vitkernels.navit.position import FactorizedPositionEmbedding
from vitkernels.navit.resolution import ResolutionSampler

__all__ = [
    "AttentionPooling",
    "BetaTokenDrop",
    "FactorizedPositionEmbedding",
    "NaViT",
    "PackedBatch",
    "PackedCollate",
    "ResolutionSampler",
    "ResolutionTokenDrop",
    "TokenDrop",
    "contrastive_loss",
    "pack",
    "padding",
    "patchify",
]
