"""The papers' own code, which is copied into projects under many module names: recognised by its attributes.

MobileViTv2 (ml-cvnets): ``LinearSelfAttention`` with ``qkv_proj.block.conv``, ``attn_dropout``, ``out_proj.block.conv``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.backends import backend
from vitkernels.integrations import _checks
from vitkernels.integrations._fused import Fused, Role, fused_class, published
from vitkernels.integrations.separable import Attention, Layers, Patch


class CvnetsAttention(Attention):
    """ml-cvnets' ``LinearSelfAttention``."""

    @classmethod
    def _vk_layers(cls, module: Any) -> Layers:
        return Layers(_conv(module.qkv_proj), _conv(module.out_proj), module.attn_dropout, module._modules.get("out_dropout"))

    @classmethod
    def _vk_why_not_layers(cls, module: Any, layers: Layers) -> str | None:
        for name, projection in (("qkv_proj", module.qkv_proj), ("out_proj", module.out_proj)):
            if layers.qkv is projection or layers.out is projection or list(projection.block._modules) != ["conv"]:
                return f"{name} is more than a convolution"
            if _checks.hooked(projection) or _checks.hooked(projection.block):
                return f"{name} {_checks.HOOKED}"
        return super()._vk_why_not_layers(module, layers)

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return super()._vk_why_not(module, role) or _why_not_same(module)

    def forward(self, x: Tensor, x_prev: Tensor | None = None, *args: Any, patch_size: Patch | None = None, **kwargs: Any) -> Tensor:
        """The original's arguments; ``patch_size`` says that the tensor is a feature map."""
        if x_prev is not None:
            return self._vk_cross_attend(super().forward, x, x_prev, *args, **kwargs)
        return self._vk_attend(x, patch_size, super().forward)


def _conv(projection: Any) -> Any:
    """The convolution in ml-cvnets' ``ConvLayer2d``; a projection that was replaced by something else is returned as it is."""
    return getattr(getattr(projection, "block", None), "conv", projection)


def _why_not_same(module: Any) -> str | None:
    """A name and some attributes promise nothing about the code: run a copy once, in evaluation and in training, and compare."""
    weight = CvnetsAttention._vk_weight(module)
    if weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        return "its code is recognised by attributes only, and cannot be checked by running it: its weights are not materialised here"
    dim, cuda = weight.shape[1], [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(cuda), torch.no_grad(), backend("reference"), torch.autocast(weight.device.type, enabled=False):
        probe = copy.deepcopy(module).double()
        x = torch.randn(2, dim, 3, 5, dtype=torch.float64, device=weight.device)
        for training in (False, True):
            outputs = []
            for cls in (type(module), fused_class(type(module), CvnetsAttention)):
                probe.__class__ = cls
                torch.manual_seed(0)
                try:
                    # Not a call: the hooks on the module are for the user's data.
                    outputs.append(probe.train(training).forward(x))
                except Exception as error:  # whatever foreign code may raise
                    return f"it has the attributes of ml-cvnets' LinearSelfAttention, but does not run like it: {error}"
            theirs, ours = outputs
            # Two chained sums over d in another order differ by about d roundings each.
            bound = dim**2 * torch.finfo(x.dtype).eps * theirs.abs().max().clamp_min(1)
            if theirs.shape != ours.shape or not (theirs - ours).abs().max() <= bound:
                return "it has the attributes of ml-cvnets' LinearSelfAttention, but computes something else"
    return None


def match(module: nn.Module) -> type[Fused] | None:
    """The replacement for a class known by its attributes, or ``None``."""
    children = module._modules.keys()
    required = {"qkv_proj", "attn_dropout", "out_proj"}
    if published(type(module)).__name__ != "LinearSelfAttention" or not required <= children <= required | {"out_dropout"}:
        return None
    named = hasattr(module, "embed_dim") and all(hasattr(getattr(module, name), "block") for name in ("qkv_proj", "out_proj"))
    return CvnetsAttention if named else None
