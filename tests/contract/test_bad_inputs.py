"""Every bad call of the registry is refused by every backend alike, in words; and a backend that cannot run says why."""

from __future__ import annotations

import pytest
import torch

import vitkernels
from vitkernels import BackendUnavailable, backends, registry
from vitkernels.registry import BadInput

from .oracle import Target, as_tuple


def test_refused_in_words(bad_call: tuple[Target, BadInput]) -> None:
    target, bad = bad_call
    with pytest.raises(bad.exception) as caught:
        target(*bad.sample.args, **bad.sample.kwargs)
    message = str(caught.value)
    assert type(caught.value) is bad.exception, f"{type(caught.value).__name__} instead of {bad.exception.__name__}: {message}"
    # A layout that is built inside the op speaks for itself.
    assert message.startswith((f"{target.spec.name}: ", "PackedLayout: ")), f"the message does not name the op: {message}"
    for word in bad.words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize("name", registry.all_specs())
@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_backend_that_cannot_run_raises_with_the_reason(name: str, backend: str, dtype: torch.dtype, device: str) -> None:
    spec = registry.get(name)
    sample = Target(spec, backend, device).samples(dtype)[0]
    reason = backends.why_not(name, backend, torch.device(device), dtype)
    with vitkernels.backend(backend):
        if reason is None:
            spec.function(*sample.args, **sample.kwargs)
            return
        with pytest.raises(BackendUnavailable) as caught:
            spec.function(*sample.args, **sample.kwargs)
    assert str(caught.value) == f"backend {backend!r} cannot run {name}: {reason}"
    assert len(reason) > 10


@pytest.mark.parametrize("name", registry.all_specs())
def test_auto_never_raises_for_a_backend(name: str, device: str) -> None:
    """A dtype that no kernel takes runs on the reference."""
    spec = registry.get(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        sample = Target(spec, "reference", device).samples(dtype)[0]
        with vitkernels.backend("auto"):
            assert as_tuple(spec.function(*sample.args, **sample.kwargs))[0].dtype is spec.result_dtype(dtype)
