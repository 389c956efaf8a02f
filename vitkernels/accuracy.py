"""The rule every kernel is held to, and what it is measured with.

The error of a fast path against float64 may be at most twice the error of the same eager math run in the input dtype, plus two rounding steps of the
largest value: one for the result itself, one for a term as large that is summed in another order. Nothing in it is chosen by hand: the numbers come
from the data.

An error is a draw of rounding noise, and among hundreds of small tensors some draws are lucky, for either side: of two ways to write cascaded group
attention in plain PyTorch, one breaks the rule against the other in 1 % of all float32 tensors, though their errors are equal in the median. So where
the rule is broken both sides draw again, on inputs and output gradients moved by a quarter (float64 on the same ones), and the median errors of the
new draws count. The first is not among them: it was picked because it broke the rule.

How many draws? In small tensors the ratio of the two errors varies from draw to draw by a factor of two (in the gradients of a cascaded group
attention of four channels, a standard deviation of 0.77 in its logarithm), and the ratio of medians of n draws by 0.96 / sqrt(n): 0.24 for 16,
0.06 for 256. Of 1270 tensors of the native kernels' random calls the worst has medians at 0.76 of what the rule allows, half are below 0.39. At 0.8,
16 draws call the rule broken one time in six, 256 draws one time in ten thousand. So it is broken only if the medians of 16, of 64 and of 256 draws
all say so, or if each one of 16 draws breaks it: so do a defect's (sums rounded to bfloat16 are off by ten thousand times eager's error), and those
of noise that breaks it every second time do once in 65536.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels.registry import Sample

Function = Callable[..., Any]
REDRAWS = (16, 64, 256)  # draws after which the medians are looked at
REDRAW_STEP = 1 / 4  # exact in every dtype; by a sixteenth, medians of nine draws still kept some of the first one


@dataclass(frozen=True)
class Comparison:
    """One tensor (an output or a gradient) of a fast path and of eager, both against float64.

    Attributes:
        name: ``output``, ``grad x`` and so on.
        error: largest absolute error of the fast path.
        eager_error: the same for eager math in the input dtype.
        scale: largest absolute float64 value.
        floor: two rounding steps of ``scale`` in the input dtype.
    """

    name: str
    error: float
    eager_error: float
    scale: float
    floor: float

    @property
    def allowed(self) -> float:
        """The largest error that keeps the rule."""
        return 2 * self.eager_error + self.floor

    @property
    def holds(self) -> bool:
        """Whether the rule holds."""
        return self.error <= self.allowed

    @property
    def badness(self) -> float:
        """Error as a multiple of what the rule allows: above 1 it is broken."""
        return self.error / self.allowed if self.allowed > 0 else float("inf") if self.error > 0 else 0.0

    @property
    def relative_error(self) -> float:
        """:attr:`error` by :attr:`scale`."""
        return self.error / self.scale if self.scale > 0 else self.error

    @property
    def relative_eager_error(self) -> float:
        """:attr:`eager_error` by :attr:`scale`."""
        return self.eager_error / self.scale if self.scale > 0 else self.eager_error


def compare_tensors(name: str, fast: Tensor, eager: Tensor, exact: Tensor) -> Comparison:
    """Judge one tensor. ``exact`` is float64; ``fast`` and ``eager`` are of one dtype.

    Where eager itself is not finite (float16 overflows) nothing is asked of the fast path; where eager is finite and the fast path is not, the
    error is infinite.

    Raises:
        ValueError: the shapes differ.
    """
    if not fast.shape == eager.shape == exact.shape:
        raise ValueError(f"{name} has shape {list(fast.shape)}, eager {list(eager.shape)}, float64 {list(exact.shape)}")
    judged = eager.detach().isfinite() & exact.detach().isfinite()
    if not bool(judged.any()):
        return Comparison(name, 0.0, 0.0, 0.0, 0.0)
    exact = exact.detach()[judged]
    scale = float(exact.abs().max())
    error = (fast.detach()[judged].double() - exact).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max()
    eager_error = (eager.detach()[judged].double() - exact).abs().max()
    return Comparison(name, float(error), float(eager_error), scale, 2 * torch.finfo(eager.dtype).eps * scale)


def settled(first: list[Comparison], draw: Callable[[int], list[Comparison]]) -> list[Comparison]:
    """The verdict on a call's tensors: ``first``, or, where that breaks the rule by a finite error, the medians of as many more draws as it takes.

    Args:
        first: the comparisons of the call itself.
        draw: the same comparisons on the redraw of that number, see :func:`redrawn`.
    """
    if all(c.holds for c in first) or any(c.error == float("inf") for c in first):
        return first
    draws: list[list[Comparison]] = []
    medians = first
    for count in REDRAWS:
        draws += [draw(number) for number in range(len(draws), count)]
        medians = [_median(same) for same in zip(*draws, strict=True)]
        always_broken = any(not any(c.holds for c in same) for same in zip(*draws, strict=True))
        if always_broken or all(c.holds for c in medians):
            break
    return medians


def _median(same: Sequence[Comparison]) -> Comparison:
    """One tensor's draws as one comparison."""
    error, eager_error, scale, floor = (statistics.median(getattr(c, name) for c in same) for name in ("error", "eager_error", "scale", "floor"))
    return Comparison(same[0].name, error, eager_error, scale, floor)


def as_float64(sample: Sample) -> Sample:
    """The same values in float64, on the same device, as leaves of their own."""
    return sample.mapped(lambda tensor: tensor.detach().double().requires_grad_(tensor.requires_grad))


def with_grad(sample: Sample) -> Sample:
    """The same tensors as new leaves that require a gradient, but for the buffers."""
    buffers = [id(sample.kwargs[name]) for name in sample.buffers]
    return sample.mapped(lambda tensor: tensor.detach().requires_grad_(id(tensor) not in buffers))


def jittered(sample: Sample, seed: int, step: float | None = None) -> Sample:
    """The same call with every element up or down by ``step`` times itself, at random; default one rounding step. Strides stay as they are."""
    generator = torch.Generator().manual_seed(seed)

    def move(tensor: Tensor) -> Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1).to(tensor)
        values = tensor.detach() * (1 + (step or torch.finfo(tensor.dtype).eps) * signs)
        return _in_layout_of(tensor, values).requires_grad_(tensor.requires_grad)

    return sample.mapped(move)


def redrawn(sample: Sample, grad_outputs: Sequence[Tensor] | None, number: int) -> tuple[Sample, tuple[Tensor, ...] | None]:
    """Another draw of a call and of the gradients of its outputs: the same kind of numbers in the same layouts, rounding differently."""
    grads = None if grad_outputs is None else jittered(Sample("", tuple(grad_outputs)), 2 * number, REDRAW_STEP).args
    return jittered(sample, 2 * number + 1, REDRAW_STEP), grads


def _in_layout_of(like: Tensor, values: Tensor) -> Tensor:
    """``values`` under the strides of ``like``, in memory of their own that is NaN in the gaps; of an expanded dimension the first values."""
    if not like.numel():
        return values
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    moved = values.new_full((extent,), torch.nan).as_strided(like.shape, like.stride())
    distinct = tuple(slice(1) if stride == 0 else slice(None) for stride in like.stride())
    moved[distinct].copy_(values[distinct])
    return moved


def leaves(sample: Sample) -> list[Tensor]:
    """The tensors of a sample that want a gradient."""
    return [t for t in sample.tensors() if t.requires_grad]


def gradient_names(function: Function, sample: Sample) -> list[str]:
    """``grad x``, ``grad qkv_weights[1]`` and so on, in the order of :func:`leaves`."""
    return [f"grad {name}" for name, tensor in sample.named_tensors(function).items() if tensor.requires_grad]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """An op's outputs as a tuple: most have one."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def output_gradient(output: Tensor) -> Tensor:
    """A fixed random gradient for ``output``: the same numbers for every dtype that can hold them, in the layout of ``output``."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    return torch.empty_like(output, requires_grad=False).copy_(values.to(output.device))


def output_gradients(result: Any) -> tuple[Tensor, ...]:
    """:func:`output_gradient` of every output of an op."""
    return tuple(map(output_gradient, as_tuple(result)))


def gradients(result: Any, wanted: Sequence[Tensor], grad_outputs: Sequence[Tensor], *, allow_unused: bool = False) -> tuple[Tensor, ...]:
    """The gradient of every tensor in ``wanted``, given those of an op's outputs; of outputs that are not differentiable it is not used."""
    if not wanted:
        return ()
    pairs = [(output, grad) for output, grad in zip(as_tuple(result), grad_outputs, strict=True) if output.requires_grad]
    return torch.autograd.grad([output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=allow_unused)


def evaluate(function: Function, sample: Sample, grad_outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The outputs of a call, then, if ``grad_outputs`` are given, every gradient."""
    outputs = as_tuple(function(*sample.args, **sample.kwargs))
    if grad_outputs is None:
        return [*outputs]
    grad_outputs = [grad.to(output.dtype) for grad, output in zip(grad_outputs, outputs, strict=True)]
    return [*outputs, *gradients(outputs, leaves(sample), grad_outputs)]


class Judge:
    """Float64 and eager results of one call, computed once; every fast path is then judged against them.

    Attributes:
        grad_outputs: the gradients of the outputs that were used, in the outputs' own dtypes; ``None`` if no tensor of the sample requires one.

    Args:
        reference: the definition, in plain PyTorch.
        sample: the call. Gradients are judged for its tensors that require one.
        names: the public function, whose parameter names the gradients carry. Default ``reference``.
    """

    def __init__(self, reference: Function, sample: Sample, names: Function | None = None) -> None:
        self._reference, self._sample = reference, sample
        self.grad_outputs: tuple[Tensor, ...] | None = None
        if leaves(sample):
            with torch.no_grad():
                self.grad_outputs = output_gradients(reference(*sample.args, **sample.kwargs))
        self._eager = evaluate(reference, sample, self.grad_outputs)
        self._exact = evaluate(reference, as_float64(sample), self.grad_outputs)
        gradient = gradient_names(names or reference, sample)
        outputs = len(self._eager) - len(gradient)
        self._names = [*(["output"] if outputs == 1 else [f"output {i}" for i in range(outputs)]), *gradient]

    def __call__(self, function: Function) -> list[Comparison]:
        """Judge ``function`` on the same call: the outputs, then every gradient."""

        def draw(number: int) -> list[Comparison]:
            moved, grad_outputs = redrawn(self._sample, self.grad_outputs, number)
            eager, exact = (evaluate(self._reference, call, grad_outputs) for call in (moved, as_float64(moved)))
            return self._compared(evaluate(function, moved, grad_outputs), eager, exact)

        return settled(self._compared(evaluate(function, self._sample, self.grad_outputs), self._eager, self._exact), draw)

    def _compared(self, fast: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> list[Comparison]:
        return [compare_tensors(*four) for four in zip(self._names, fast, eager, exact, strict=True)]


def worst(comparisons: Sequence[Comparison] | Iterator[Comparison]) -> Comparison:
    """The comparison nearest to breaking the rule, or furthest beyond it."""
    return max(comparisons, key=lambda c: c.badness)
