"""Second derivatives: right on the reference, a clear error on the kernels, never a wrong number."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from vitkernels import accuracy, registry

from .oracle import Target, as_tuple, cast, function_of_tensors


def _square_sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def _first_gradients(target: Target) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    sample = target.samples(grad=True)[0]
    inputs = [t for t in sample.tensors() if t.requires_grad]
    outputs = as_tuple(target(*sample.args, **sample.kwargs))
    return inputs, torch.autograd.grad(_square_sum(outputs), inputs, create_graph=True)


@pytest.mark.fused
@pytest.mark.derivative
def test_second_derivative_is_refused(target: Target) -> None:
    inputs, gradients = _first_gradients(target)
    with pytest.raises(NotImplementedError, match=rf"{target.spec.schema} has no second derivative.*backend\('reference'\)"):
        torch.autograd.grad(_square_sum(gradients), inputs)


@pytest.mark.fused
@pytest.mark.derivative
def test_create_graph_changes_no_number(target: Target) -> None:
    """Asking for a graph of the backward is not yet asking for a second derivative."""
    sample = target.samples(grad=True)[0]
    inputs, gradients = _first_gradients(target)
    outputs = as_tuple(target(*sample.args, **sample.kwargs))
    for graphed, plain in zip(gradients, torch.autograd.grad(_square_sum(outputs), inputs), strict=True):
        torch.testing.assert_close(graphed.detach(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, spec in registry.all_specs().items() if spec.differentiable])
def test_reference_has_second_derivatives(name: str, device: str) -> None:
    target = Target(registry.get(name), "reference", device)
    tiny = min((s for s in target.samples(torch.float64) if all(t.numel() for t in s.tensors())), key=lambda s: sum(t.numel() for t in s.tensors()))
    sample = accuracy.with_grad(cast(tiny, torch.float64))
    assert torch.autograd.gradgradcheck(function_of_tensors(target, sample), sample.tensors())
