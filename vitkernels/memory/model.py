"""``MemoryViT``: tasks beside a frozen ViT, each trained by itself, all of them run together."""

from __future__ import annotations

import hashlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels.integrations import blocks
from vitkernels.memory.beside import Rows, project_memory, run_beside
from vitkernels.memory.layers import Frame, frame_of
from vitkernels.nn import _derived
from vitkernels.nn._folded import layers_one_by_one
from vitkernels.ops import _define

_FORMAT = "vitkernels.memory.task.1"


class MemoryOutput(NamedTuple):
    """What a :class:`MemoryViT` returns.

    Attributes:
        base: what the ViT itself returns, to the bit, whatever the tasks. Of an accelerated ViT: what it returns here with no tasks, in the same
            mode. By itself it may leave out tokens that nobody reads, and with gradients its layers run one by one, which rounds another way.
        tasks: logits [B, classes] of each task, by name.
    """

    base: Any
    tasks: dict[str, Tensor]


class MemoryTask(nn.Module):
    """What one task adds to a ViT: a class token, memory in every layer, and a head. All of it is trained; some kilobytes.

    Args:
        layers: of the ViT.
        dim: its width C.
        num_classes: of the head.
        memories: tokens of memory a layer, m.
        norm_memory: whether the memory passes each layer's norm with the tokens, as in the paper (section 3.1: a layer sees it as one more input);
            vit_pytorch's ``Adapter`` does not norm it.

    Attributes:
        class_token: [C], as it enters the first layer.
        memory: [L, m, C], drawn from N(0, 0.02) as the paper has it.
        norm: LayerNorm of the class token after the last layer.
        head: Linear to the logits.
    """

    def __init__(self, layers: int, dim: int, num_classes: int, memories: int = 10, *, norm_memory: bool = True) -> None:
        super().__init__()
        for name, value, least in (("layers", layers, 1), ("dim", dim, 1), ("num_classes", num_classes, 1), ("memories", memories, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"MemoryTask: {name} is {value!r}; it must be an integer, at least {least}")
        self.norm_memory = norm_memory
        self.class_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.memory = nn.Parameter(torch.empty(layers, memories, dim).normal_(std=0.02))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, classes] of the class token after the last layer, [B, C]."""
        return self.head(self.norm(tokens))


class MemoryViT(nn.Module):
    """A ViT and any number of tasks beside it.

    The ViT runs as ever, once, and its outputs are the same to the bit with no, one or many tasks: nothing it computes depends on them (the attention
    masking of the paper, section 3.2). Each task is one more row through every layer, that sees the ViT's tokens, itself and the task's memory, and
    nothing of the other tasks: tasks that were trained apart, here or elsewhere, are simply put side by side. In training the backward passes through
    those rows alone.

    Args:
        vit: timm's ``VisionTransformer``, transformers' ``ViTModel`` or ``ViTForImageClassification``, vit_pytorch's ``vit.ViT`` or
            ``learnable_memory_vit.ViT``; also after :func:`vitkernels.accelerate`. Others, and other layers inside, are refused.
        freeze: take its parameters out of training and keep it in evaluation mode, whatever mode this module is in. Otherwise gradients reach it, and
            training it changes what the tasks were trained on.
        apart: let no two tasks share a matrix product. How a product rounds may depend on how many rows it has: with this, a task's logits, too, are
            the same to the bit whatever other tasks there are. It costs about what as many models of one token would.

    Attributes:
        vit: the ViT.
        tasks: :class:`MemoryTask` by name.

    While evaluating without gradients, each layer's keys and values of all memory are kept until a weight changes. On the CPU, where a layer's
    modules are plain, so are its packed weights, and the tasks' rows pass it in four native calls. Hooks wait on the ViT's layers during a call: a
    ViT inside ``torch.compile`` is not supported, and hooks of your own on what is inside a layer see the tasks' rows, too.

    Paper: Fine-tuning Image Transformers using Learnable Memory, arXiv 2203.15243.
    """

    def __init__(self, vit: nn.Module, *, freeze: bool = True, apart: bool = False) -> None:
        super().__init__()
        frame = frame_of(vit)
        self.vit = vit
        self.tasks: nn.ModuleDict = nn.ModuleDict()
        self.frozen, self.apart = freeze, apart
        self._layers, self._dim = len(frame.layers), frame.width
        if freeze:
            vit.requires_grad_(False)
            vit.eval()

    def train(self, mode: bool = True) -> MemoryViT:
        """As :meth:`torch.nn.Module.train`, of the tasks alone if the ViT is frozen."""
        super().train(mode)
        if self.frozen:
            self.vit.eval()
        return self

    def add_task(self, name: str, num_classes: int, memories: int = 10, *, norm_memory: bool = True) -> MemoryTask:
        """A new task, whose class token starts as the ViT's own, and its norm as the ViT's last one.

        Args:
            name: of the task.
            num_classes: of its head.
            memories: tokens of memory a layer.
            norm_memory: see :class:`MemoryTask`.

        Raises:
            ValueError: a task of this name is there already, or a size is none.
        """
        self._check_new(name)
        task = MemoryTask(self._layers, self._dim, num_classes, memories, norm_memory=norm_memory)
        frame = frame_of(self.vit)
        with torch.no_grad():
            if frame.class_token is not None:
                task.class_token.copy_(frame.class_token)
            if isinstance(frame.norm, nn.LayerNorm) and frame.norm.elementwise_affine and frame.norm.bias is not None:
                task.norm.weight.copy_(frame.norm.weight)
                task.norm.bias.copy_(frame.norm.bias)
                task.norm.eps = frame.norm.eps
        self.tasks[name] = task.to(next(self.vit.parameters()))
        return task

    def attach(self, name: str, task: MemoryTask) -> MemoryTask:
        """Put a task that is there already, from another model over the same ViT, beside the others.

        Raises:
            ValueError: a task of this name is there already, or it is for another width or number of layers.
            TypeError: not a :class:`MemoryTask`.
        """
        self._check_new(name)
        if not isinstance(task, MemoryTask):
            raise TypeError(f"MemoryViT: task is a {type(task).__name__}; it must be a MemoryTask")
        layers, memories, dim = task.memory.shape
        if (layers, dim) != (self._layers, self._dim):
            raise ValueError(f"MemoryViT: task has memory [{layers}, {memories}, {dim}]; it must be [{self._layers}, m, {self._dim}] for this ViT")
        self.tasks[name] = task
        return task

    def _check_new(self, name: str) -> None:
        if name in self.tasks:
            raise ValueError(f"MemoryViT: name is {name!r}, which is a task already; it must be new (`del model.tasks[name]` takes one out)")

    def save_task(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write one task, without the ViT, and a fingerprint of the ViT's weights.

        Raises:
            ValueError: no task of this name.
        """
        if name not in self.tasks:
            raise ValueError(f"MemoryViT: name is {name!r}; it must be one of the tasks, {', '.join(map(repr, self.tasks))}")
        task: Any = self.tasks[name]
        state = {key: value.detach().cpu() for key, value in task.state_dict().items()}
        content = {
            "format": _FORMAT,
            "name": name,
            "norm_memory": task.norm_memory,
            "norm_eps": task.norm.eps,
            "vit": self._fingerprint(),
            "state": state,
        }
        torch.save(content, path)

    def load_task(self, path: str | os.PathLike[str], name: str | None = None, *, check_vit: bool = True) -> MemoryTask:
        """Read a task that :meth:`save_task` wrote and put it beside the others. Only tensors and plain values are read, no code.

        Args:
            path: the file.
            name: another name than it was saved under.
            check_vit: refuse it if the ViT's weights are not those it was trained on. They may differ on purpose, after ``half()`` for example.

        Raises:
            ValueError: not such a file, a name that is taken, another ViT.
        """
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"MemoryViT: {path} is not a task; it must be a file that save_task wrote")
        if check_vit and content["vit"] != self._fingerprint():
            raise ValueError(f"MemoryViT: {path} was trained on other weights than this ViT has; it must be the same ViT (or check_vit=False)")
        layers, memories, dim = content["state"]["memory"].shape
        task = MemoryTask(layers, dim, content["state"]["head.bias"].shape[0], memories, norm_memory=content["norm_memory"])
        task.norm.eps = content["norm_eps"]
        task.load_state_dict(content["state"])
        return self.attach(content["name"] if name is None else name, task.to(next(self.vit.parameters())))

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key, value in sorted(self.vit.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def forward(self, *args: Any, **kwargs: Any) -> MemoryOutput:
        """Call the ViT with these arguments and all tasks beside it."""
        kept = _KEPT.entry(self)
        whole = self._runs_whole(kept.plan)
        if not self.tasks:
            how = blocks.with_tasks(kept.plan.stack, None) if whole else layers_one_by_one()
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._base_grad(args, kwargs)), how:
                return MemoryOutput(self.vit(*args, **kwargs), {})
        rows = self._rows(kept)
        base, tokens = None, None
        if whole:
            memory = rows[0].stacked() if self.training else kept.value("stacked", rows[0].stacked)
            tasks = blocks.Tasks(rows[0].tokens, memory)
            with blocks.with_tasks(kept.plan.stack, tasks):
                base = self.vit(*args, **kwargs)
            tokens = tasks.result
        if tokens is None:
            base, tokens = run_beside(lambda: self.vit(*args, **kwargs), kept.plan.layers, rows, base_grad=self._base_grad(args, kwargs))
        return MemoryOutput(base, {name: task(tokens[:, t]) for t, (name, task) in enumerate(self.tasks.items())})

    def _runs_whole(self, frame: Frame) -> bool:
        """Whether the layers of an accelerated ViT run as one call, tasks included, and with none: so that its outputs are the same."""
        like = next(self.vit.parameters())
        if self.apart or not isinstance(frame.stack, blocks.OfTokens):
            return False
        return all(layer.takes_tasks(like) for layer in frame.layers)

    def _base_grad(self, args: Any, kwargs: Any) -> bool:
        """Whether somebody may want a gradient of what the ViT computes."""
        given = (*args, *kwargs.values())
        return any(p.requires_grad for p in self.vit.parameters()) or any(isinstance(x, Tensor) and x.requires_grad for x in given)

    def _rows(self, kept: Any) -> list[Rows]:
        """The tasks that pass through the layers together, with the keys and values of their memory."""
        tasks: list[Any] = list(self.tasks.values())

        def of(some: list[Any]) -> Rows:
            memory = project_memory(kept.plan.layers, [task.memory for task in some], [task.norm_memory for task in some])
            return Rows(torch.stack([task.class_token for task in some]), memory, tuple(task.memory.shape[1] for task in some))

        def make() -> list[Rows]:
            return [of([task]) for task in tasks] if self.apart else [of(tasks)]

        if self.training or torch.is_grad_enabled():
            return make()
        return kept.value(_define.autocast_of(tasks[0].memory), make)


def _settings(model: MemoryViT) -> Any:
    tasks: Any = model.tasks.items()
    return model.apart, [(name, task.norm_memory) for name, task in tasks]


_KEPT: _derived.Derived[Frame, Any] = _derived.Derived(lambda model: frame_of(model.vit), _settings)
