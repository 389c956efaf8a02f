"""torch.compile and torch.export: one graph without breaks, one compilation for every batch and length, and eager's numbers."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs

import vitkernels
from vitkernels import registry
from vitkernels.registry import Sample

from .oracle import Target, as_tuple, assert_obeys_the_rule, cotangents, function_of_tensors, gradients, named_results


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def _compiled(target: Target, **options: Any) -> Target:
    """The target with its function compiled."""
    spec = replace(target.spec, function=torch.compile(target.spec.function, fullgraph=True, **options))
    return replace(target, spec=spec)


def _some(target: Target) -> list[Sample]:
    """A few samples that differ in kind: bias or none, a map, other strides."""
    return list(target.every(9, grad=True))


def test_forward_and_backward(target: Target) -> None:
    compiled = _compiled(target, backend="aot_eager", dynamic=False)
    for sample in _some(target):
        grads_out = cotangents(as_tuple(target.spec.reference(*sample.args, **sample.kwargs)))
        expected = named_results(target, sample, grads_out, signature=target.spec.reference)
        got = named_results(compiled, sample, grads_out, signature=target.spec.reference)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=f"{sample.name}: {name} differs")


@pytest.mark.fused
def test_inductor(target: Target) -> None:
    """The default compiler too: its code around the op does not change what the op sees."""
    # Inductor's cache on disk does not know the fake kernels: after a change of theirs it would hand out yesterday's code.
    with torch._inductor.config.patch(force_disable_caches=True):
        assert_obeys_the_rule(_compiled(target), target.samples(grad=True)[0])


# How many of each op's first arguments are activations [B, C, ., length], the rest being weights; a new op writes its own here.
_ACTIVATIONS = {
    "separable_attention": 3,
    "separable_self_attention": 1,
    "cascaded_group_attention": 1,
    "cascaded_group_attention_batch_norm": 1,
}


def test_one_compilation_for_every_batch_and_length(target: Target) -> None:
    """Batch and length marked dynamic: a longer or shorter input recompiles nothing, forward or backward."""
    base = target.samples(grad=True)[0]
    activations = _ACTIVATIONS[target.spec.name]
    counter = CompileCounter()
    function = torch.compile(target.spec.function, fullgraph=True, backend=counter)
    with vitkernels.backend(target.backend), torch._dynamo.config.patch(error_on_recompile=True):
        # At least 16 windows each: below, F.conv2d itself guards on the batch it is given, and the reference of the cascaded ops would recompile.
        for batch, length in ((2, 16), (4, 7), (5, 33), (2, 50)):
            sample = replace(base, args=(*(_dynamic(t, batch, length) for t in base.args[:activations]), *base.args[activations:]))
            with torch._dynamo.config.patch(error_on_recompile=counter.frame_count > 0):
                got = as_tuple(function(*sample.args, **sample.kwargs))
            expected = as_tuple(target.spec.function(*sample.args, **sample.kwargs))
            inputs = [t for t in sample.tensors() if t.requires_grad]
            grads_out = cotangents(expected)
            for a, b in zip(gradients(got, inputs, grads_out), gradients(expected, inputs, grads_out), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert counter.frame_count == 1


def _dynamic(tensor: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Another activation, [batch, ., ., length]."""
    fresh = torch.randn(batch, *tensor.shape[1:3], length, dtype=tensor.dtype, device=tensor.device).requires_grad_(tensor.requires_grad)
    for dim in (0, 3):
        torch._dynamo.mark_dynamic(fresh, dim)
    return fresh


@pytest.mark.fused
def test_a_compiled_function_follows_the_backend(target: Target) -> None:
    """Switching the backend recompiles; the graph of the other backend is not silently reused."""
    recorder = EagerAndRecordGraphs()
    function = torch.compile(target.spec.function, fullgraph=True, backend=recorder)
    sample = target.samples()[0]
    results = {}
    for name in (target.backend, "reference", target.backend):
        with vitkernels.backend(name):
            results[name] = function(*sample.args, **sample.kwargs)
    ours, reference = ("\n".join(str(node.target) for node in graph.graph.nodes) for graph in recorder.graphs)
    assert f".{target.spec.name}.default" in ours and "vitkernels" in ours
    assert "vitkernels" not in reference
    torch.testing.assert_close(results["reference"], target.spec.reference(*sample.args, **sample.kwargs), rtol=0, atol=0)


class _Module(torch.nn.Module):
    def __init__(self, target: Target, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.target, self.kwargs = target, kwargs

    def forward(self, *args: Any) -> Any:
        return self.target.spec.function(*args, **self.kwargs)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_gives_plain_aten(target: Target, strict: bool) -> None:
    """What is exported runs where vitkernels is not installed, whatever backend is in force, and computes the reference."""
    for sample in (target.samples()[0], target.samples()[-2]):
        with vitkernels.backend(target.backend):
            program = torch.export.export(_Module(target, sample.kwargs), sample.args, strict=strict)
        ops = {node.target for node in program.graph.nodes if node.op == "call_function"}
        foreign = {str(op) for op in ops - {operator.getitem} if not (isinstance(op, torch._ops.OpOverload) and op.namespace == "aten")}
        assert ops and not foreign, f"not plain ATen: {foreign}"
        torch.testing.assert_close(program.module()(*sample.args), target.spec.reference(*sample.args, **sample.kwargs), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", registry.all_specs())
def test_jit_trace_gives_plain_aten(name: str, device: str) -> None:
    sample = Target(registry.get(name), "reference", device).samples()[0]
    given = sample.tensors()
    traced = torch.jit.trace(function_of_tensors(registry.get(name).function, sample), given)
    assert "vitkernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*given), registry.get(name).reference(*sample.args, **sample.kwargs), rtol=0, atol=0)
