"""When fusing would lose something. Every check returns ``None`` or the reason, as a phrase a report can print.

They run twice: when a model is accelerated, where the reason is reported, and at each call, because hooks, adapters and dtypes can arrive later.
So they are plain attribute look-ups, cheap beside the work and traceable by torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from vitkernels import backends

HOOKED = "has a hook (or a forward of its own), which fusing would bypass"
_TENSORS = (Tensor, nn.Parameter)


def global_hooks() -> bool:
    return bool(
        _module._global_forward_hooks or _module._global_forward_pre_hooks or _module._global_backward_hooks or _module._global_backward_pre_hooks
    )


def hooked(module: nn.Module) -> bool:
    """True if calling ``module`` does more than its class's forward."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own)


def watched(module: nn.Module) -> bool:
    """True if somebody's hook looks at the tensors of ``module``. The hooks of torch.distributed do not: FSDP2's gather and free parameters, whatever
    the tensor's shape.
    """
    if not hooked(module):
        return False
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks: list[Any] = [hook for table in tables for hook in table.values()]
    return "forward" in module.__dict__ or any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)


def behaves_as(cls: type, base: type[nn.Module]) -> bool:
    """True for ``base`` and for a subclass that adds a constructor and nothing that changes what a call computes."""
    if cls is base:
        return True
    names = ("forward", "__call__", "__getattr__", "_conv_forward")
    # A parametrization puts a property in the class where the weight was.
    return issubclass(cls, base) and all(getattr(cls, n, None) is getattr(base, n, None) for n in names) and not hasattr(cls, "weight")


def why_not_bypassed(name: str, layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``layer``, whose call the fused path skips, must be called: it is not the plain layer it was, or a hook waits for the call."""
    if not behaves_as(type(layer), kind):
        return f"{name} is a {type(layer).__name__}, not a plain {kind.__name__}"
    if hooked(layer):
        return f"{name} {HOOKED}"
    return None


def why_not_conv1x1(name: str, conv: nn.Module, channels: int, out_channels: int) -> str | None:
    """Why ``conv`` cannot be read as a weight matrix [out_channels, channels] and a bias."""
    if (reason := why_not_bypassed(name, conv, nn.Conv2d)) is not None:
        return reason
    assert isinstance(conv, nn.Conv2d)
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in ((0, 0), "same", "valid") or conv.groups != 1:
        return f"{name} is not a plain 1x1 convolution"
    if (conv.in_channels, conv.out_channels) != (channels, out_channels):
        return f"{name} maps {conv.in_channels} channels to {conv.out_channels}, not {channels} to {out_channels}"
    return None


def why_not_weight(name: str, weight: Tensor) -> str | None:
    """At accelerate time: a quantised or otherwise special weight. A DTensor passes: FSDP2 gathers it before the forward."""
    if type(weight) not in _TENSORS and not type(weight).__module__.startswith("torch.distributed."):
        return f"{name} is a {type(weight).__name__}, not a plain tensor"
    return None


def why_not_tensor(x: Any) -> str | None:
    """At run time: an input, or a mode, for which the original code is what should run."""
    if type(x) not in _TENSORS:
        return f"the input is a {type(x).__name__}"
    if backends.exporting():
        return "the model is being traced or exported"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "forward-mode differentiation or a torch.func transform is active"
    if global_hooks():
        return "a global module hook is registered"
    return None


def why_not_operands(x: Tensor, *operands: Tensor | None) -> str | None:
    """At run time: weights that are not plain tensors, or dtypes and devices that PyTorch itself would refuse to mix."""
    if x.dim() != 4 or x.layout is not torch.strided:
        return f"the input has {x.dim()} dimensions and layout {x.layout}"
    mixed = not torch.is_autocast_enabled(x.device.type)
    for operand in operands:
        if operand is None:
            continue
        if type(operand) not in _TENSORS:
            return f"a weight is a {type(operand).__name__}"
        if operand.device != x.device or (mixed and operand.dtype is not x.dtype):
            return f"the input is {x.dtype} on {x.device}, a weight {operand.dtype} on {operand.device}"
    return None
