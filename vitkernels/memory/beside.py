"""The pass: class tokens of tasks carried through a ViT's layers beside its own tokens, which do not know of them.

The model is called as its user calls it. While it runs, hooks take the keys and values of its tokens as they pass by, and behind each layer the class
tokens go through the same layer, as rows [B, T, C] of their own: T queries against the model's keys, their own, and their task's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels import ops
from vitkernels.memory.layers import Layer
from vitkernels.nn._folded import layers_one_by_one
from vitkernels.ops.blocks.reference import Memory

MemoryKV = tuple[Tensor, Tensor]
"""A layer's keys and values of some tasks' memory, [M, H, D] each."""


class Rows(NamedTuple):
    """The class tokens of some tasks, which pass through the layers together.

    Attributes:
        tokens: [T, C], as they enter the first layer.
        memory: of each layer, of these tasks.
        groups: how much of it is each task's.
    """

    tokens: Tensor
    memory: Sequence[MemoryKV]
    groups: tuple[int, ...]

    def stacked(self) -> Memory:
        """The memory of all layers together."""
        k, v = (torch.stack(side) for side in zip(*self.memory, strict=True))
        return Memory(k, v, self.groups)


class _Pass:
    """What one call of the model knows."""

    def __init__(self, layers: Sequence[Layer], rows: Sequence[Rows]) -> None:
        self.layers, self.rows = layers, rows
        self.x = [r.tokens[None] for r in rows]  # [1, T, C], from the first layer on [B, T, C]
        self.graded = torch.is_grad_enabled()
        # Before there are hooks of this pass, which would keep their weights from being packed.
        self._passes = [layer.passes(self.x[0]) for layer in layers]
        self.done = 0
        self._outputs: dict[int, Tensor] = {}
        self._busy = False  # with the class tokens, which call the same modules
        self._thread = threading.get_ident()

    def hooks(self) -> list[Any]:
        handles = []
        for index, layer in enumerate(self.layers):
            for slot, source in enumerate(layer.sources):
                handles.append(source.register_forward_hook(self._keep(index, slot)))
            handles.append(layer.last.register_forward_hook(self._step(index)))
        return handles

    def _mine(self, index: int) -> bool:
        return not self._busy and index == self.done and threading.get_ident() == self._thread

    def _keep(self, index: int, slot: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if self._mine(index):
                self._outputs[slot] = output

        return hook

    def _step(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not self._mine(index):
                return
            layer = self.layers[index]
            if len(self._outputs) != len(layer.sources):
                raise RuntimeError(f"memory: layer {index} of vit did not call its projections of keys and values; it must call them as modules")
            outputs = tuple(self._outputs[slot] for slot in range(len(layer.sources)))
            self._outputs = {}
            self._busy = True
            try:
                with torch.set_grad_enabled(self.graded):
                    k, v = layer.keys(outputs)
                    self.x = [self._layer(index, x, k, v, *r.memory[index], r.groups) for x, r in zip(self.x, self.rows, strict=True)]
            finally:
                self._busy = False
            self.done += 1

        return hook

    def _layer(self, index: int, x: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, groups: tuple[int, ...]) -> Tensor:
        layer, passes = self.layers[index], self._passes[index]
        x = x.expand(k.shape[0], -1, -1)
        normed = x if passes else layer.norm(x)
        q, own_k, own_v = layer.split(_of_map(passes[0](_as_map(x)))) if passes else layer.project(normed)
        options: Any = {"groups": groups, "scale": layer.scale, "dropout_p": layer.dropout()}
        found = ops.memory_attention(q, k, v, memory_k, memory_v, own_k=own_k, own_v=own_v, **options)
        assert isinstance(found, Tensor)
        attended = found.transpose(1, 2).flatten(2)
        if not passes:
            return layer.finish(x, normed, attended)
        y = passes[1](_as_map(attended), _as_map(x))
        return _of_map(passes[2](y, y))


def _as_map(tokens: Tensor) -> Tensor:
    """[B, N, C] as [B, C, 1, N] in channels_last."""
    return tokens.contiguous().mT.unsqueeze(2)


def _of_map(x: Tensor) -> Tensor:
    return x.squeeze(2).mT


def run_beside(call: Callable[[], Any], layers: Sequence[Layer], rows: Sequence[Rows], *, base_grad: bool) -> tuple[Any, Tensor]:
    """Call the model, and carry class tokens along.

    Args:
        call: calls the model.
        layers: of the model.
        rows: the class tokens, those together that share products.
        base_grad: whether a gradient may be wanted of what the model itself computes. Without, it runs under ``torch.no_grad``: its tokens do not
            depend on any task, and the backward of the tasks passes through their own rows alone.

    Returns:
        What the model returns, and all class tokens after the last layer, [B, T, C].

    Raises:
        RuntimeError: the model did not run all of its layers, once and in their order.
    """
    beside = _Pass(layers, rows)
    handles = beside.hooks()
    try:
        with torch.set_grad_enabled(beside.graded and base_grad), layers_one_by_one():
            base = call()
    finally:
        for handle in handles:
            handle.remove()
    if beside.done != len(layers):
        raise RuntimeError(f"memory: vit ran {beside.done} of its {len(layers)} layers in this call; it must run all, once and in their order")
    return base, beside.x[0] if len(rows) == 1 else torch.cat(beside.x, dim=1)


def project_memory(layers: Sequence[Layer], memory: Sequence[Tensor], normed: Sequence[bool]) -> list[MemoryKV]:
    """Layer by layer, keys and values [M, H, D] of the memory of some tasks, [L, m, C] each, in one projection. Of those in ``normed`` it passes the
    layer's norm first.
    """
    found = []
    for index, layer in enumerate(layers):
        rows = [layer.norm(m[index]) if norm else m[index] for m, norm in zip(memory, normed, strict=True)]
        _, k, v = layer.project(torch.cat(rows)[None])
        found.append((k[0].transpose(0, 1), v[0].transpose(0, 1)))
    return found
