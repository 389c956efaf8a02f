"""Several Python threads at once: the same numbers as one after another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vitkernels
from vitkernels.registry import Sample

from .oracle import Target, as_tuple, assert_bit_equal, cotangents, named_results

pytestmark = [pytest.mark.fused, pytest.mark.gpu]
_THREADS = 6


def test_concurrent_calls(target: Target) -> None:
    if target.interpreted:
        pytest.skip("Triton's interpreter keeps its program ids in globals; it runs one kernel at a time")
    samples = target.every(5, grad=True)
    work = [(s, cotangents(as_tuple(target.spec.reference(*s.args, **s.kwargs)))) for s in samples]
    together = threading.Barrier(_THREADS)

    def run(sample: Sample, grads_out: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return named_results(target.spec.function, sample, grads_out)

    def everything() -> list[dict[str, torch.Tensor]]:
        together.wait()
        return [run(*item) for item in work for _ in range(5)]

    with vitkernels.backend(target.backend):
        expected = [result for item in work for result in [run(*item)] * 5]
        with ThreadPoolExecutor(_THREADS) as pool:
            everywhere = [future.result() for future in [pool.submit(everything) for _ in range(_THREADS)]]
    for results in everywhere:
        for a, b in zip(expected, results, strict=True):
            assert_bit_equal(a, b)
