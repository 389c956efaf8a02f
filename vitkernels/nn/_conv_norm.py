"""A convolution and the BatchNorm behind it: found in a model, folded into one affine map, and its running statistics kept as PyTorch keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.nn import _checks
from vitkernels.nn._derived import Derived, gradient_wanted
from vitkernels.ops import _define


class Layer(NamedTuple):
    """A convolution without bias and its norm, or (already reparameterised) a convolution alone."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None

    def tensors(self) -> list[Tensor]:
        """Everything the layer computes with."""
        conv, norm = self
        found = [conv.weight, conv.bias]
        if norm is not None:
            found += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return [tensor for tensor in found if tensor is not None]


class ConvNorm(nn.Sequential):
    """A convolution without bias, then BatchNorm. While the norm is not in training it is folded into the convolution.

    Args:
        channels: of the input.
        out_channels: of the output.
        kernel_size: odd; the map keeps its size.
        groups: as of ``nn.Conv2d``.
        norm_init: initial weight of the norm.
        device: as of ``nn.Conv2d``.
        dtype: as of ``nn.Conv2d``.

    Shape: [B, channels, H, W] to [B, out_channels, H, W]. Children ``conv`` and ``bn``, named as timm names them.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: int = 1,
        groups: int = 1,
        norm_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        nn.init.constant_(self.bn.weight, norm_init)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out_channels, H, W]."""
        if _checks.why_not_tensor(x) is not None:
            return super().forward(x)
        compiling = torch.compiler.is_compiling()
        entry = None if compiling else _layers.entry(self)
        layer = find("", self) if entry is None else entry.plan
        if isinstance(layer, str) or layer.norm is None or layer.norm.training:
            if entry is not None:
                entry.forget()
            return super().forward(x)
        if entry is None or gradient_wanted(layer.tensors()):
            weight, bias = _folded(layer)
        else:
            weight, bias = entry.value(None, lambda: _folded(layer))
        conv = layer.conv
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def find(name: str, module: Any) -> Layer | str:
    """The layer that ``module`` is, or why its call cannot be skipped; ``name`` is what to call it."""
    if not isinstance(module, nn.Sequential):
        reason = _checks.why_not_bypassed(name, module, nn.Conv2d) or why_not_own(name, module, "weight", "bias")
        return Layer(module, None) if reason is None else reason
    children: list[tuple[str, Any]] = list(module._modules.items())
    if len(children) != 2:
        return f"{name} is not a convolution and a norm"
    (conv_name, conv), (norm_name, norm) = children
    prefix = name and name + "."
    # Ours adds the folding to Sequential's forward; and where it asks about itself ("") its own hooks have run.
    plain = ConvNorm if type(module) is ConvNorm else nn.Sequential
    reason = (
        (_checks.why_not_bypassed(name, module, plain) if name else None)
        or _checks.why_not_bypassed(prefix + conv_name, conv, nn.Conv2d)
        or _checks.why_not_bypassed(prefix + norm_name, norm, nn.BatchNorm2d)
        or why_not_own(prefix + conv_name, conv, "weight")
        or why_not_own(prefix + norm_name, norm, "weight", "bias", "running_mean", "running_var")
    )
    if reason is not None:
        return reason
    if conv.bias is not None:
        return f"{prefix}{conv_name} has a bias, and a norm behind it"
    if norm.weight is None or norm.bias is None:
        return f"{prefix}{norm_name} has no weight or no bias"
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return f"{prefix}{norm_name} does not track running statistics"
    return Layer(conv, norm)


def why_not_square(name: str, conv: nn.Conv2d) -> str | None:
    """Why a convolution is not one number for its kernel, one for its stride and one for its zero padding."""
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.stride[0] != conv.stride[1] or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return f"{name} is a convolution that is not square, or dilated, or padded with something else than zeros"
    if isinstance(conv.padding, str) or conv.padding[0] != conv.padding[1]:
        return f"{name} is a convolution with padding {conv.padding}"
    return None


def why_not_own(name: str, module: nn.Module, *tensors: str) -> str | None:
    """Where a layer keeps a tensor as a plain attribute (a replica of nn.DataParallel, some pruning), nothing watches it."""
    for tensor in tensors:
        if tensor not in module._parameters and tensor not in module._buffers:
            return f"the {tensor} of {name} is neither a parameter nor a buffer"
    return None


def fold(norms: Sequence[nn.BatchNorm1d | nn.BatchNorm2d], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Frozen norms as ``factor * y + shift``, all their channels one after another, computed in ``dtype``. All share one eps."""
    weight, bias, mean, var = (
        torch.cat([getattr(norm, name) for norm in norms]).to(dtype) for name in ("weight", "bias", "running_mean", "running_var")
    )
    factor = weight * torch.rsqrt(var + norms[0].eps)
    return factor, torch.addcmul(bias, mean, factor, value=-1)


def folded(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one convolution that a layer is with its norm frozen, computed in ``dtype``."""
    conv, norm = layer
    weight, bias = conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
    if norm is None:
        return weight, bias
    factor, shift = fold([norm], dtype)
    return weight * factor[:, None, None, None], shift if bias is None else torch.addcmul(shift, bias, factor)


def _folded(layer: Layer) -> tuple[Tensor, Tensor]:
    """The same in the dtype of the convolution's weight."""
    dtype = layer.conv.weight.dtype
    weight, bias = folded(layer, _define.accumulation_dtype(dtype))
    assert bias is not None
    return weight.to(dtype), bias.to(dtype)


def why_not_operands(layers: Sequence[Layer], x: Tensor, *others: Tensor) -> str | None:
    """Weights (``others`` among them) of other shapes than their layers say, no plain tensors, or of dtypes and devices that do not go with ``x``."""
    for layer in layers:
        conv = layer.conv
        if tuple(conv.weight.shape) != (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size):
            return f"a convolution's weight has shape {tuple(conv.weight.shape)}"
    plain = [layer.conv.weight for layer in layers] + [layer.conv.bias for layer in layers]
    if (reason := _checks.why_not_operands(x, *others, *plain)) is not None:
        return reason
    return why_not_norms([layer.norm for layer in layers if layer.norm is not None], x)


def why_not_norms(norms: Sequence[nn.BatchNorm1d | nn.BatchNorm2d], x: Tensor) -> str | None:
    """Parameters of norms that are no plain tensors, or of dtypes and devices that do not go with ``x``."""
    dtypes = (compute_dtype(x), _define.accumulation_dtype(x.dtype))
    for norm in norms:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            if (reason := _checks.why_not_weight("a norm's parameter", tensor)) is not None:
                return reason
            if tensor.device != x.device or tensor.dtype not in dtypes:
                return f"the input is {x.dtype} on {x.device}, a norm's parameter {tensor.dtype} on {tensor.device}"
    return None


@torch.no_grad()
def update_running_statistics(norms: Sequence[nn.BatchNorm2d], mean: Tensor, var: Tensor, count: int) -> None:
    """What ``nn.BatchNorm2d`` does to its buffers in a training forward, for many norms at once.

    Args:
        norms: the norms, all tracking.
        mean: batch means of all their channels, one norm after another, in float32 or float64.
        var: biased batch variances, likewise.
        count: values per channel.
    """
    counters: list[Any] = [norm.num_batches_tracked for norm in norms]
    torch._foreach_add_(counters, 1)
    momentum = [1.0 / float(counter) if norm.momentum is None else norm.momentum for norm, counter in zip(norms, counters, strict=True)] * 2
    sizes = [norm.num_features for norm in norms]
    batch = [*mean.split(sizes), *(var * (count / (count - 1))).split(sizes)]
    running: list[Any] = [*(norm.running_mean for norm in norms), *(norm.running_var for norm in norms)]
    exact = [tensor.to(mean.dtype) for tensor in running]
    torch._foreach_mul_(exact, [1 - m for m in momentum])
    torch._foreach_add_(exact, torch._foreach_mul(batch, momentum))
    if any(e is not r for e, r in zip(exact, running, strict=True)):
        torch._foreach_copy_(running, exact)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` computes in: its own, or autocast's."""
    autocast = _define.autocast_of(x)
    return x.dtype if autocast is None or x.dtype is torch.float64 else autocast


_layers: Derived[Layer | str, tuple[Tensor, Tensor]] = Derived(lambda module: find("", module), settings=lambda module: None)
