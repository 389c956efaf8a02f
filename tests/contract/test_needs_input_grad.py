"""Frozen inputs: each input alone gets the gradient it gets together with the others, and no work is handed to the frozen ones."""

from __future__ import annotations

import pytest
import torch

from .oracle import RecordOps, Target, as_tuple, assert_obeys_the_rule, cotangents, differentiable, gradients, mapped

pytestmark = pytest.mark.fused


@pytest.mark.derivative
@pytest.mark.gpu
def test_each_input_alone(target: Target, poison: None) -> None:
    for sample in target.every(4, grad=True):
        inputs = [t for t in sample.tensors() if t.requires_grad]
        outputs = as_tuple(target(*sample.args, **sample.kwargs))
        grads_out = cotangents(outputs)
        together = gradients(outputs, inputs, grads_out)
        for index, expected in enumerate(together):
            alone = mapped(sample, lambda t, wanted=inputs[index]: t.detach().requires_grad_(t is wanted))
            leaves = alone.tensors()
            (leaf,) = (t for t in leaves if t.requires_grad)
            outputs = as_tuple(target(*alone.args, **alone.kwargs))
            torch.autograd.backward(*differentiable(outputs, grads_out))
            assert [t.grad is not None for t in leaves] == [t.requires_grad for t in leaves], f"{sample.name}: a frozen input got a gradient"
            if target.device == "cuda":  # without the other gradients it is another kernel, whose compiler fuses other multiplications with additions
                assert_obeys_the_rule(target, alone, grads_out)
            else:
                torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)


def test_nothing_to_differentiate_records_nothing(target: Target) -> None:
    for sample in target.samples()[:3]:
        with RecordOps() as record:
            outputs = as_tuple(target(*sample.args, **sample.kwargs))
        assert all(o.grad_fn is None and not o.requires_grad for o in outputs)
        assert len(record.calls) == 1
