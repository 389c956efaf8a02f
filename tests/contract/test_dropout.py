"""Dropout inside an op: the mask that the reference draws from the same seed, so training is reproducible across backends."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from vitkernels.registry import Sample

from .oracle import Target, as_tuple, assert_bit_equal, assert_obeys_the_rule, cotangents, named_results

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _has_dropout(request: pytest.FixtureRequest) -> None:
    target: Target = request.node.callspec.params["target"]
    if "dropout_p" not in inspect.signature(target.spec.function).parameters:
        pytest.skip(f"{target.spec.name} has no dropout")


def _samples(target: Target, dtype: torch.dtype = torch.float32, **kwargs: Any) -> list[Sample]:
    # Not the sample of large logits: what a float32 logit of 200 loses in rounding decides its gradients, whoever computes them, and these tests ask
    # about masks. test_forward_backward.py has it.
    samples = target.every(3, dtype, grad=True)[: 1 if target.interpreted else None]
    return [replace(s, kwargs=s.kwargs | kwargs) for s in samples if s.name != "large logits"]


def _training(target: Target) -> dict[str, bool]:
    """What tells the op that it is training: ops that stand for a module have an argument, functional ones drop by ``dropout_p`` alone."""
    return {"training": True} if "training" in inspect.signature(target.spec.function).parameters else {}


def _seeded(target: Target, seed: int = 7) -> Target:
    """The target with its function and its reference each starting from the same seed."""

    def starting(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            torch.manual_seed(seed)
            return function(*args, **kwargs)

        return run

    return replace(target, spec=replace(target.spec, function=starting(target.spec.function), reference=starting(target.spec.reference)))


def _results(target: Target, sample: Sample) -> dict[str, torch.Tensor]:
    grads_out = tuple(torch.ones_like(o) for o in as_tuple(target.spec.reference(*sample.args, **sample.kwargs)))
    return named_results(target, sample, grads_out, signature=target.spec.reference)


@pytest.mark.fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=["float32", "bfloat16", "float16", "float64"])
def test_same_mask_as_the_reference(target: Target, dtype: torch.dtype, poison: None) -> None:
    """One dropped score more or less than in the reference is an error of the order of the result, and so of any tolerance."""
    reason = target.why_not(dtype)
    if reason is not None:
        pytest.skip(reason)
    for sample in _samples(target, dtype, dropout_p=0.3, **_training(target)):
        with torch.no_grad():
            grads_out = cotangents(as_tuple(target.spec.reference(*sample.args, **sample.kwargs)))
        assert_obeys_the_rule(_seeded(target), sample, grads_out)


def test_every_call_draws_a_new_mask(target: Target) -> None:
    sample = target.samples()[0]
    kwargs = sample.kwargs | {"dropout_p": 0.5} | _training(target)
    first, second = (as_tuple(target(*sample.args, **kwargs))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_of_nothing_is_no_dropout(target: Target) -> None:
    """With p = 0 in training, and with any p in evaluation, it is the plain op to the last bit and draws no random number."""
    in_training, in_evaluation = (_training(target), 0.0), ({"training": False}, 0.4)
    for sample in _samples(target):
        for mode, dropout_p in (in_training, in_evaluation) if _training(target) else (in_training,):
            kwargs = sample.kwargs | mode
            plain = _results(target, replace(sample, kwargs=kwargs))
            state = torch.get_rng_state()
            assert_bit_equal(plain, _results(target, replace(sample, kwargs=kwargs | {"dropout_p": dropout_p})))
            assert torch.equal(torch.get_rng_state(), state)


def test_dropping_every_score(target: Target, poison: None) -> None:
    """With p = 1 the context is zero, the result is what the reference makes of that, and every gradient is finite."""
    for sample in _samples(target, dropout_p=1.0, **_training(target)):
        assert_obeys_the_rule(target, sample)
