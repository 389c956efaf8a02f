"""Gradients against finite differences, in float64, through the kernels themselves (they are templates, so this is the code that runs in float32).

On one instruction set: on each of them test_forward_backward.py holds the same gradients, in float64, to the reference's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitkernels.registry import Sample

from .oracle import Case, Target, as_tuple, function_of_tensors, mapped

pytestmark = pytest.mark.derivative
_SLOW = 400  # elements up to which every entry of the Jacobian is differenced


def _check(target: Target, sample: Sample, *, fast_mode: bool) -> None:
    # gradcheck writes into its inputs: dense copies, since an expanded one shares its elements.
    dense = mapped(sample, lambda t: t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        # The logsumexp of no logit stays at -inf: no difference of two of them is a number.
        return tuple(output.masked_fill(output == -torch.inf, 0) for output in as_tuple(function_of_tensors(target, dense)(*tensors)))

    assert torch.autograd.gradcheck(function, dense.tensors(), fast_mode=fast_mode)


def _size(sample: Sample) -> int:
    return sum(t.numel() for t in sample.tensors())


@pytest.mark.fused
@pytest.mark.dtypes(torch.float64)
def test_projected_jacobian(case: Case) -> None:
    _check(case.target, case.sample(grad=True), fast_mode=True)


@pytest.mark.dtypes(torch.float64)
def test_every_entry_of_the_jacobian(target: Target) -> None:
    reason = target.why_not(torch.float64)
    if reason is not None:
        pytest.skip(reason)
    small = [s for s in target.samples(torch.float64, grad=True) if 0 < _size(s) <= _SLOW]
    assert small, "the op has no sample small enough"
    for sample in small:
        _check(target, sample, fast_mode=False)
