"""The list of ops. Contract tests, benchmarks, ``vitkernels verify``, ``doctor`` and the README's table all read it, so nothing is listed twice.

An op enters by one :class:`OpSpec`, built in ``ops/<family>/spec.py`` and imported in :func:`all_specs`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

Reason = str | None


def is_floating(value: Any) -> bool:
    """Whether it is a tensor of numbers that are rounded and have gradients; integers (lengths, ids) are part of what is asked."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class Sample:
    """One call of an op: ``spec.function(*args, **kwargs)``.

    ``args`` hold fresh tensors, also in lists and tuples, whose ``requires_grad`` is already set where the op is differentiable. ``buffers`` names
    the keyword arguments in which it is not.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()

    def tensors(self) -> list[torch.Tensor]:
        """The floating tensors among the arguments, in order, those in lists included."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if is_floating(leaf)]

    def named_arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The arguments by the name of ``function``'s parameter."""
        return dict(inspect.signature(function).bind(*self.args, **self.kwargs).arguments)

    def named_tensors(self, function: Callable[..., Any]) -> dict[str, torch.Tensor]:
        """:meth:`tensors` by name: ``x``, ``qkv_weights[1]``, ``qkv_norms[0][1]``."""
        return {
            name + pytree.keystr(path): leaf
            for name, argument in self.named_arguments(function).items()
            for path, leaf in pytree.tree_leaves_with_path(argument)
            if is_floating(leaf)
        }

    def mapped(self, change: Callable[[torch.Tensor], Any]) -> Sample:
        """The same call with every floating tensor replaced by ``change(tensor)``."""
        args, kwargs = pytree.tree_map(lambda leaf: change(leaf) if is_floating(leaf) else leaf, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class BadInput:
    """A call that must fail, with the exception and words that the message must hold (argument, what it has, what it needs)."""

    name: str
    sample: Sample
    exception: type[Exception]
    words: tuple[str, ...]

    @staticmethod
    def of(name: str, exception: type[Exception], words: tuple[str, ...], *args: Any, **kwargs: Any) -> BadInput:
        """The call with these arguments."""
        return BadInput(name, Sample(name, args, kwargs), exception, words)


@dataclass(frozen=True)
class BenchCase:
    """A shape worth timing.

    Attributes:
        name: what a report prints, for example ``B1 d128 N256``.
        make: builds the call's sample for a dtype and device.
        flops: arithmetic the algorithm needs (not what eager spends); matrix multiplications only.
        bytes: least memory traffic in bytes per element size 1, multiplied by the element size by the caller.
    """

    name: str
    make: Callable[[torch.dtype, str], Sample]
    flops: int
    elements_moved: int


@dataclass(frozen=True)
class OpSpec:
    """Everything the house knows about one op.

    Attributes:
        name: the name under :mod:`vitkernels.ops`.
        family: the folder under ``vitkernels/ops``.
        function: the public function.
        reference: the same signature in plain PyTorch: the definition.
        summary: one line for tables, with the paper.
        samples: contract samples for a dtype and device, hostile shapes included. ``grad=True`` sets ``requires_grad``.
        bad_inputs: calls that must be refused.
        bench_cases: shapes for ``vitkernels bench`` and ``benchmarks/`` on a CPU.
        gpu_cases: the same on a GPU: batches that fill it, and one that does not; by default ``bench_cases``.
        peers: other ways to compute the same thing, by the name a report prints; same signature as ``function``.
        otherwise: those of the peers that a model runs, or ``auto`` calls, where no kernel is taken. On a GPU a kernel has to beat them, and eager,
            to become ``auto``'s choice.
        yardsticks: what is timed beside them although it computes something else, such as plain attention; same signature, never judged.
        saved_bytes: upper bound on bytes saved for backward beyond the call's own input tensors.
        working_activations: upper bounds on the forward's and the backward's working memory, in sizes of the largest activation.
        gpu_working_activations: the same of the GPU kernels, where they need more.
        tiles_span_images: backends whose tiles hold rows of several images, so that a NaN in v reaches an image beside its own (0 * NaN), as it does
            under a dense mask.
        schema: the op of ``torch.ops.vitkernels`` underneath; by default, the one of that name.
        differentiable: False of an op that nobody differentiates.
        wide: the op computes and answers in float32 (float64 for float64) whatever it is given, and under autocast, as PyTorch's own losses do.
        kept_by_autocast: parameters of ``function`` that autocast leaves in their own dtype, as ``F.batch_norm`` leaves its weight and bias.

    Which outputs are differentiable is nowhere listed: those of ``reference`` that require a gradient.
    """

    name: str
    family: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    summary: str
    samples: Callable[..., Iterator[Sample]]
    bad_inputs: Callable[[], Iterator[BadInput]]
    bench_cases: tuple[BenchCase, ...]
    saved_bytes: Callable[[Sample], int]
    gpu_cases: tuple[BenchCase, ...] = ()
    working_activations: tuple[int, int] = (1, 1)
    gpu_working_activations: tuple[int, int] | None = None
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    otherwise: tuple[str, ...] = ()
    yardsticks: dict[str, Callable[..., Any]] = field(default_factory=dict)
    kept_by_autocast: tuple[str, ...] = ()
    tiles_span_images: tuple[str, ...] = ()
    schema: str = ""
    differentiable: bool = True
    wide: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", self.schema or self.name)
        if unknown := set(self.otherwise) - set(self.peers):
            raise ValueError(f"{self.name}: otherwise names {', '.join(sorted(unknown))}, which must be among the peers")

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of what a call on tensors of this dtype, or under autocast to it, returns."""
        return torch.float32 if self.wide and dtype is not torch.float64 else dtype

    def cases(self, device: str | torch.device) -> tuple[BenchCase, ...]:
        """The shapes worth timing on a device."""
        return self.gpu_cases or self.bench_cases if torch.device(device).type == "cuda" else self.bench_cases


@functools.cache
def all_specs() -> dict[str, OpSpec]:
    """Every op's spec by name."""
    from vitkernels.ops.batch_norm import spec as batch_norm
    from vitkernels.ops.cascaded_group import spec as cascaded_group
    from vitkernels.ops.dense import spec as dense
    from vitkernels.ops.head_mixing import spec as head_mixing
    from vitkernels.ops.matching import spec as matching
    from vitkernels.ops.memory import spec as memory
    from vitkernels.ops.packed import spec as packed
    from vitkernels.ops.patch import spec as patch
    from vitkernels.ops.separable import spec as separable
    from vitkernels.ops.tokens import spec as tokens

    families = (separable, cascaded_group, packed, tokens, head_mixing, dense, patch, memory, matching, batch_norm)
    return {spec.name: spec for family in families for spec in family.SPECS}


def get(name: str) -> OpSpec:
    """The spec of one op.

    Raises:
        ValueError: no such op; the message lists near matches.
    """
    specs = all_specs()
    if name not in specs:
        import difflib

        near = difflib.get_close_matches(name, specs, n=3, cutoff=0.3) or sorted(specs)
        raise ValueError(f"no op named {name!r}; did you mean {', '.join(near)}?")
    return specs[name]
