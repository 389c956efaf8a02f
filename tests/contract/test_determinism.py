"""Bit-equal from run to run, forward and backward: no atomics, no race, no dependence on what memory held."""

from __future__ import annotations

import pytest
import torch

from .oracle import Target, as_tuple, assert_bit_equal, cotangents, named_results

pytestmark = pytest.mark.fused


# What memory held is for each instruction set to disregard; which thread takes what, and when, is the same for all.
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.kernel), 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bit_equal_from_run_to_run(target: Target, dtype: torch.dtype, count: int, threads: None) -> None:
    if target.interpreted and (count > 1 or dtype is not torch.float32):
        pytest.skip("Triton's interpreter runs one program after another: no race shows there, and what memory held does in one dtype")
    torch.set_num_threads(count)
    for sample in target.every(1, dtype, grad=True)[: 1 if target.interpreted else None]:
        shaped_alike = target.spec.reference if target.interpreted else target  # whichever is the faster
        grads_out = cotangents(as_tuple(shaped_alike(*sample.args, **sample.kwargs)))
        first = named_results(target, sample, grads_out, signature=target.spec.function)
        for _ in range(3 if count > 1 else 1):  # one thread has one order
            assert_bit_equal(first, named_results(target, sample, grads_out, signature=target.spec.function))
