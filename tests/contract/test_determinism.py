"""Bit-equal from run to run, forward and backward: no atomics, no race, no dependence on what memory held."""

from __future__ import annotations

import pytest
import torch

from .oracle import Target, as_tuple, assert_bit_equal, cotangents, named_results

pytestmark = [pytest.mark.fused, pytest.mark.kernel]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bit_equal_from_run_to_run(target: Target, dtype: torch.dtype, count: int, threads: None) -> None:
    if target.interpreted and count > 1:
        pytest.skip("Triton's interpreter has one thread")
    torch.set_num_threads(count)
    for sample in target.every(1, dtype, grad=True):
        grads_out = cotangents(as_tuple(target.spec.reference(*sample.args, **sample.kwargs)))
        first = named_results(target, sample, grads_out, signature=target.spec.function)
        for _ in range(1 if target.interpreted else 3):
            assert_bit_equal(first, named_results(target, sample, grads_out, signature=target.spec.function))
