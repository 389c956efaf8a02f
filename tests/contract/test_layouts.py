"""Strides: what comes out, that nothing that goes in is touched or handed back, and that gradients may arrive in any layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vitkernels.registry import Sample

from .oracle import Target, as_tuple, assert_obeys_the_rule, cotangents, every_tensor, gradients, one_changed


def _token_major(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """[B, H, N, D_v] that lies [B, N, H, D_v] in memory."""
    return torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2).stride()


def _channels_last_or_contiguous(x: Tensor) -> tuple[int, ...]:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(x.shape, memory_format=torch.channels_last if channels_last else torch.contiguous_format).stride()


# The layout that each op's docstring promises; a new op writes its own here.
_PROMISED: dict[str, Callable[[Sample], tuple[int, ...]]] = {
    "separable_attention": lambda sample: torch.empty(sample.args[2].shape).stride(),
    "separable_self_attention": lambda sample: torch.empty_like(sample.args[0]).stride(),
    "cascaded_group_attention": lambda sample: torch.empty_like(sample.args[0]).stride(),
    "cascaded_group_attention_batch_norm": lambda sample: torch.empty_like(sample.args[0]).stride(),
    "batch_norm_act": lambda sample: _channels_last_or_contiguous(sample.args[0]),
    "varlen_attention": lambda sample: torch.empty(*sample.args[0].shape[:-1], sample.args[2].shape[-1]).stride(),
    "packed_attention": lambda sample: torch.empty(*sample.args[0].shape[:-1], sample.args[2].shape[-1]).stride(),
    "factorized_position_embedding": lambda sample: torch.empty(sample.args[0].shape).stride(),
    "re_attention": lambda sample: _token_major(sample.args[0], sample.args[2]),
    "attention": lambda sample: _token_major(sample.args[0], sample.args[2]),
    "memory_attention": lambda sample: _token_major(sample.args[0], sample.args[2]),
    "patch_attention": lambda sample: torch.empty_like(sample.args[2]).stride(),
    "pairwise_box_cost": lambda sample: torch.empty(*sample.args[0].shape[:-3], sample.args[2].shape[0], sample.args[0].shape[-2]).stride(),
    "detection_set_loss": lambda sample: torch.empty(*sample.args[0].shape[:-3], 3).stride(),
    "masked_pool": lambda sample: torch.empty(sample.kwargs["layout"].sequences, *sample.args[0].shape[1:]).stride(),
}


@pytest.mark.fused
def test_output_has_the_promised_layout(target: Target) -> None:
    """Contiguous in, contiguous out; channels_last in, channels_last out; where the docstring says so."""
    for sample in target.every(1):
        out = as_tuple(target(*sample.args, **sample.kwargs))[0]
        if out.numel():
            assert out.stride() == _PROMISED[target.spec.name](sample), sample.name


@pytest.mark.fused
def test_fake_tensors_tell_the_layout(target: Target) -> None:
    """Shape, strides, dtype and device are known without running: meta initialisation, memory estimation and the compiler ask so."""
    for sample in target.every(1):
        real = as_tuple(target(*sample.args, **sample.kwargs))
        with FakeTensorMode() as mode:
            fake = every_tensor(sample, mode.from_tensor)
            predicted = as_tuple(target(*fake.args, **fake.kwargs))
        for r, f in zip(real, predicted, strict=True):
            assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device), sample.name


def test_inputs_are_not_modified(target: Target) -> None:
    for sample in target.every(1, grad=True):
        inputs = sample.tensors()
        before = [t.detach().clone() for t in inputs]
        versions = [t._version for t in inputs]
        outputs = as_tuple(target(*sample.args, **sample.kwargs))
        grads_out = cotangents(outputs)
        kept = [g.clone() for g in grads_out]
        gradients(outputs, [t for t in inputs if t.requires_grad], grads_out)
        for tensor, values in zip((*inputs, *grads_out), (*before, *kept), strict=True):
            torch.testing.assert_close(tensor.detach(), values, rtol=0, atol=0)
        assert [t._version for t in inputs] == versions


def _storages(*tensors: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def test_outputs_and_gradients_share_no_memory_with_inputs(target: Target) -> None:
    """But for a gradient that eager hands on as it came: a sum's is that of its terms."""
    for sample in target.every(1, grad=True):
        inputs = [t for t in sample.tensors() if t.requires_grad]
        outputs = as_tuple(target(*sample.args, **sample.kwargs))
        grads_out = cotangents(outputs)
        grads = gradients(outputs, inputs, grads_out)
        eager = gradients(as_tuple(target.spec.reference(*sample.args, **sample.kwargs)), inputs, grads_out)
        given = _storages(*sample.tensors(), *grads_out) - (_storages(*grads_out) & _storages(*eager))
        assert not given & _storages(*outputs, *grads), f"{sample.name}: a result lies in an input's memory"


def _restrided(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values under the strides that a weight can have: tied and transposed, a slice of something wider, one row broadcast."""
    wide = torch.stack([tensor.detach(), torch.full_like(tensor, torch.nan)], dim=-1)
    yield "every other element", wide[..., 0]
    if tensor.dim() > 1:
        yield "transposed", tensor.detach().transpose(0, 1).contiguous().transpose(0, 1)
        padded = torch.full((tensor.shape[0], tensor.shape[1] + 3, *tensor.shape[2:]), torch.nan, dtype=tensor.dtype, device=tensor.device)
        padded[:, 3:] = tensor.detach()
        yield "part of wider rows", padded[:, 3:]


@pytest.mark.fused
@pytest.mark.kernel
def test_every_argument_may_have_any_strides(target: Target, poison: None) -> None:
    for sample in target.every(4, grad=True):
        for index, (name, tensor) in enumerate(sample.named_tensors(target.spec.function).items()):
            if tensor.numel() == 0:
                continue
            views = list(_restrided(tensor))
            for how, view in [views[index % len(views)]] if target.interpreted else views:
                try:
                    assert_obeys_the_rule(target, one_changed(sample, tensor, view.requires_grad_(tensor.requires_grad)))
                except AssertionError as error:
                    raise AssertionError(f"{sample.name}, {name} {how}: {error}") from None


def _arrangements(grad: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same gradient under the strides that a model's next layer may hand back."""
    if grad.dim() == 4:
        yield "channels_last", grad.contiguous(memory_format=torch.channels_last)
    if grad.dim() > 1:
        yield "transposed", grad.transpose(-2, -1).contiguous().transpose(-2, -1)
        yield "expanded over channels", grad[:, :1].expand(grad.shape)
    wide = torch.full((*grad.shape[:-1], 2 * grad.shape[-1]), torch.nan, dtype=grad.dtype, device=grad.device)
    wide[..., ::2] = grad
    yield "strided", wide[..., ::2]
    yield "one number, as of a sum", grad.new_ones(()).expand(grad.shape)


@pytest.mark.fused
@pytest.mark.derivative
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradient_arrives_in_any_layout(target: Target, dtype: torch.dtype, poison: None) -> None:
    if target.interpreted and dtype is torch.bfloat16:
        pytest.skip("the strides are read by the same lines in float32, and the interpreter takes minutes")
    for sample in target.every(5, dtype, grad=True):
        grad, *rest = cotangents(as_tuple(target.spec.reference(*sample.args, **sample.kwargs)))
        for how, arranged in _arrangements(grad):
            if how == "one number, as of a sum" and "eps" in inspect.signature(target.spec.function).parameters:
                continue  # a norm over the batch takes it away: the gradient is zero, and all that is computed is noise
            assert_obeys_the_rule(target, sample, (arranged, *rest))
