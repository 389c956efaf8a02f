"""The rule every kernel is held to, and what it is measured with.

The error of a fast path against float64 may be at most twice the error of the same eager math run in the input dtype, plus two rounding steps of the
largest value: one for the result itself, one for a term as large that is summed in another order. Nothing in it is chosen by hand: the numbers come
from the data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels.registry import Sample

Function = Callable[..., Any]


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
    def holds(self) -> bool:
        """Whether the rule holds."""
        return self.error <= 2 * self.eager_error + self.floor

    @property
    def badness(self) -> float:
        """Error as a multiple of what the rule allows: above 1 it is broken."""
        allowed = 2 * self.eager_error + self.floor
        return self.error / allowed if allowed > 0 else float("inf") if self.error > 0 else 0.0

    @property
    def relative_error(self) -> float:
        """:attr:`error` by :attr:`scale`."""
        return self.error / self.scale if self.scale > 0 else self.error

    @property
    def relative_eager_error(self) -> float:
        """:attr:`eager_error` by :attr:`scale`."""
        return self.eager_error / self.scale if self.scale > 0 else self.eager_error


def compare_tensors(name: str, fast: Tensor, eager: Tensor, exact: Tensor) -> Comparison:
    """Judge one tensor. ``exact`` is float64; ``fast`` and ``eager`` are in the input dtype.

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


def as_float64(sample: Sample) -> Sample:
    """The same values in float64, on the same device, as leaves of their own."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return Sample(sample.name, tuple(map(convert, sample.args)), {k: convert(v) for k, v in sample.kwargs.items()})


def with_grad(sample: Sample) -> Sample:
    """The same tensors as new leaves that require a gradient."""

    def leaf(value: Any) -> Any:
        return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Sample(sample.name, tuple(map(leaf, sample.args)), {k: leaf(v) for k, v in sample.kwargs.items()})


def leaves(sample: Sample) -> list[Tensor]:
    """The tensors of a sample that want a gradient."""
    return [t for t in sample.tensors() if t.requires_grad]


def gradient_names(function: Function, sample: Sample) -> list[str]:
    """``grad x`` and so on, in the order of :func:`leaves`."""
    bound = inspect.signature(function).bind(*sample.args, **sample.kwargs)
    return [f"grad {name}" for name, value in bound.arguments.items() if isinstance(value, Tensor) and value.requires_grad]


def output_gradient(output: Tensor) -> Tensor:
    """A fixed random gradient for ``output``: the same numbers for every dtype that can hold them, in the layout of ``output``."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    return torch.empty_like(output, requires_grad=False).copy_(values.to(output.device))


def evaluate(function: Function, sample: Sample, grad_output: Tensor | None = None) -> list[Tensor]:
    """The output of a call, then, if ``grad_output`` is given, every gradient."""
    output = function(*sample.args, **sample.kwargs)
    if grad_output is None:
        return [output]
    wanted = leaves(sample)
    return [output, *torch.autograd.grad(output, wanted, grad_output.to(output.dtype))] if wanted else [output]


class Judge:
    """Float64 and eager results of one call, computed once; every fast path is then judged against them.

    Attributes:
        grad_output: the gradient of the output that was used, in the input dtype; ``None`` if no tensor of the sample requires one.

    Args:
        reference: the definition, in plain PyTorch.
        sample: the call. Gradients are judged for its tensors that require one.
        names: the public function, whose parameter names the gradients carry. Default ``reference``.
    """

    def __init__(self, reference: Function, sample: Sample, names: Function | None = None) -> None:
        self._sample = sample
        self._names = ["output"]
        self.grad_output: Tensor | None = None
        if leaves(sample):
            with torch.no_grad():
                self.grad_output = output_gradient(reference(*sample.args, **sample.kwargs))
            self._names += gradient_names(names or reference, sample)
        self._eager = evaluate(reference, sample, self.grad_output)
        grad_output = None if self.grad_output is None else self.grad_output.double()
        self._exact = evaluate(reference, as_float64(sample), grad_output)

    def __call__(self, function: Function) -> list[Comparison]:
        """Judge ``function`` on the same call: the output, then every gradient."""
        fast = evaluate(function, self._sample, self.grad_output)
        return [compare_tensors(*four) for four in zip(self._names, fast, self._eager, self._exact, strict=True)]


def worst(comparisons: Sequence[Comparison] | Iterator[Comparison]) -> Comparison:
    """The comparison nearest to breaking the rule, or furthest beyond it."""
    return max(comparisons, key=lambda c: c.badness)
