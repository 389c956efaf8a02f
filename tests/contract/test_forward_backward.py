"""Forward and every gradient, on every sample and dtype, by the rule of :mod:`.oracle`; fresh memory is NaN, so an element left unwritten fails."""

from __future__ import annotations

import inspect

import pytest
import torch

from .oracle import Case, Target, as_tuple, assert_obeys_the_rule, mapped, one_changed

pytestmark = pytest.mark.kernel


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
        for name, tensor in sample.named_tensors(target.spec.function).items():
            if tensor.numel() == 0:
                continue
            spoiled = tensor.detach().clone(memory_format=torch.contiguous_format)
            place = [int(torch.randint(n, ())) for n in tensor.shape]
            if name.startswith("dw_"):
                # The middle of a kernel. The others meet padding, too: eager has 0 * NaN there, a kernel that skips padding has nothing.
                place[2:] = [n // 2 for n in tensor.shape[2:]]
            spoiled[tuple(place)] = torch.nan
            changed = one_changed(sample, tensor, spoiled)
            expected, got = (as_tuple(function(*changed.args, **changed.kwargs)) for function in (target.spec.reference, target))
            for e, g in zip(expected, got, strict=True):
                assert g.isnan()[e.isnan()].all(), f"{sample.name}: a NaN in {name} does not reach all that it reaches in eager"
                untouched = ~e.isnan().reshape(e.shape[0], e.shape[1:].numel()).any(1)  # images; of packed ones, tokens; of statistics, channels
                if name == "v" and target.backend in target.spec.tiles_span_images:
                    continue
                assert not g[untouched].isnan().any(), f"{sample.name}: a NaN in {name} reaches another image of the batch"


@pytest.mark.fused
def test_tiny_inputs(target: Target) -> None:
    """The rule holds for tiny inputs too: nothing inside adds an absolute epsilon."""
    if "eps" in inspect.signature(target.spec.function).parameters:
        pytest.skip(f"{target.spec.name} adds one by definition")

    def shrunk(tensor: torch.Tensor) -> torch.Tensor:
        # What is added to a product of two is as small as the product: otherwise all keys are equal but for their last bits.
        return (tensor.detach() * (1e-4 if tensor.dim() > 1 else 1e-8)).requires_grad_(tensor.requires_grad)

    for sample in target.every(3, grad=True):
        assert_obeys_the_rule(target, mapped(sample, shrunk))
