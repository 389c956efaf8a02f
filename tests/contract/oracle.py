"""What the contract compares with, and by which rule.

An op's fast path is never asked to equal the reference bit for bit. It is asked to be as near the truth as eager PyTorch is:

    max |fast - exact|  <=  2 max |eager - exact|  +  floor

``exact`` is the reference in float64 on the upcast inputs, ``eager`` the reference in the dtype of the inputs. The rule is FlashAttention's
(its tests allow 2 max |eager - exact| plus the rounding noise of adding a constant and taking it off again).

An error is one draw of rounding noise. Where the rule is broken both sides draw again, on inputs moved a little and against float64 on those same
inputs, until the medians settle it: see :mod:`vitkernels.accuracy`, which has the numbers.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels import accuracy, backends
from vitkernels.accuracy import Comparison
from vitkernels.registry import OpSpec, Sample, is_floating

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Target:
    """An op on a backend."""

    spec: OpSpec
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.spec.name}"

    @property
    def interpreted(self) -> bool:
        """True for Triton on CPU tensors: right but slow, so it gets the small samples and fewer of them."""
        return self.backend == "triton" and self.device == "cpu"

    def why_not(self, dtype: torch.dtype) -> str | None:
        return backends.why_not(self.spec.name, self.backend, torch.device(self.device), dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with vitkernels.backend(self.backend):
            return self.spec.function(*args, **kwargs)

    def samples(self, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> tuple[Sample, ...]:
        """The op's samples. They are shared between tests: use :func:`torch.autograd.grad`, not ``backward``."""
        return _samples(self.spec.name, self.spec.samples, dtype, self.device, grad, self.interpreted)

    def small(self, *, grad: bool = False) -> tuple[Sample, ...]:
        """The small ones in float32, as the interpreter gets them, for what does not depend on size."""
        return _samples(self.spec.name, self.spec.samples, torch.float32, self.device, grad, True)

    def every(self, step: int, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> tuple[Sample, ...]:
        """Every ``step``-th sample; in the interpreter, where a call takes a third of a second, a sixth of those."""
        return self.samples(dtype, grad=grad)[:: 6 * step if self.interpreted else step]

    def cases(self, dtype: torch.dtype, thin: bool) -> Iterator[Case]:
        """A case per sample; if ``thin`` one in six in the interpreter, and of the reference, which is compared with itself."""
        for index, sample in enumerate(self.samples(dtype)):
            if not (thin and (self.interpreted or self.backend == "reference") and index % 6):
                yield Case(self, dtype, index, sample.name)


@dataclass(frozen=True)
class Case:
    """One sample of a target in one dtype."""

    target: Target
    dtype: torch.dtype
    index: int
    name: str

    def __str__(self) -> str:
        return f"{self.target}-{str(self.dtype).removeprefix('torch.')}-{self.name}"

    def sample(self, *, grad: bool = False) -> Sample:
        return self.target.samples(self.dtype, grad=grad)[self.index]


@functools.cache
def _samples(_name: str, make: Callable[..., Iterator[Sample]], dtype: torch.dtype, device: str, grad: bool, small: bool) -> tuple[Sample, ...]:
    return tuple(make(dtype, device, grad=grad, small=small))


def mapped(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    """The sample with every floating tensor, those in lists included, replaced by ``change(tensor)``."""
    return sample.mapped(change)


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """The sample's values in another dtype, as leaves of their own."""
    return mapped(sample, lambda t: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad))


def autocast_by_hand(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> Sample:
    """:func:`cast`, but for the arguments that autocast leaves in their own dtype."""
    kept = {id(t) for name, t in sample.named_tensors(spec.function).items() if name.partition("[")[0] in spec.kept_by_autocast}
    return mapped(sample, lambda t: t.detach().to(t.dtype if id(t) in kept else dtype, copy=True).requires_grad_(t.requires_grad))


def every_tensor(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    """The sample with all its tensors replaced, integers and those inside a layout included."""

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            return replace(leaf, **{f.name: apply(getattr(leaf, f.name)) for f in fields(leaf)})
        return leaf

    args, kwargs = pytree.tree_map(apply, (sample.args, sample.kwargs))
    return replace(sample, args=args, kwargs=kwargs)


def one_changed(sample: Sample, tensor: Tensor, changed: Tensor) -> Sample:
    """The sample with ``changed`` in the place of one of its tensors."""
    return mapped(sample, lambda t: changed if t is tensor else t)


def function_of_tensors(function: Callable[..., Any], sample: Sample) -> Callable[..., Any]:
    """``function`` of the sample's tensors alone, one after the other as in :meth:`Sample.tensors`; everything else stays."""
    leaves, structure = pytree.tree_flatten((sample.args, sample.kwargs))

    def call(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(remaining) if is_floating(leaf) else leaf for leaf in leaves], structure)
        return function(*args, **kwargs)

    return call


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def cotangents(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A random gradient for each output, drawn afresh; drawn in float64, so that another dtype of the same test rounds the same numbers."""
    return tuple(torch.randn(o.shape, dtype=torch.float64, device=o.device).to(o.dtype) for o in outputs)


def differentiable(outputs: Sequence[Tensor], grads_out: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that require a gradient, and theirs."""
    pairs = [(output, grad) for output, grad in zip(outputs, grads_out, strict=True) if output.requires_grad]
    return [output for output, _ in pairs], [grad for _, grad in pairs]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads_out: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """:func:`torch.autograd.grad` over the outputs that are differentiable; nothing where no input is."""
    if not inputs:
        return ()
    wanted, grads = differentiable(outputs, grads_out)
    return torch.autograd.grad(wanted, inputs, grads)


def named_results(
    function: Callable[..., Any], sample: Sample, grads_out: Sequence[Tensor] | None = None, *, signature: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Every output and, given their cotangents, every gradient of a call, by name."""
    outputs = as_tuple(function(*sample.args, **sample.kwargs))
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if grads_out is not None:
        inputs = {name: t for name, t in sample.named_tensors(signature or function).items() if t.requires_grad}
        grads = gradients(outputs, list(inputs.values()), [g.to(o.dtype) for g, o in zip(grads_out, outputs, strict=True)])
        results |= {f"gradient of {name}": g for name, g in zip(inputs, grads, strict=True)}
    return results


def assert_whole(results: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Every output and gradient has eager's shape and dtype and is finite, or infinite where eager is: the logsumexp of no logit."""
    assert results.keys() == eager.keys()
    kinds, expected = ({name: (tuple(t.shape), str(t.dtype)) for name, t in some.items()} for some in (results, eager))
    assert kinds == expected, f"shapes and dtypes {kinds}, of eager {expected}"
    for name, tensor in results.items():
        wrong = (~torch.isfinite(tensor) & (tensor != eager[name])).sum().item()
        assert wrong == 0, f"{name}: {wrong} of {tensor.numel()} elements are not finite where eager's are"


def compared(fast: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> list[Comparison]:
    """Every output and gradient of a fast path beside eager's and float64's."""
    return [accuracy.compare_tensors(name, fast[name], eager[name], exact[name]) for name in exact]


def assert_all_hold(comparisons: Sequence[Comparison]) -> None:
    """Every comparison keeps the rule; what does not is told in numbers."""
    failures = [
        f"{c.name}: error {c.error:.3e}, eager's {c.eager_error:.3e}, allowed {c.allowed:.3e}, largest value {c.scale:.3e}"
        for c in comparisons
        if not c.holds
    ]
    assert not failures, "\n".join(failures)


def float64_verdict(
    sample: Sample, fast: dict[str, Tensor], eager: dict[str, Tensor], grads_out: Sequence[Tensor] | None, reference: Any
) -> list[Comparison]:
    """The rule in float64, where eager is the truth itself and there is no better one.

    For eager's error stands what a sum rounds to: a random walk of as many steps as it has terms, at most the elements of the largest tensor.
    (Against 80-bit arithmetic eager's error was 1e-13 where this says 3e-12, and the native kernel's 3e-14. float64 is there for gradcheck; how
    well a kernel sums is judged in float32, by the same code.) Where that is not enough, what a rounding step of the inputs changes: no
    computation can be held to it.
    """
    steps = max(t.numel() for t in sample.tensors()) ** 0.5
    walk = steps * torch.finfo(torch.float64).eps
    found = [replace(c, eager_error=walk * c.scale) for c in compared(fast, eager, eager)]
    if all(c.holds for c in found):
        return found
    moved = (named_results(reference, accuracy.jittered(sample, seed), grads_out) for seed in range(accuracy.REDRAWS[0]))
    changes = [compared(results, eager, eager) for results in moved]
    return [replace(c, eager_error=max(c.eager_error, *(change.error for change in same))) for c, *same in zip(found, *changes, strict=True)]


def assert_obeys_the_rule(target: Target, sample: Sample, grads_out: Sequence[Tensor] | None = None) -> None:
    """Run a sample on a target, on eager and on eager in float64, and compare; with gradients if any input requires them."""
    reference, inputs = target.spec.reference, sample.tensors()
    dtype = inputs[0].dtype
    if grads_out is None and any(t.requires_grad for t in inputs):
        with torch.no_grad():
            grads_out = cotangents(as_tuple(reference(*sample.args, **sample.kwargs)))
    eager = named_results(reference, sample, grads_out)
    exact = eager if dtype is torch.float64 else named_results(reference, cast(sample, torch.float64), grads_out)
    for name, value in eager.items():
        if value.isnan().any() or (value.isinf() & (value != exact[name])).any():
            pytest.skip(f"{sample.name}: {name} overflows {dtype} in eager, which leaves nothing to compare with")
    fast = named_results(target, sample, grads_out, signature=reference)
    assert_whole(fast, eager)
    if dtype is torch.float64:
        assert_all_hold(float64_verdict(sample, fast, eager, grads_out, reference))
        return

    def draw(number: int) -> list[Comparison]:
        moved, grads = accuracy.redrawn(sample, grads_out, number)
        ours, theirs = named_results(target, moved, grads, signature=reference), named_results(reference, moved, grads)
        return compared(ours, theirs, named_results(reference, cast(moved, torch.float64), grads))

    assert_all_hold(accuracy.settled(compared(fast, eager, exact), draw))


class RecordOps(TorchDispatchMode):
    """Collects every vitkernels op on tensors that runs inside the ``with`` block, with its raw arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace.startswith("vitkernels") and any(isinstance(a, Tensor) for a in args):
            assert not kwargs, f"{func} was called with keywords"
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def assert_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal to the last bit, NaN included."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name} differs, or is NaN in one alone")


def python(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with this vitkernels, installed or not, in a process of its own."""
    path = os.pathsep.join(filter(None, (str(Path(vitkernels.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=300
    )
