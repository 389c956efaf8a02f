"""Learnable memory: one frozen vision transformer, many tasks (Sandler et al., arXiv 2203.15243).

:class:`MemoryViT` puts tasks, each a class token, some memory in every layer and a head, beside a ViT of timm, transformers or vit_pytorch, which
runs once for all of them and whose outputs they do not change in a single bit. :func:`run_adapters` does the same for vit_pytorch's ``Adapter``.
"""

from vitkernels.memory.adapters import run_adapters
from vitkernels.memory.model import MemoryOutput, MemoryTask, MemoryViT

__all__ = ["MemoryOutput", "MemoryTask", "MemoryViT", "run_adapters"]
