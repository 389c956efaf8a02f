"""``explain`` and ``backend``: what a user reads to find out where a call runs."""

from __future__ import annotations

import subprocess

import pytest
import torch

import vitkernels
from vitkernels import backends, registry

from .oracle import Target, python


def _call(name: str, device: str, dtype: torch.dtype = torch.float32) -> vitkernels.backends.Explanation:
    sample = Target(registry.get(name), "reference", device).samples(dtype)[0]
    return vitkernels.explain(name, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("name", registry.all_specs())
def test_every_backend_has_a_row_and_every_no_a_reason(name: str, device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        explanation = _call(name, device, dtype)
        assert [c.backend for c in explanation.candidates] == list(backends.BACKENDS)
        for candidate in explanation.candidates:
            reason = backends.why_not(name, candidate.backend, torch.device(device), dtype)
            assert candidate.can_run == (reason is None)
            assert candidate.can_run or candidate.reason == reason
        table = str(explanation)
        assert f"-> {explanation.chosen}" in table
        for candidate in explanation.candidates:
            (row,) = [line for line in table.splitlines()[1:] if candidate.backend in line.split()[:2]]
            assert row.endswith(candidate.reason) and (" yes" if candidate.can_run else " no ") in row


@pytest.mark.parametrize("name", registry.all_specs())
def test_explain_tells_what_a_call_does(name: str, device: str) -> None:
    """``chosen`` is the backend that the call then runs on: forced, automatic, and ``None`` where the call raises."""
    spec = registry.get(name)
    sample = Target(spec, "reference", device).samples()[0]
    for wanted in ("auto", *backends.BACKENDS):
        with vitkernels.backend(wanted):
            explanation = vitkernels.explain(spec.function, *sample.args, **sample.kwargs)
            assert explanation.requested == wanted
            if explanation.chosen is None:
                with pytest.raises(vitkernels.BackendUnavailable):
                    spec.function(*sample.args, **sample.kwargs)
                continue
            got = spec.function(*sample.args, **sample.kwargs)
        torch.testing.assert_close(got, Target(spec, explanation.chosen, device)(*sample.args, **sample.kwargs), rtol=0, atol=0)
        if wanted != "auto":
            assert explanation.chosen == wanted


def test_the_kernels_are_the_automatic_choice_on_the_cpu() -> None:
    for name in registry.all_specs():
        native = backends.why_not(name, "native", torch.device("cpu"), torch.float32)
        assert _call(name, "cpu").chosen == ("native" if native is None else "reference")


def test_explain_computes_nothing() -> None:
    """Impossible shapes and meta tensors are explained all the same."""
    explanation = vitkernels.explain("separable_attention", torch.empty(3, device="meta"))
    assert explanation.chosen == "reference"
    assert "meta" in str(explanation)


def test_an_unknown_op_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no op named 'seperable_atention'; did you mean .*separable_attention"):
        vitkernels.explain("seperable_atention", torch.ones(1))


def test_an_op_without_tensors() -> None:
    with pytest.raises(TypeError, match=r"separable_attention.*give the tensors"):
        vitkernels.explain("separable_attention", 1, 2)


def test_backend_refuses_an_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="backend name is 'turbo'; it must be one of 'auto', 'reference', 'native', 'triton', 'cuda'"),
        vitkernels.backend("turbo"),
    ):
        pass
    assert backends.requested() == "auto"


def test_backend_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), vitkernels.backend("reference"):
        assert backends.requested() == "reference"
        raise ZeroDivisionError
    assert backends.requested() == "auto"


def test_environment_variable_sets_the_start_and_is_checked() -> None:
    def run(value: str) -> subprocess.CompletedProcess[str]:
        command = "import vitkernels; print(vitkernels.backends.requested())"
        return python("-c", command, VITKERNELS_BACKEND=value)

    assert run("reference").stdout.strip() == "reference"
    wrong = run("turbo")
    assert wrong.returncode != 0
    assert "VITKERNELS_BACKEND is 'turbo'; it must be one of 'auto'" in wrong.stderr
