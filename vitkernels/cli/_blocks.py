"""The attention block by itself: each kind of a model's fused blocks on the input it gets there, against the original, with BatchNorm folded away
where its zoo can do that.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import accuracy, timing
from vitkernels.cli import _zoo

FOLDED, LIVE, ACCELERATED = "original, BatchNorm folded", "original", "accelerated"
MODES = ("forward", "forward+backward", "training")
# Blocks whose original is a chain of small operations worth a table of their own, by the op that replaces them.
OPS = ("cascaded_group_attention", "patch_attention")


@dataclass(frozen=True)
class Block:
    """One kind of block, in one mode.

    Attributes:
        model, batch, dtype: where it is from, and of its input.
        block: the path of the first of its kind, how many there are, and its input's shape.
        mode: ``forward`` and ``forward+backward``, in evaluation; ``training``.
        baseline: what it is measured against: :data:`FOLDED`, where BatchNorm is folded away in both, or :data:`LIVE`.
        error, original_error: of the output against float64, by the largest value.
        holds: whether the accuracy rule does.
        measured: the two, interleaved.
    """

    model: str
    batch: int
    dtype: str
    block: str
    mode: str
    baseline: str
    error: float
    original_error: float
    holds: bool
    measured: timing.Measurement

    def summary(self) -> dict[str, Any]:
        """As plain data: one row of a CSV."""
        row: dict[str, Any] = {name: getattr(self, name) for name in ("model", "batch", "dtype", "block", "mode", "baseline")}
        row |= {"error": self.error, "original_error": self.original_error, "accuracy_rule_holds": self.holds}
        for name in (self.baseline, ACCELERATED):
            row |= {
                f"{'accelerated' if name == ACCELERATED else 'original'}_{q}_ms": s * 1e3 for q, s in asdict(self.measured[name].quantiles).items()
            }
        speedup = self.measured.speedup(ACCELERATED, over=self.baseline)
        row |= {"speedup_p20": speedup.p20, "speedup_p50": speedup.p50, "speedup_p80": speedup.p80}
        return row | {"rounds_kept": self.measured.kept, "rounds_discarded": self.measured.discarded, "weak": self.measured.weak}


def _inputs(module: nn.Module, paths: Sequence[str], x: _zoo.Pixels) -> dict[str, Tensor]:
    """What each submodule gets when the model runs on ``x``."""
    seen: dict[str, Tensor] = {}

    def keeper(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: seen.update({path: arguments[0].detach().clone()})

    hooks = [module.get_submodule(path).register_forward_pre_hook(keeper(path)) for path in paths]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _folded(block: nn.Module) -> nn.Module:
    """A copy with every BatchNorm folded into the convolution before it, as timm itself does for deployment, where it does; folded in float64."""
    dtype = next(block.parameters()).dtype
    if not type(block).__module__.startswith("timm."):
        return copy.deepcopy(block)
    return importlib.import_module("timm.utils").reparameterize_model(copy.deepcopy(block).double()).to(dtype)


def _once(block: nn.Module, x: Tensor) -> Tensor:
    """The output, of a copy, because batch norm keeps statistics; dropout drops the same in every call."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        return copy.deepcopy(block)(x).detach()


def _step(block: nn.Module, x: Tensor, mode: str) -> Callable[[], Tensor]:
    if mode == "forward":
        return lambda: block(x)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    with torch.no_grad():
        grad = accuracy.output_gradient(block(x))
    # In eval mode timm takes its attention bias from a cache, which has no gradient.
    return lambda: torch.autograd.grad(block(x), wanted, grad, allow_unused=True)[0]


def compare(
    zoo_model: _zoo.ZooModel,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    modes: Sequence[str] = MODES,
    rounds: int = 20,
    budget: float = 6.0,
) -> list[Block]:
    """Every kind of fused block (:data:`OPS`) of a model on a batch of photos; nothing where it has none.

    Args:
        zoo_model: the model; it is copied, not changed.
        batch: images in the batch.
        dtype: of weights and input.
        device: where.
        modes: of :data:`MODES`.
        rounds: undisturbed timing rounds wanted.
        budget: seconds after which one timing stops, once three rounds are there.
    """
    original = copy.deepcopy(zoo_model.module).to(device=device, dtype=dtype).eval()
    fused = [record.path for record in vitkernels.accelerate(original, dry_run=True).replaced if record.op in OPS]
    paths = [path for path in fused if not any(path.startswith(f"{outer}.") for outer in fused)]
    pixels, _ = _zoo.images(zoo_model, batch)
    inputs = _inputs(original, paths, _zoo.to(pixels, device=device, dtype=dtype))
    kinds: dict[str, list[str]] = {}
    for path, x in inputs.items():
        kinds.setdefault("x".join(map(str, x.shape[1:])), []).append(path)
    found: list[Block] = []
    for shape, (path, *others) in kinds.items():
        for mode in modes:
            before = copy.deepcopy(original.get_submodule(path))
            exact = copy.deepcopy(before).double()
            if mode == "training":
                before.train()
                exact.train()
            else:
                before = _folded(before)
            baseline = LIVE if any(isinstance(m, nn.BatchNorm2d) for m in before.modules()) else FOLDED
            after = copy.deepcopy(before)
            vitkernels.accelerate(after)
            blocks = {baseline: before, ACCELERATED: after}
            x = inputs[path].requires_grad_(mode != "forward")
            with torch.no_grad():
                results = [_once(block, given) for block, given in ((after, x), (before, x), (exact, x.double()))]
            verdict = accuracy.compare_tensors("output", results[0], results[1], results[2])
            calls = {name: _step(block, x, mode) for name, block in blocks.items()}
            context: Any = torch.inference_mode if mode == "forward" else contextlib.nullcontext
            measured = timing.interleave(calls, rounds=rounds, budget=budget, device=device, contexts=dict.fromkeys(calls, context))
            label = f"{path}{f' and {len(others)} more' if others else ''}, {shape}"
            numbers = (baseline, verdict.relative_error, verdict.relative_eager_error, verdict.holds)
            found.append(Block(zoo_model.name, batch, str(dtype).removeprefix("torch."), label, mode, *numbers, measured))
    return found
