"""``torch.library.opcheck`` on the raw ops, forward and backward, with the arguments that the public function gives them.

It checks that the schema tells the truth (no hidden mutation, no output aliasing an input), that the fake kernel predicts shape, stride, dtype and
device, that autograd is registered the right way, and that AOTAutograd with symbolic shapes gives eager's results.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitkernels.registry import Sample

from .oracle import RecordOps, Target, as_tuple, cotangents, gradients

pytestmark = pytest.mark.fused


def _recorded(target: Target, sample: Sample) -> list[tuple[Any, tuple[Any, ...]]]:
    """The raw forward and backward call of a sample."""
    with RecordOps() as record:
        outputs = as_tuple(target(*sample.args, **sample.kwargs))
        gradients(outputs, [t for t in sample.tensors() if t.requires_grad], cotangents(outputs))
    wanted = 1 + target.spec.differentiable
    assert len(record.calls) == wanted, f"one forward and, of a differentiable op, one backward expected, got {[str(op) for op, _ in record.calls]}"
    return record.calls


def _some(target: Target) -> list[Sample]:
    """First and last of the samples and some between, coprime to their period: shapes, maps and layouts. In the interpreter not the last, the
    slowest: schema, fake and autograd are those of the compiled op.
    """
    return [*target.every(5, grad=True), *([] if target.interpreted else target.samples(grad=True)[-1:])]


def test_forward_op(target: Target) -> None:
    for sample in _some(target):
        op, args = _recorded(target, sample)[0]
        assert op.name() == f"{'vitkernels_triton' if target.backend == 'triton' else 'vitkernels'}::{target.spec.schema}"
        args = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(op, args)


@pytest.mark.derivative
def test_backward_op(target: Target) -> None:
    for sample in _some(target):
        _, (op, args) = _recorded(target, sample)
        assert op.name().endswith(f"::{target.spec.schema}_backward")
        torch.library.opcheck(op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
