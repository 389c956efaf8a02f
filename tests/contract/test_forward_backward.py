"""Forward and every gradient, on every sample and dtype, by the rule of :mod:`.oracle`; fresh memory is NaN, so an element left unwritten fails."""

from __future__ import annotations

import pytest
import torch

from .oracle import Case, Target, as_tuple, assert_obeys_the_rule, mapped


def test_no_worse_than_twice_eager(case: Case, poison: None) -> None:
    assert_obeys_the_rule(case.target, case.sample(grad=True))


@pytest.mark.fused
@pytest.mark.thin
@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_without_gradients_is_the_same(case: Case, poison: None) -> None:
    """Inference takes a shorter way to the kernel; the numbers are those of training."""
    trained = case.target(*case.sample(grad=True).args, **case.sample().kwargs)
    with torch.inference_mode():
        inferred = case.target(*case.sample().args, **case.sample().kwargs)
    for a, b in zip(as_tuple(trained), as_tuple(inferred), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.fused
def test_nan_reaches_the_output(target: Target) -> None:
    """A NaN in any argument is a NaN wherever eager has one, so that a diverged training is seen to diverge, and in no other image of the batch."""
    for sample in target.every(3):
        for position, tensor in enumerate(sample.args):
            if tensor is None or tensor.numel() == 0:
                continue
            spoiled = tensor.detach().clone(memory_format=torch.contiguous_format)
            spoiled.view(-1)[torch.randint(tensor.numel(), ())] = torch.nan
            args = (*sample.args[:position], spoiled, *sample.args[position + 1 :])
            expected, got = target.spec.reference(*args, **sample.kwargs), target(*args, **sample.kwargs)
            for e, g in zip(as_tuple(expected), as_tuple(got), strict=True):
                assert g.isnan()[e.isnan()].all(), f"{sample.name}: a NaN in argument {position} does not reach all that it reaches in eager"
                untouched = ~e.isnan().flatten(1).any(1)
                assert g[untouched].isfinite().all(), f"{sample.name}: a NaN in argument {position} reaches another image of the batch"


@pytest.mark.fused
def test_tiny_inputs(target: Target) -> None:
    """The rule holds for tiny inputs too: nothing inside adds an absolute epsilon."""
    for sample in target.every(3, grad=True):
        assert_obeys_the_rule(target, mapped(sample, lambda t: (t.detach() * 1e-4).requires_grad_(t.requires_grad)))
