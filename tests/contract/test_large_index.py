"""Offsets beyond 2**31 elements are computed in 64 bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitkernels.registry import Sample

from .oracle import Target, as_tuple, assert_bit_equal, cotangents, named_results, one_changed

pytestmark = [pytest.mark.fused, pytest.mark.kernel]
_FAR = 2**31


@pytest.fixture(scope="module")
def ocean(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    """A bfloat16 storage of 2**31 elements and some. On the CPU its pages exist only where they are written, so it costs next to nothing."""
    device = request.config.getoption("--device", default="cpu")
    try:
        storage = torch.empty(_FAR + 2**24, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of address space are not to be had: {error}")
    yield storage
    del storage
    if device != "cpu":
        torch.cuda.empty_cache()  # other processes, each with tests of its own, need it


def _spread(tensor: Tensor, ocean: Tensor, dim: int) -> Tensor:
    """The same values with ``dim`` strided so far that its last index lies beyond 2**31 elements."""
    last = tensor.shape[dim] - 1
    stride = [s * 1 for s in torch.empty(tensor.movedim(dim, 0).shape[1:]).stride()]
    stride.insert(dim, -(-_FAR // last))
    view = ocean.as_strided(tensor.shape, stride)
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


def _spreadable(sample: Sample) -> list[tuple[Tensor, int]]:
    return [(t, dim) for t in sample.tensors() for dim in range(t.dim()) if t.shape[dim] > 1]


def test_far_strides(target: Target, ocean: Tensor) -> None:
    """Each dimension of each argument in turn reaches beyond 2**31; an offset in 32 bits would read elsewhere, or nowhere."""
    sample = target.samples(torch.bfloat16, grad=True)[0]
    with torch.no_grad():
        grads_out = cotangents(as_tuple(target(*sample.args, **sample.kwargs)))
    expected = named_results(target, sample, grads_out, signature=target.spec.reference)
    for tensor, dim in _spreadable(sample)[:: 8 if target.interpreted else 1]:
        far = one_changed(sample, tensor, _spread(tensor, ocean, dim))
        assert_bit_equal(expected, named_results(target, far, grads_out, signature=target.spec.reference))


def test_far_gradient(target: Target, ocean: Tensor) -> None:
    sample = target.samples(torch.bfloat16, grad=True)[0]
    with torch.no_grad():
        grad, *rest = cotangents(as_tuple(target(*sample.args, **sample.kwargs)))
    grad = grad.bfloat16()  # what the storage holds, also of an op that answers in float32
    expected = named_results(target, sample, (grad, *rest), signature=target.spec.reference)
    for dim in range(grad.dim())[:: 3 if target.interpreted else 1]:
        if grad.shape[dim] > 1:
            assert_bit_equal(expected, named_results(target, sample, (_spread(grad, ocean, dim), *rest), signature=target.spec.reference))
