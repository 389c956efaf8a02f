"""torch.compile and torch.export: one graph without breaks, one compilation for every batch and length, and eager's numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs

import vitkernels
from vitkernels import accuracy, registry
from vitkernels.ops import PackedLayout, TargetLayout
from vitkernels.registry import Sample

from .oracle import Target, as_tuple, assert_all_hold, assert_obeys_the_rule, cotangents, function_of_tensors, gradients, named_results


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def _compiled(target: Target, **options: Any) -> Target:
    """The target with its function compiled."""
    spec = replace(target.spec, function=torch.compile(target.spec.function, fullgraph=True, **options))
    return replace(target, spec=spec)


def _some(target: Target) -> list[Sample]:
    """A few samples that differ in kind: bias or none, a map, other strides. Of the reference two: compiled, it is PyTorch's operators alone."""
    samples = target.small(grad=True)[:: 54 if target.interpreted else 9]
    return list(samples[: 2 if target.backend == "reference" else None])


def test_forward_and_backward(target: Target) -> None:
    compiled = _compiled(target, backend="aot_eager", dynamic=False)
    for sample in _some(target):
        grads_out = cotangents(as_tuple(target.spec.reference(*sample.args, **sample.kwargs)))
        expected = named_results(target, sample, grads_out, signature=target.spec.reference)
        got = named_results(compiled, sample, grads_out, signature=target.spec.reference)
        if target.backend == "reference":
            # What can be traced of a loop over lengths is its masked form: the definition too, in another order of sums.
            assert_obeys_the_rule(compiled, sample, grads_out)
            continue
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{sample.name}: {name} differs")


@pytest.mark.fused
@pytest.mark.gpu
def test_inductor(target: Target) -> None:
    """The default compiler too: its code around the op does not change what the op sees."""
    # Inductor's cache on disk does not know the fake kernels: after a change of theirs it would hand out yesterday's code.
    with torch._inductor.config.patch(force_disable_caches=True):
        assert_obeys_the_rule(_compiled(target), target.samples(grad=True)[0])


def _resized(activations: int) -> Callable[[Sample, int, int], Sample]:
    """The call with its first arguments, activations [B, C, ., length], of another batch and length; the rest are weights."""

    def resize(base: Sample, batch: int, length: int) -> Sample:
        return replace(base, args=(*(_dynamic(t, batch, *t.shape[1:3], length) for t in base.args[:activations]), *base.args[activations:]))

    return resize


def _repacked(base: Sample, batch: int, length: int) -> Sample:
    """So many sequences up to that long."""
    lengths = torch.randint(0, length + 1, (batch,))
    lengths[0] = length
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(base.args[0].device, torch.int32)
    torch._dynamo.mark_dynamic(cu_seqlens, 0)
    tokens = (_dynamic(t, int(lengths.sum()), *t.shape[1:]) for t in base.args)
    return replace(base, args=tuple(tokens), kwargs={"cu_seqlens_q": cu_seqlens})


def _repacked_rows(base: Sample, batch: int, length: int) -> Sample:
    image_ids = torch.randint(-1, 3, (batch, length), device=base.args[0].device).sort().values
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(image_ids, dim)
    return replace(base, args=(*(_dynamic(t, batch, length, *t.shape[2:], dims=(0, 1)) for t in base.args[:3]), image_ids), kwargs={})


def _retokened(base: Sample, batch: int, length: int) -> Sample:
    """q, k and v [B, H, N, D] of another batch and length."""
    tokens = (_dynamic(t, batch, t.shape[1], length, t.shape[3], dims=(0, 2)) for t in base.args[:3])
    return replace(base, args=(*tokens, *base.args[3:]))


def _repatched(base: Sample, batch: int, length: int) -> Sample:
    """Maps [B, C, H, W] of another batch and width, in patches of 2 x 2."""
    return replace(base, args=tuple(_dynamic(t, batch, *t.shape[1:3], 2 * length) for t in base.args))


def _replaced(base: Sample, batch: int, length: int) -> Sample:
    """So many tokens, each somewhere."""
    x, *tables = base.args[:3]
    tokens = batch * length
    positions = [torch.randint(len(table), (tokens,), device=x.device) for table in tables]
    for p in positions:
        torch._dynamo.mark_dynamic(p, 0)
    return replace(base, args=(_dynamic(x, tokens, *x.shape[1:]), *tables, *positions))


def _repooled(base: Sample, batch: int, length: int) -> Sample:
    """So many sequences up to that long; a layout of fixed capacity, which is what says the same to the compiler for every batch."""
    layout = PackedLayout.from_lengths(torch.randint(0, length + 1, (batch,)), capacity=256, max_sequences=8).to(base.args[0].device)
    x = torch.randn((256, *base.args[0].shape[1:]), device=base.args[0].device).requires_grad_()
    return replace(base, args=(x,), kwargs=base.kwargs | {"layout": layout})


def _rematched(base: Sample, batch: int, length: int) -> Sample:
    """Predictions for so many images and queries, and two targets for each image."""
    labels, kwargs = torch.randint(3, (2 * batch,)), dict(base.kwargs)
    if "layout" in kwargs:
        kwargs["layout"] = TargetLayout.from_sizes([2] * batch)
        torch._dynamo.mark_dynamic(kwargs["layout"].cu_targets, 0)
    else:
        kwargs["matches"] = torch.randint(-1, 2 * batch, (2, batch, length))
        for dim in (1, 2):
            torch._dynamo.mark_dynamic(kwargs["matches"], dim)
    kwargs["target_boxes"] = torch.rand(2 * batch, 4)
    for tensor in (labels, kwargs["target_boxes"]):
        torch._dynamo.mark_dynamic(tensor, 0)
    logits, boxes = (_dynamic(t, 2, batch, length, t.shape[-1], dims=(1, 2)) for t in base.args[:2])
    boxes = torch.sigmoid(boxes.detach()).requires_grad_(boxes.requires_grad)
    for dim in (1, 2):
        torch._dynamo.mark_dynamic(boxes, dim)
    on = base.args[0].device
    args = tuple(t.to(on) for t in (logits, boxes, labels))
    return replace(base, args=args, kwargs={k: v.to(on) if hasattr(v, "to") else v for k, v in kwargs.items()})


# The call of an op in another size; a new op writes its own here.
_IN_ANOTHER_SIZE = {
    "separable_attention": _resized(3),
    "separable_self_attention": _resized(1),
    "cascaded_group_attention": _resized(1),
    "cascaded_group_attention_batch_norm": _resized(1),
    "batch_norm_act": _resized(1),
    "varlen_attention": _repacked,
    "packed_attention": _repacked_rows,
    "re_attention": _retokened,
    "attention": _retokened,
    "patch_attention": _repatched,
    "memory_attention": _retokened,
    "factorized_position_embedding": _replaced,
    "masked_pool": _repooled,
    "pairwise_box_cost": _rematched,
    "detection_set_loss": _rematched,
}


def test_one_compilation_for_every_batch_and_length(target: Target) -> None:
    """Batch and length marked dynamic: a longer or shorter input recompiles nothing, forward or backward."""
    base = target.samples(grad=True)[0]
    counter = CompileCounter()
    function = torch.compile(target.spec.function, fullgraph=True, backend=counter)
    with vitkernels.backend(target.backend), torch._dynamo.config.patch(error_on_recompile=True):
        # At least 16 windows each: below, F.conv2d itself guards on the batch it is given, and the reference of the cascaded ops would recompile.
        for batch, length in ((2, 4), (3, 7), (4, 5)) if target.interpreted else ((2, 16), (4, 7), (5, 33), (2, 50)):
            sample = _IN_ANOTHER_SIZE[target.spec.name](base, batch, length)
            with torch._dynamo.config.patch(error_on_recompile=counter.frame_count > 0):
                got = as_tuple(function(*sample.args, **sample.kwargs))
            expected = as_tuple(target.spec.function(*sample.args, **sample.kwargs))
            inputs = [t for t in sample.tensors() if t.requires_grad]
            grads_out = cotangents(expected)
            for a, b in zip(gradients(got, inputs, grads_out), gradients(expected, inputs, grads_out), strict=True):
                if target.backend != "reference":  # that of some ops is traced in another form, see test_forward_and_backward
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert counter.frame_count == 1


def _dynamic(tensor: torch.Tensor, *shape: int, dims: tuple[int, ...] | None = None) -> torch.Tensor:
    """Another activation of this shape, dynamic in ``dims``; default: where it differs in kind, the first dimension and the last of four."""
    fresh = torch.randn(shape, dtype=tensor.dtype, device=tensor.device).requires_grad_(tensor.requires_grad)
    for dim in dims or ((0, 3) if len(shape) == 4 else (0,)):
        torch._dynamo.mark_dynamic(fresh, dim)
    return fresh


@pytest.mark.fused
def test_a_compiled_function_follows_the_backend(target: Target) -> None:
    """Switching the backend recompiles; the graph of the other backend is not silently reused."""
    recorder = EagerAndRecordGraphs()
    function = torch.compile(target.spec.function, fullgraph=True, backend=recorder)
    sample = target.samples()[0]
    with vitkernels.backend(target.backend):
        function(*sample.args, **sample.kwargs)
    with vitkernels.backend("reference"):
        assert_all_hold(accuracy.Judge(target.spec.reference, sample)(function))
    with vitkernels.backend(target.backend):
        function(*sample.args, **sample.kwargs)
    ours, reference = ("\n".join(str(node.target) for node in graph.graph.nodes) for graph in recorder.graphs)
    assert f".{target.spec.schema}.default" in ours and "vitkernels" in ours
    assert "vitkernels" not in reference


class _Module(torch.nn.Module):
    def __init__(self, target: Target, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.target, self.kwargs = target, kwargs

    def forward(self, *args: Any) -> Any:
        return self.target.spec.function(*args, **self.kwargs)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_gives_plain_aten(target: Target, strict: bool) -> None:
    """What is exported runs where vitkernels is not installed, whatever backend is in force, and computes the reference."""
    if strict == (target.backend == "reference"):
        pytest.skip("all backends export the reference: with kernels in force strictly, with the reference not")
    for sample in (target.small()[0], target.small()[-2]):
        with vitkernels.backend(target.backend):
            program = torch.export.export(_Module(target, sample.kwargs), sample.args, strict=strict)
        ops = {node.target for node in program.graph.nodes if node.op == "call_function"}
        foreign = {str(op) for op in ops - {operator.getitem} if not (isinstance(op, torch._ops.OpOverload) and op.namespace == "aten")}
        assert ops and not foreign, f"not plain ATen: {foreign}"
        module = program.module()
        assert_all_hold(accuracy.Judge(target.spec.reference, sample)(lambda *args, module=module, **_: module(*args)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", registry.all_specs())
def test_jit_trace_gives_plain_aten(name: str, device: str) -> None:
    sample = Target(registry.get(name), "reference", device).samples()[0]
    given = sample.tensors()
    traced = torch.jit.trace(function_of_tensors(registry.get(name).function, sample), given)
    assert "vitkernels::" not in str(traced.inlined_graph)
    judge = accuracy.Judge(registry.get(name).reference, sample)
    assert_all_hold(judge(lambda *args, **kwargs: traced(*Sample("", args, kwargs).tensors())))
