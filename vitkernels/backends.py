"""Which backend runs a call, and why not the others.

Four backends can exist for an op:

``reference``
    plain PyTorch, any device, always there.
``native``
    fused C++ on the CPU, vectorised for the instruction set found at run time.
``triton``
    Triton kernels on a GPU (or on CPU tensors under ``TRITON_INTERPRET=1``).
``cuda``
    CUDA C++ kernels on a GPU.

``auto`` (the default) takes the first one that can run and, on a GPU, that has been proved on that architecture, in that dtype, with or
without gradients as the call is made (``torch.is_grad_enabled``); otherwise the reference. A backend asked for by name that cannot run raises
:class:`BackendUnavailable` with the reason: nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from vitkernels import native, proof

BACKENDS = ("reference", "native", "triton", "cuda")
TORCH = "torch"
"""What ``auto`` may choose where PyTorch has a fused kernel of the very op. No backend to ask for by name: for that, one calls PyTorch."""
_AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}
Reason = str | None
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this call. The message says why."""


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it must be one of 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


# A plain global, like torch.backends' own flags, so that torch.compile guards on it: a graph compiled under one
# choice is recompiled, not silently reused, under another.
_requested = _checked(os.environ.get("VITKERNELS_BACKEND", "auto"), "VITKERNELS_BACKEND")


def requested() -> str:
    """The backend in force: ``"auto"`` or a name from :data:`BACKENDS`."""
    return _requested


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every vitkernels op inside the ``with`` block on one backend.

    Args:
        name: ``"auto"``, ``"reference"``, ``"native"``, ``"triton"`` or ``"cuda"``.

    The choice is process-wide, as PyTorch's own ``torch.nn.attention.sdpa_kernel`` is. The environment variable
    ``VITKERNELS_BACKEND`` sets the starting value.

    Raises:
        ValueError: ``name`` is no backend.
    """
    global _requested
    previous, _requested = _requested, _checked(name, "backend name")
    try:
        yield
    finally:
        _requested = previous


@dataclass(frozen=True)
class Support:
    """What an op has: the floating dtypes of each backend. An absent backend is one the op was never written for.

    ``torch``, of an op that PyTorch has a fused kernel for: called with the backend that ``auto`` would take otherwise and the arguments of the
    public function, it says why PyTorch's kernel is the better choice, or None.
    """

    native: tuple[torch.dtype, ...] = (*_FLOATING, torch.float64)
    triton: tuple[torch.dtype, ...] = _FLOATING
    cuda: tuple[torch.dtype, ...] = ()
    torch: Callable[..., Reason] | None = None


_support: dict[str, Support] = {}


def declare(op: str, support: Support) -> None:
    """Say once, beside the op, which backends and dtypes it is written for."""
    _support[op] = support


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not_native(op: str, device: torch.device) -> str | None:
    if not _support[op].native:
        return f"{op} has no native kernel"
    if device.type != "cpu":
        return f"the native backend runs on the CPU; the tensors are on {device}"
    return native.why_not()


def _why_not_triton(op: str, device: torch.device) -> str | None:
    if not _support[op].triton:
        return f"{op} has no Triton kernel"
    if not native.has_module("triton"):
        return "the triton package is not installed"
    if device.type == "cpu" and not interpreting():
        return "Triton needs a GPU; the tensors are on cpu (TRITON_INTERPRET=1 runs the kernels there, slowly, for tests)"
    if device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA and ROCm devices; the tensors are on {device}"
    return None


def _why_not_cuda(op: str, device: torch.device) -> str | None:
    if not _support[op].cuda:
        return f"{op} has no CUDA C++ kernel (its GPU kernels are Triton)"
    if device.type != "cuda":
        return f"the CUDA backend needs a GPU; the tensors are on {device}"
    return native.why_not_cuda()


_WHY_NOT = {"native": _why_not_native, "triton": _why_not_triton, "cuda": _why_not_cuda}


def why_not(op: str, name: str, device: torch.device, dtype: torch.dtype, *, auto: bool = False, training: bool | None = None) -> str | None:
    """Why backend ``name`` cannot run ``op`` on tensors of this device and dtype; ``None`` if it can.

    With ``auto=True`` also why the automatic choice would pass it by: a GPU kernel that nobody has proved on this GPU in this dtype, for calls that
    a backward may follow (``training``; by default, where gradients are on) or for those that none follows.
    """
    if name == "reference":
        return None
    reason = _WHY_NOT[name](op, device)
    if reason is not None:
        return reason
    dtypes = getattr(_support[op], name)
    if dtype not in dtypes:
        return f"dtype {dtype} is not supported ({', '.join(str(d).removeprefix('torch.') for d in dtypes)} are)"
    if auto and device.type == "cuda":
        training = torch.is_grad_enabled() if training is None else training
        if not proof.proved(op, name, device, dtype, training):
            what = f"in {str(dtype).removeprefix('torch.')} {'with' if training else 'without'} gradients"
            return f"not yet proved on this GPU {what}: `vitkernels verify` checks and times it here, and makes it the default if it holds"
    return None


_CPU = torch.device("cpu")


def _resolve(op: str, wanted: str, device: torch.device, dtype: torch.dtype, training: bool) -> str:
    if wanted == "auto":
        # What the loop finds first on a CPU, in a third of the time: a call on few tokens notices a microsecond.
        if device == _CPU and dtype in _support[op].native and native.why_not() is None:
            return "native"
        for name in _AUTO_ORDER.get(device.type, ()):
            if why_not(op, name, device, dtype, auto=True, training=training) is None:
                return name
        return "reference"
    reason = why_not(op, wanted, device, dtype)
    if reason is not None:
        raise BackendUnavailable(f"backend {wanted!r} cannot run {op}: {reason}")
    return wanted


# What torch.compiler.assume_constant_result does, without importing all of torch._dynamo for it (that would double the import time of vitkernels):
# the choice is made once per compiled graph. `_requested` and the gradient mode, arguments, are guarded.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exporting() -> bool:
    """Whether a model is being exported or traced.

    Not by ``torch.compiler.is_exporting()``, which before torch 2.13 is true inside every ``torch.compile``.
    """
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def select(op: str, tensor: torch.Tensor, for_torch: Callable[[str], Reason] | None = None) -> str:
    """The backend for this call: the requested one if it can run, or ``auto``'s choice.

    ``for_torch`` is the op's ``Support.torch`` with the call's arguments in it; without, :data:`TORCH` is never chosen.

    While a model is exported or traced the choice is always ``reference``, so that what comes out is plain ATen and needs no vitkernels. It is also
    ``auto``'s choice under forward-mode differentiation and torch.func transforms, which the fused ops do not implement.

    Raises:
        BackendUnavailable: a backend was asked for by name and cannot run, with the reason.
    """
    if exporting():
        return "reference"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        if _requested not in ("auto", "reference"):
            raise BackendUnavailable(
                f"backend {_requested!r} cannot run {op}: forward-mode differentiation and torch.func transforms need the reference"
            )
        return "reference"
    chosen = _resolve(op, _requested, tensor.device, tensor.dtype, torch.is_grad_enabled())
    if for_torch is not None and _requested == "auto" and for_torch(chosen) is not None:
        return TORCH
    return chosen


@dataclass(frozen=True)
class Candidate:
    """One row of :func:`explain`: a backend, whether it can run the call, and what speaks against it (of :data:`TORCH`, for it)."""

    backend: str
    can_run: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`. ``chosen`` is the backend a call would use now, or ``None`` if it would raise."""

    op: str
    requested: str
    chosen: str | None
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        width = max(map(len, BACKENDS))
        rows = [f"{self.op}: requested {self.requested!r}, would run on {self.chosen!r}"]
        for c in self.candidates:
            mark = "->" if c.backend == self.chosen else "  "
            rows.append(f" {mark} {c.backend:<{width}}  {'yes' if c.can_run else 'no ':<3}  {c.reason}".rstrip())
        return "\n".join(rows)


def explain_for(op: str, tensor: torch.Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Explanation:
    """:func:`vitkernels.explain` once the op's first tensor is known."""
    device, dtype = tensor.device, tensor.dtype
    candidates = []
    for name in BACKENDS:
        reason = why_not(op, name, device, dtype)
        auto_reason = reason or why_not(op, name, device, dtype, auto=True)
        candidates.append(Candidate(name, reason is None, auto_reason or ""))
    try:
        chosen: str | None = _resolve(op, _requested, device, dtype, torch.is_grad_enabled())
    except BackendUnavailable:
        chosen = None
    rule = _support[op].torch
    if rule is not None and chosen is not None and _requested == "auto":
        with contextlib.suppress(TypeError, ValueError, IndexError):  # arguments that the op itself would refuse
            reason = rule(chosen, *args, **(kwargs or {}))
            if reason is not None:
                candidates.append(Candidate(TORCH, True, reason))
                chosen = TORCH
    return Explanation(op, _requested, chosen, tuple(candidates))
