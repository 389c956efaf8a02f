"""How a differentiable op enters torch.library: written once, used by every op.

Each op exists in two namespaces with one schema: ``vitkernels`` holds the compiled kernels (C++ on the CPU, CUDA C++ on a GPU) and
``vitkernels_triton`` the Triton ones. Two namespaces instead of one, because under Triton's interpreter both kinds take CPU tensors and one
dispatch key holds one kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitkernels import native

COMPILED = torch.library.Library("vitkernels", "DEF")
TRITON = torch.library.Library("vitkernels_triton", "DEF")
_LIBRARIES = {"vitkernels": COMPILED, "vitkernels_triton": TRITON}
_TAGS = (torch.Tag.pt2_compliant_tag,)


def define(
    name: str,
    *,
    schema: str,
    backward_schema: str,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    cast_by_autocast: tuple[int, ...] | None = None,
) -> None:
    """Define ``<namespace>::<name>`` and ``<namespace>::<name>_backward`` with fakes, autograd and autocast, in both namespaces.

    Args:
        name: of the op.
        schema: the part after the name, ``(Tensor x, ...) -> (...)``.
        backward_schema: the same of ``<name>_backward``.
        fake: shape function of the op.
        backward_fake: shape function of its backward.
        setup_context: as for :func:`torch.library.register_autograd`.
        backward: ``backward(op, ctx, *grads)``; ``op`` calls the namespace's own ``<name>_backward``.
        cast_by_autocast: positions of the arguments that autocast casts; None for all tensors.
    """
    for namespace, library in _LIBRARIES.items():
        forward_op = _define_one(namespace, library, name, schema, fake)
        backward_op = _define_one(namespace, library, name + "_backward", backward_schema, backward_fake)

        def run_backward(ctx: Any, *grads: Any, _op: Any = backward_op) -> Any:
            return backward(functools.partial(call, _op, torch.is_grad_enabled()), ctx, *grads)

        torch.library.register_autograd(f"{namespace}::{name}", run_backward, setup_context=setup_context, lib=library)
        torch.library.register_autograd(f"{namespace}::{name}_backward", _no_double_backward(name), lib=library)
        for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            library.impl(name, _autocast(forward_op, key, device, cast_by_autocast), key)


def define_without_gradient(name: str, *, schema: str, fake: Callable[..., Any]) -> None:
    """Define ``<namespace>::<name>`` in both namespaces: an op that nobody differentiates and whose tensors autocast leaves as they are."""
    for namespace, library in _LIBRARIES.items():
        _define_one(namespace, library, name, schema, fake)


def _define_one(namespace: str, library: torch.library.Library, name: str, schema: str, fake: Callable[..., Any]) -> Any:
    library.define(name + schema, tags=_TAGS)
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, namespace), name).default


def define_for_inference(name: str, *, schema: str, fake: Callable[..., Any], instead: str) -> None:
    """Define ``vitkernels::<name>``, a compiled op without a gradient; asked for one it raises, and names what to call ``instead``."""

    def raise_error(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"vitkernels::{name} is for inference and has no gradient; {instead} has")

    COMPILED.define(name + schema, tags=_TAGS)
    torch.library.register_fake(f"vitkernels::{name}", fake, lib=COMPILED)
    torch.library.register_autograd(f"vitkernels::{name}", raise_error, lib=COMPILED)


def implement_in_triton(family: str, *names: str, without_gradient: tuple[str, ...] = ()) -> None:
    """Take ``<name>`` and ``<name>_backward`` of each op from ``vitkernels/ops/<family>/triton.py``, where the triton package is installed."""
    _implement(TRITON, "CompositeExplicitAutograd", f"{family}.triton", *without_gradient, *_both(names))


def implement_on_gpu(family: str, *names: str) -> None:
    """Take the compiled ``<name>`` and ``<name>_backward`` of each op on a GPU from ``vitkernels/ops/<family>/cuda.py``, which calls the CUDA
    library's ops and, for what these have not, Triton's kernels.
    """
    _implement(COMPILED, "CUDA", f"{family}.cuda", *_both(names))


def _both(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(op for name in names for op in (name, f"{name}_backward"))


def _implement(library: torch.library.Library, key: str, module: str, *names: str) -> None:
    if not native.has_module("triton"):
        return
    kernels = importlib.import_module(f"vitkernels.ops.{module}")
    for name in names:
        library.impl(name, getattr(kernels, name), key)


def _no_double_backward(name: str) -> Callable[..., Any]:
    def raise_error(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"vitkernels::{name} has no second derivative; vitkernels.backend('reference') has: PyTorch differentiates it any number of times"
        )

    return raise_error


def autocast_of(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast would cast to on this tensor's device, or ``None`` outside autocast."""
    if not torch._C._is_any_autocast_enabled():  # a tenth of the time that it takes to ask for one device
        return None
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast(op: Any, key: str, device: str, positions: tuple[int, ...] | None) -> Callable[..., Any]:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*(cast(a, dtype) if positions is None or i in positions else a for i, a in enumerate(args)), **kwargs)

    return run


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, statistics and gradients of tensors of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def token_major(like: Tensor, width: int) -> Tensor:
    """[B, H, N, width] for the heads of ``like``, in memory [B, N, H, width]: joining the heads is no copy."""
    batch, heads, tokens, _ = like.shape
    return like.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` in the autocast dtype, by the rule of ``F.linear``: floating tensors other than float64 are cast, the rest pass."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in (dtype, torch.float64):
        return value.to(dtype)
    return value


def differentiable(*tensors: Tensor | None) -> bool:
    """True if autograd has to see this call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def call(op: Any, needs_autograd: bool, *args: Any) -> Any:
    """Call an op; below autograd if no gradient is wanted.

    A Python autograd registration costs about ten microseconds a call even when nothing requires a gradient: as much as the whole kernel on
    the small maps of a MobileViTv2 at batch 1. Skipping it is only a shortcut; the op is the same.
    """
    if needs_autograd or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
