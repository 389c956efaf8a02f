"""Chains of layers of modules: what a part of a convolutional network has to be to run as one op in inference.

A walk over the modules (:class:`Walk`) says which layers they are, in steps that hold the modules' own tensors. Folding the norms into these makes
the layers of :mod:`vitkernels.ops.chain`, which are kept packed until something they came from changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels import backends
from vitkernels.nn import _cascade, _checks, _conv_norm
from vitkernels.nn._cascade import Cascade
from vitkernels.nn._conv_norm import Layer
from vitkernels.nn._derived import Derived, gradient_wanted
from vitkernels.ops import _define
from vitkernels.ops.chain import op, reference
from vitkernels.ops.chain.reference import Attention, Convolution, Depthwise, FeedForward, Pool, SqueezeExcite

SILENT = ""
"""Why a call is not for the chain where this is as it should be: in training, with gradients, in a compiled graph. Nothing to report."""


class Head(NamedTuple):
    """The mean of a map, a norm and a linear layer."""

    norm: nn.BatchNorm1d | None
    linear: nn.Linear

    def tensors(self) -> list[Tensor]:
        """Everything it computes with."""
        norm, linear = self
        of_norm = () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return [tensor for tensor in (linear.weight, linear.bias, *of_norm) if tensor is not None]


class Step(NamedTuple):
    """One layer of a chain, with the modules it is made of."""

    kind: type
    layers: tuple[Layer, ...]
    cascade: Cascade | None = None
    relu: bool = False
    residual: bool = False


class Plan(NamedTuple):
    """What a module is made of: of a model with a head that can go with the steps, that as well."""

    steps: list[Step]
    head: Head | None


class Other(Exception):
    """A module is not what the walk took it for; the message says which and why."""


class Walk:
    """Finds the steps of modules. What a class is made of is told by :attr:`known`, by the name of the class."""

    known: dict[str, Callable[[Walk, str, Any], list[Step]]]

    def __init__(self, known: dict[str, Callable[[Walk, str, Any], list[Step]]], name_of: Callable[[nn.Module], str]) -> None:
        self.known, self._name_of = known, name_of

    def steps(self, name: str, module: Any) -> list[Step]:
        """The steps of a module that the walk knows, or of a sequence of such.

        Raises:
            Other: it has a hook, or is of a class that the walk does not know.
        """
        if name and _checks.hooked(module):
            raise Other(f"{name} {_checks.HOOKED}")
        if (find := self.known.get(self._name_of(module))) is not None:
            return find(self, name, module)
        if type(module) is nn.Identity:
            return []
        if type(module) is not nn.Sequential:
            raise Other(f"{name} is a {type(module).__name__}, which is not known")
        return self.sequence(name, module)

    def sequence(self, name: str, module: Any) -> list[Step]:
        """The steps of a ``Sequential``; a ReLU in it is part of the convolution before."""
        steps: list[Step] = []
        for child, part in module._modules.items():
            if type(part) is nn.ReLU and steps and steps[-1].kind in (Convolution, Depthwise) and not (steps[-1].relu or steps[-1].residual):
                plain(below(name, child), part, nn.ReLU)
                steps[-1] = steps[-1]._replace(relu=True)
            else:
                steps += self.steps(below(name, child), part)
        return steps


def below(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def layer(name: str, module: Any) -> Layer:
    """A convolution and its norm, or a convolution alone."""
    found = _conv_norm.find(name, module)
    if isinstance(found, str):
        raise Other(found)
    if (reason := _conv_norm.why_not_square(name, found.conv)) is not None:
        raise Other(reason)
    return found


def convolution(name: str, module: Any, relu: bool = False) -> Step:
    """A convolution with its norm and what follows; of one group, or of as many as channels."""
    found = layer(name, module)
    conv = found.conv
    if conv.groups == 1:
        return Step(Convolution, (found,), relu=relu)
    if conv.groups == conv.in_channels == conv.out_channels:
        return Step(Depthwise, (found,), relu=relu)
    raise Other(f"{name} is a convolution of {conv.groups} groups")


def twice(kind: type, names: tuple[str, str], modules: tuple[Any, Any]) -> Step:
    """Two 1x1 convolutions with a ReLU between, from C channels back to C."""
    first, second = (layer(name, module) for name, module in zip(names, modules, strict=True))
    channels, hidden = first.conv.in_channels, first.conv.out_channels
    for name, found, sizes in ((names[0], first, (channels, hidden)), (names[1], second, (hidden, channels))):
        if (reason := _checks.why_not_conv1x1(name, found.conv, *sizes)) is not None:
            raise Other(reason)
    return Step(kind, (first, second))


def plain(name: str, module: Any, kind: type[nn.Module]) -> None:
    """Raises :class:`Other` unless ``module`` is a ``kind`` whose call can be skipped."""
    if (reason := _checks.why_not_bypassed(name, module, kind)) is not None:
        raise Other(reason)


def attention(module: Any) -> Step:
    """Cascaded group attention within windows."""
    found = _cascade.find(module)
    if isinstance(found, str):
        raise Other(found)
    return Step(Attention, tuple(found.layers()), cascade=found)


def head(name: str, norm: Any, linear: Any) -> Head:
    """A mean over the map, then a norm, if there is one, and a linear layer."""
    plain(name, linear, nn.Linear)
    reason = _conv_norm.why_not_own(name, linear, "weight", "bias")
    if norm is not None:
        plain(f"the norm before {name}", norm, nn.BatchNorm1d)
        reason = reason or _conv_norm.why_not_own(f"the norm before {name}", norm, "weight", "bias", "running_mean", "running_var")
        if norm.training or norm.weight is None or norm.running_mean is None or norm.running_var is None or not norm.track_running_stats:
            raise Other(f"the norm before {name} is in training, or has no weight or no running statistics")
    found = Head(norm, linear)
    for tensor in found.tensors():
        reason = reason or _checks.why_not_weight("a weight", tensor)
    if reason is not None:
        raise Other(reason)
    return found


def _why_not_head(found: Head, channels: int, x: Tensor) -> str | None:
    """Why a head does not go with ``x``, or with a map of so many channels."""
    norm, linear = found
    of_norm = found.tensors()[1 if linear.bias is None else 2 :]
    if linear.weight.shape[1:] != (channels,) or any(tensor.shape != (channels,) for tensor in of_norm):
        return f"the head is not one for a map of {channels} channels"
    return _checks.why_not_operands(x, linear.weight, linear.bias) or _conv_norm.why_not_norms([] if norm is None else [norm], x)


def _folded_head(found: Head, dtype: torch.dtype) -> list[Any]:
    """The norm goes with the mean, in float32: the linear layer's weight stays the number it is."""
    weight = found.linear.weight.to(dtype)
    out_channels, channels = weight.shape
    bias = weight.new_zeros(out_channels) if found.linear.bias is None else found.linear.bias.to(dtype)
    factor, shift = (weight.new_ones(channels), weight.new_zeros(channels)) if found.norm is None else _conv_norm.fold([found.norm], dtype)
    return [Pool(factor, shift), Convolution(weight[..., None, None], bias)]


def _folded(step: Step, dtype: torch.dtype) -> Any:
    """A step as a layer of the op, in ``dtype``."""
    if step.cascade is not None:
        return Attention(_cascade.folded(step.cascade, dtype), step.cascade.scale, step.cascade.window, step.residual)
    found = []
    for one in step.layers:
        weight, bias = _conv_norm.folded(one, dtype)
        found.append((weight, weight.new_zeros(weight.shape[0]) if bias is None else bias))
    kind: Any = step.kind
    if kind in (FeedForward, SqueezeExcite):
        (first, first_bias), (second, second_bias) = found
        return kind(first.flatten(1), first_bias, second.flatten(1), second_bias, step.residual)
    (weight, bias), conv = found[0], step.layers[0].conv
    return kind(weight, bias, conv.stride[0], conv.padding[0], step.relu, step.residual)


def _layers(plan: Plan, x: Tensor, headed: bool) -> list[Any] | str:
    """The steps as layers of the op, or why they do not go with ``x``."""
    for step in plan.steps:
        reason = _conv_norm.why_not_operands(step.layers, x) if step.cascade is None else _cascade.why_not_tensors(step.cascade, x)
        if reason is not None:
            return reason
    dtype = _define.accumulation_dtype(x.dtype)
    layers = [_folded(step, dtype) for step in plan.steps]
    if headed and plan.head is not None:
        if (reason := _why_not_head(plan.head, plan.steps[-1].layers[-1].conv.out_channels, x)) is not None:
            return reason
        layers += _folded_head(plan.head, dtype)
    return layers


def _packed(plan: Plan, x: Tensor, headed: bool) -> op.Packed | str:
    layers = _layers(plan, x, headed)
    return layers if isinstance(layers, str) else op.pack(layers, x.dtype)


def _plan(module: Any) -> Plan | str:
    try:
        steps = module._vk_steps()
    except Other as reason:
        return str(reason)
    if any(one.norm is not None and one.norm.training for step in steps for one in step.layers):
        return SILENT
    try:
        return Plan(steps, module._vk_head())
    except Other:  # it is called as it is
        return Plan(steps, None)


def run(module: Any, x: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor | str:
    """``module`` of ``x`` as one op, or why this call has to run its layers one by one (:data:`SILENT` where nobody needs to know).

    ``module._vk_steps()`` says what it is made of, and ``module._vk_head()`` what its head is, or they raise :class:`Other`. With ``head`` the
    result is what that makes of the map; it is called unless it is part of the op.
    """
    if torch.compiler.is_compiling():
        return SILENT
    if module.training:
        _chains.forget(module)
        return SILENT
    if (reason := _checks.why_not_tensor(x) or why_no_kernel(x)) is not None:
        return reason
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the dtype of each layer by itself"
    entry = _chains.entry(module)
    plan = entry.plan
    if isinstance(plan, str):
        return plan
    if gradient_wanted((x,), entry.snapshot.tensors):
        entry.forget()
        return SILENT
    headed = head is not None and plan.head is not None
    packed = entry.value((x.dtype, x.device, headed), lambda: _packed(plan, x, headed))
    if isinstance(packed, str):
        return packed
    if x.dim() != 4 or x.shape[1] != packed.channels:
        return f"the input has shape {tuple(x.shape)}, not [B, {packed.channels}, H, W]"
    if (reason := op.why_not_map(packed.program, *x.shape[1:])) is not None:
        return reason
    if backends.requested() == "reference":
        layers: Any = _layers(plan, x, headed)
        y = reference.layer_chain(x.to(packed.vectors.dtype), layers).to(x.dtype)
    else:
        y = op.run(x, packed)
    if headed:
        return y.view(y.shape[:2])
    return y if head is None else head(y)


def why_no_kernel(x: Tensor) -> str | None:
    """Why there is no kernel for chains where ``x`` is, or why it was not asked for."""
    if backends.requested() == "reference":
        return None
    if backends.requested() not in ("auto", "native"):
        return f"backend {backends.requested()!r} was asked for, and a chain of layers has a native kernel alone"
    return backends.why_not("layer_chain", "native", x.device, x.dtype)


_READ = ("key_dim", "scale", "drop", "add_maxpool", "p", "output_size", "start_dim", "end_dim")
_chains: Derived[Plan | str, op.Packed | str] = Derived(_plan, settings=lambda module: None, below=_READ)
