"""Autocast: float32 arguments inside ``torch.autocast`` give what casting them by hand gives, by the rule of ``F.linear``.

A loss stays in float32, by that of ``F.cross_entropy``.
"""

from __future__ import annotations

import pytest
import torch

from .oracle import RecordOps, Target, as_tuple, assert_bit_equal, autocast_by_hand, cotangents, named_results, one_changed

_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def _one_dtype_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """What autocast does is the same for both, and the interpreter slow."""
    target: Target = request.node.callspec.params["target"]
    if target.interpreted and request.node.callspec.params.get("dtype") is torch.float16:
        pytest.skip("in Triton's interpreter bfloat16 alone")


@pytest.mark.fused
@pytest.mark.gpu
@_DTYPES
def test_equals_casting_by_hand(target: Target, dtype: torch.dtype) -> None:
    for sample in target.every(5):
        lowered = autocast_by_hand(target.spec, sample, target.spec.result_dtype(dtype))
        by_hand = as_tuple(target(*lowered.args, **lowered.kwargs))
        with torch.autocast(target.device, dtype=dtype):
            automatic = as_tuple(target(*sample.args, **sample.kwargs))
        assert automatic[0].dtype is target.spec.result_dtype(dtype)
        for a, b in zip(by_hand, automatic, strict=True):
            assert b.dtype is a.dtype
            torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.fused
@pytest.mark.derivative
@_DTYPES
def test_gradients_come_back_in_the_dtype_of_the_parameters(target: Target, dtype: torch.dtype) -> None:
    """Parameters stay float32 and so do their gradients, computed in the autocast dtype."""
    sample = target.samples(torch.float32, grad=True)[0]
    grads_out = cotangents(as_tuple(target.spec.reference(*sample.args, **sample.kwargs)))
    lowered = autocast_by_hand(target.spec, sample, target.spec.result_dtype(dtype))
    by_hand = named_results(target, lowered, grads_out, signature=target.spec.reference)
    with torch.autocast(target.device, dtype=dtype):
        automatic = named_results(target, sample, grads_out, signature=target.spec.reference)
    gradients = {name: g for name, g in automatic.items() if name.startswith("gradient")}
    assert gradients and all(g.dtype is torch.float32 for g in gradients.values())
    assert_bit_equal({name: by_hand[name].float() for name in gradients}, gradients)


@pytest.mark.fused
@_DTYPES
def test_the_raw_op_casts_too(target: Target, dtype: torch.dtype) -> None:
    """``torch.ops.vitkernels.<op>`` called directly has autocast registered: compiled graphs and other languages come in there."""
    sample = target.samples(torch.float32)[0]
    lowered = autocast_by_hand(target.spec, sample, target.spec.result_dtype(dtype))
    with RecordOps() as record:
        target(*sample.args, **sample.kwargs)
        target(*lowered.args, **lowered.kwargs)
    (op, args), (_, lowered_args) = record.calls
    by_hand = as_tuple(op(*lowered_args))
    with torch.autocast(target.device, dtype=dtype):
        automatic = as_tuple(op(*args))
    assert automatic[0].dtype is target.spec.result_dtype(dtype)
    for a, b in zip(by_hand, automatic, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@_DTYPES
def test_output_dtype(target: Target, dtype: torch.dtype) -> None:
    """Every backend, the reference included, answers in the dtype that autocast asks for (a loss in float32); float64 stays, as by ``F.linear``."""
    low = target.spec.result_dtype(dtype)
    for given, expected in ((torch.float32, low), (dtype, low), (torch.float64, torch.float64)):
        if target.why_not(given) is None:
            sample = target.samples(given)[0]
            lowered = autocast_by_hand(target.spec, sample, expected)
            by_hand = as_tuple(target.spec.reference(*lowered.args, **lowered.kwargs))
            with torch.autocast(target.device, dtype=dtype):
                automatic = as_tuple(target(*sample.args, **sample.kwargs))
            assert automatic[0].dtype is expected
            assert [out.dtype for out in automatic] == [out.dtype for out in by_hand]


@pytest.mark.fused
def test_mixed_arguments_meet_in_the_autocast_dtype(target: Target) -> None:
    """A bfloat16 activation with float32 parameters, as the layer before leaves it: refused outside autocast, fine inside."""
    sample = target.samples(torch.float32)[0]
    cast = [name for name in sample.named_tensors(target.spec.function) if name.partition("[")[0] not in target.spec.kept_by_autocast]
    if len(cast) == 1:
        pytest.skip(f"{target.spec.name} casts one tensor: nothing to mix")
    mixed = one_changed(sample, sample.args[0], sample.args[0].bfloat16())
    with pytest.raises(TypeError, match="dtype"):
        target(*mixed.args, **mixed.kwargs)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        got = as_tuple(target(*mixed.args, **mixed.kwargs))
    lowered = autocast_by_hand(target.spec, mixed, target.spec.result_dtype(torch.bfloat16))
    for a, b in zip(as_tuple(target(*lowered.args, **lowered.kwargs)), got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
