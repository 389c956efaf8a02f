"""Cascaded group attention of modules: what an attention made of convolutions and norms has to do to run as one op.

For every class whose children are ``qkvs``, ``dws`` and ``proj`` (timm's, the authors', :class:`vitkernels.nn.CascadedGroupAttention`), whatever the
names of the convolution and the norm in them.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels import backends, ops
from vitkernels.nn import _checks, _conv_norm
from vitkernels.nn._conv_norm import Layer
from vitkernels.nn._derived import Derived, gradient_wanted
from vitkernels.ops import _define
from vitkernels.ops.cascaded_group import op


class Cascade(NamedTuple):
    """The layers of one attention, all as :func:`find` checked them."""

    qkvs: list[Layer]
    dws: list[Layer]
    proj: Layer
    attention_biases: Tensor  # [heads, window * window]
    key_dim: int
    scale: float

    @property
    def window(self) -> int:
        return math.isqrt(self.attention_biases.shape[1])

    def layers(self) -> list[Layer]:
        """All layers, in the order in which the op returns their statistics."""
        return [*self.qkvs, *self.dws, self.proj]

    def norms(self) -> list[nn.BatchNorm2d]:
        """All norms in that order; empty if they were folded away."""
        return [layer.norm for layer in self.layers() if layer.norm is not None]

    def tensors(self) -> list[Tensor]:
        """Everything the attention computes with."""
        return [self.attention_biases, *(tensor for layer in self.layers() for tensor in layer.tensors())]


def find(module: Any) -> Cascade | str:
    """The layers of ``module``, or why one of them has to be called."""
    own = module._modules
    proj = own["proj"]
    if (reason := _checks.why_not_bypassed("proj", proj, nn.Sequential)) is not None:
        return reason
    if len(proj) != 2 or len(own["qkvs"]) == 0 or len(own["dws"]) != len(own["qkvs"]) or "attention_biases" not in module._parameters:
        return "it has other layers than the published class"
    if (reason := _checks.why_not_bypassed("proj.0", proj[0], nn.ReLU)) is not None:
        return reason
    named = [(f"{group}.{i}", layer) for group in ("qkvs", "dws") for i, layer in enumerate(own[group])] + [("proj.1", proj[1])]
    layers: list[Layer] = []
    for name, layer in named:
        found = _conv_norm.find(name, layer)
        if isinstance(found, str):
            return found
        layers.append(found)
    heads = len(own["qkvs"])
    cascade = Cascade(layers[:heads], layers[heads:-1], layers[-1], module.attention_biases, module.key_dim, module.scale)
    return _why_not_one_op(cascade) or cascade


def _why_not_one_op(cascade: Cascade) -> str | None:
    """Shapes and settings with which the layers are what the op computes."""
    heads, key_dim = len(cascade.qkvs), cascade.key_dim
    split = cascade.qkvs[0].conv.in_channels
    value_dim = cascade.qkvs[0].conv.out_channels - 2 * key_dim
    if value_dim < 1 or (heads > 1 and value_dim != split):
        return f"its value dim is {value_dim}, its heads have {split} channels each"
    for i, layer in enumerate(cascade.qkvs):
        if (reason := _checks.why_not_conv1x1(f"qkvs.{i}", layer.conv, split, 2 * key_dim + value_dim)) is not None:
            return reason
    if (reason := _checks.why_not_conv1x1("proj.1", cascade.proj.conv, heads * value_dim, heads * split)) is not None:
        return reason
    for i, layer in enumerate(cascade.dws):
        conv = layer.conv
        side = conv.kernel_size[0]
        settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        if settings != ((side, side), (1, 1), (side // 2, side // 2), (1, 1), key_dim, "zeros") or side % 2 == 0 or conv.out_channels != key_dim:
            return f"dws.{i} is not a depthwise convolution that keeps the size of the map"
    norms = cascade.norms()
    if norms and len(norms) != 2 * heads + 1:
        return "some of its norms are folded into the convolutions, some are not"
    if len({norm.eps for norm in norms}) > 1:
        return "its norms have different eps"
    return None


def attend(module: Any, x: Tensor, *, partition: bool) -> Tensor | str:
    """The attention of ``module`` as one op, or why this call has to run its layers one by one.

    Args:
        module: with the children and attributes this file is about.
        x: [B, C, w, w], or with ``partition`` the map [B, C, H, W].
        partition: whether the map is cut into windows.

    With live norms their running statistics are updated as their own forward would. Frozen ones are folded into the weights; if no gradient goes
    through these, the folded weights are kept until something they came from changes.
    """
    if (reason := _checks.why_not_tensor(x)) is not None:
        return reason
    # A compiled graph folds inside: its guards watch what the kept plan watches here.
    entry = None if torch.compiler.is_compiling() else _plans.entry(module)
    plan = _plan(module) if entry is None else entry.plan
    if isinstance(plan, str):
        return plan
    cascade, live, channels = plan
    side = cascade.window
    if x.dim() != 4 or x.shape[1] != channels:
        return f"the input has shape {tuple(x.shape)}, not [B, {channels}, H, W]"
    if (min(x.shape[2:]) < side) if partition else (tuple(x.shape[2:]) != (side, side)):
        return f"the map is {x.shape[2]} x {x.shape[3]}, the window {side} x {side}"
    window = side if partition else None
    wanted = gradient_wanted(cascade.tensors() if entry is None else entry.snapshot.tensors)
    dtype = _conv_norm.compute_dtype(x)

    if entry is not None and (live or wanted):
        entry.forget()
    if (live or wanted or (torch.is_grad_enabled() and x.requires_grad)) and backends.requested() == "auto":
        name = "cascaded_group_attention_batch_norm" if live else "cascaded_group_attention"
        if backends.select(name, x) == "reference":
            return "no kernel for training runs here, and without one the original code is the best there is"
    if entry is None or live or wanted:
        if (reason := why_not_tensors(cascade, x)) is not None:
            return reason
        if live:
            return _attend_live(cascade, x, window)
        return op.attend(x.to(dtype), folded(cascade, dtype), scale=cascade.scale, window=window)
    packed = entry.value((x.dtype, dtype, x.device), lambda: why_not_tensors(cascade, x) or _for_kernels(folded(cascade, dtype)))
    return packed if isinstance(packed, str) else op.attend(x.to(dtype), packed, scale=cascade.scale, window=window)


def _attend_live(cascade: Cascade, x: Tensor, window: int | None) -> Tensor:
    norms = cascade.norms()
    heads = len(cascade.qkvs)
    affine = [(norm.weight, norm.bias) for norm in norms]
    y, mean, var = ops.cascaded_group_attention_batch_norm(
        x,
        [layer.conv.weight for layer in cascade.qkvs],
        affine[:heads],
        [layer.conv.weight for layer in cascade.dws],
        affine[heads:-1],
        cascade.attention_biases,
        cascade.proj.conv.weight,
        affine[-1],
        key_dim=cascade.key_dim,
        eps=norms[0].eps,
        scale=cascade.scale,
        window=window,
    )
    side = cascade.window
    count = x.shape[0] * -(-x.shape[2] // side) * -(-x.shape[3] // side) * side * side
    _conv_norm.update_running_statistics(norms, mean, var, count)
    return y


def why_not_tensors(cascade: Cascade, x: Tensor) -> str | None:
    """Weights of other shapes than their layers say, no plain tensors, or of dtypes and devices that do not go together."""
    table = cascade.attention_biases
    if tuple(table.shape) != (len(cascade.qkvs), cascade.window**2):
        return f"its attention_biases have shape {tuple(table.shape)}, not [heads, window * window]"
    return _conv_norm.why_not_operands(cascade.layers(), x, table)


def folded(cascade: Cascade, dtype: torch.dtype) -> op.Packed:
    """The weights with the norms folded in, packed, in ``dtype``; differentiable, in some thirty torch calls whatever the number of heads."""
    qkvs, dws, proj = cascade.qkvs, cascade.dws, cascade.proj
    norms = cascade.norms()
    if not norms:
        packed = op.pack(
            [layer.conv.weight for layer in qkvs],
            [layer.conv.bias for layer in qkvs],
            [layer.conv.weight for layer in dws],
            [layer.conv.bias for layer in dws],
            cascade.attention_biases,
            proj.conv.weight,
            proj.conv.bias,
            key_dim=cascade.key_dim,
        )
        return op.Packed._make(value.to(dtype) if isinstance(value, Tensor) else value for value in packed)
    heads, key_dim = len(qkvs), cascade.key_dim
    qkv_weight = torch.stack([layer.conv.weight for layer in qkvs]).flatten(2)  # [heads, 2 * key_dim + d, C / heads]
    rows = qkv_weight.shape[1]
    sizes = [heads * rows, heads * key_dim, proj.conv.out_channels]
    factor, shift = _conv_norm.fold(norms, _define.accumulation_dtype(qkv_weight.dtype))
    of_qkv, of_dw, of_proj = factor.split(sizes)
    qkv_bias, dw_bias, proj_bias = shift.to(dtype).split(sizes)
    dw_weights: Any = torch._foreach_mul([layer.conv.weight for layer in dws], list(of_dw.view(heads, key_dim, 1, 1, 1).unbind()))
    return op.Packed(
        (qkv_weight * of_qkv.view(heads, rows, 1)).to(dtype),
        qkv_bias.view(heads, rows),
        torch.cat([weight.flatten() for weight in dw_weights]).to(dtype),
        dw_bias.view(heads, key_dim),
        cascade.attention_biases.to(dtype),
        (proj.conv.weight.flatten(1) * of_proj[:, None]).to(dtype),
        proj_bias,
        [layer.conv.kernel_size[0] for layer in dws],
        key_dim,
    )


def _for_kernels(packed: op.Packed) -> op.Packed:
    """The same with the output channel innermost in memory, as the native kernels read it without a copy."""
    return packed._replace(
        qkv_weight=packed.qkv_weight.mT.contiguous().mT,
        attention_bias=packed.attention_bias.detach(),
        proj_weight=packed.proj_weight.mT.contiguous().mT,
    )


class _Plan(NamedTuple):
    cascade: Cascade
    live: bool  # every norm is in training; otherwise none is
    channels: int


def _plan(module: Any) -> _Plan | str:
    cascade = find(module)
    if isinstance(cascade, str):
        return cascade
    training = {norm.training for norm in cascade.norms()}
    if len(training) == 2:
        return "some of its norms are in training mode, some are not"
    return _Plan(cascade, True in training, len(cascade.qkvs) * cascade.qkvs[0].conv.in_channels)


_plans: Derived[_Plan | str, op.Packed | str] = Derived(_plan, settings=attrgetter("key_dim", "scale"))
