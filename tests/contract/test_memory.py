"""Memory: what is saved for the backward, and the peak while an op runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .oracle import Case, Target, as_tuple, python

pytestmark = pytest.mark.fused


@pytest.mark.derivative
@pytest.mark.thin
@pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float64)
def test_saved_for_backward(case: Case) -> None:
    """What autograd keeps, less what it keeps anyway (the call's own tensors), is within the formula of the op's README, ``spec.saved_bytes``."""
    sample = case.sample(grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result is held until the count is done: freed memory could be handed out, and counted, twice.
        result = as_tuple(case.target(*sample.args, **sample.kwargs))
    given = {t.untyped_storage().data_ptr() for t in sample.tensors()}
    kept = sum(size for pointer, size in saved.items() if pointer not in given)
    assert kept <= case.target.spec.saved_bytes(sample), f"{kept} bytes kept"
    assert saved or not result[0].numel(), "nothing is saved: the hooks saw no backward"


@pytest.mark.gpu
def test_peak(target: Target) -> None:
    """No intermediate the size of an activation exists at any moment, or as many as the op's README says.

    Forward:  peak - before  <  output + saved + f A
    Backward: peak - before  <  gradients + b A

    with A the bytes of the largest activation and (f, b) the spec's ``working_activations``, 1 for an op in one pass. Eager makes at least one such
    intermediate (queries, keys and values; the scores times the keys; the values' ReLU). On the CPU the peak is the kernel's own count of resident
    pages (``VmHWM``), which sees what C++ allocates for itself; on a GPU it is the caching allocator's.
    """
    if target.interpreted:
        pytest.skip("Triton's interpreter copies tensors to run on the CPU; its memory says nothing about a GPU's")
    if target.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc/self/clear_refs")
    run = python(Path(__file__).with_name("peak.py"), target.spec.name, target.backend, target.device)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    if "skip" in measured:
        pytest.skip(measured["skip"])
    spec = target.spec
    bounds = spec.gpu_working_activations if target.device == "cuda" and spec.gpu_working_activations else spec.working_activations
    for phase, activations in zip(("forward", "backward"), bounds, strict=True):
        extra, allowed = measured[phase]["peak"] - measured[phase]["results"], activations * measured["activation"]
        assert extra < allowed, f"{phase}: {extra} bytes beyond its results, allowed {allowed}"
