"""The benchmark behind ``vitkernels bench``: every op of the registry against eager, ``torch.compile``, its peers and the machine's roofs.

All contenders and both roofs (matrix multiplication and copy) run interleaved in the same rounds, see :mod:`vitkernels.timing`; every ratio and every
fraction of a roof is taken inside a round. A contender gets a row only if its output, and with ``backward`` every gradient, passed
:mod:`vitkernels.accuracy`'s rule in this very run; otherwise it gets a :class:`Refused` with the reason.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitkernels import accuracy, backends, proof, timing
from vitkernels.registry import BenchCase, OpSpec, Sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = "vitkernels"
EAGER = "eager"
COMPILED = "torch.compile"
GRAPH = ", CUDA graph"
_GEMM, _GEMM32, _COPY = "roof: gemm", "roof: gemm float32", "roof: copy"


@dataclass(frozen=True)
class Row:
    """One contender on one case.

    Attributes:
        op, case, dtype, device, mode: what was run; ``mode`` is ``forward`` or ``forward+backward``.
        variant: the contender; ``vitkernels`` is what a user gets, ``vitkernels [x]`` the named backend; on a GPU the forward also as a CUDA graph.
        backend: the vitkernels backend that ran, empty for the others.
        p20_ms, p50_ms, p80_ms: time of one call over the rounds.
        speedup_p20, speedup_p50, speedup_p80: eager's time by this one's, inside a round.
        ours_speedup: how many times faster ``vitkernels`` is than this contender; empty where it was refused.
        gflops: the algorithm's arithmetic by the time; forward+backward counts three times the forward.
        gemm_fraction: the same by that of a square ``torch.mm`` in the same dtype in the same rounds.
        gemm32_fraction: the same by that of a float32 ``torch.mm``.
        copy_fraction: the least traffic of a forward by the time, against a plain copy of as many bytes in the same rounds.
        error, eager_error: largest error against float64 by the largest value, of this contender and of eager, for ``error_tensor``: the output or
            the gradient that comes nearest to breaking the rule. Empty for a yardstick, which computes something else.
        rounds_kept, rounds_discarded, weak: see :class:`vitkernels.timing.Measurement`.
    """

    op: str
    case: str
    dtype: str
    device: str
    mode: str
    variant: str
    backend: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    speedup_p20: float
    speedup_p50: float
    speedup_p80: float
    ours_speedup: float | None
    gflops: float
    gemm_fraction: float
    gemm32_fraction: float
    copy_fraction: float | None
    error_tensor: str
    error: float | None
    eager_error: float | None
    rounds_kept: int
    rounds_discarded: int
    weak: bool


COLUMNS = tuple(f.name for f in fields(Row))


@dataclass(frozen=True)
class Refused:
    """A contender without a row, and why. ``wrong`` means that it ran and broke the accuracy rule."""

    op: str
    case: str
    dtype: str
    mode: str
    variant: str
    reason: str
    wrong: bool


@dataclass(frozen=True)
class _Contender:
    name: str
    function: Callable[..., Any]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    backend: str = ""
    yardstick: bool = False


def runnable_backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernel backends that can run ``op`` here at full speed: Triton's interpreter is for tests and does not count."""
    names = [name for name in backends.BACKENDS if name != "reference" and backends.why_not(op, name, device, dtype) is None]
    return [name for name in names if not (name == "triton" and backends.interpreting())]


def _contenders(spec: OpSpec, tensor: Tensor, compiled: bool, backward: bool) -> list[_Contender]:
    with backends.backend("auto"), torch.set_grad_enabled(backward):
        chosen = backends.select(spec.name, tensor)
    ours = [_Contender(OURS, spec.function, partial(backends.backend, "auto"), chosen)]
    for name in runnable_backends(spec.name, tensor.device, tensor.dtype):
        if name != chosen:
            ours.append(_Contender(f"{OURS} [{name}]", spec.function, partial(backends.backend, name), name))
    others = [_Contender(EAGER, spec.reference)]
    if compiled:
        torch.compiler.reset()
        others.append(_Contender(COMPILED, torch.compile(spec.reference, dynamic=False)))
    others += [_Contender(name, function) for name, function in spec.peers.items()]
    return [*ours, *others, *(_Contender(name, function, yardstick=True) for name, function in spec.yardsticks.items())]


def _roofs(case: BenchCase, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, timing.Call], int]:
    """The machine's own limits as calls, and the side of the matrices: 768 fills a desktop CPU's cores, a GPU takes more."""
    side = 768 if device.type == "cpu" else 4096

    def gemm(of: torch.dtype) -> timing.Call:
        a, b = (torch.randn(side, side, device=device).to(of) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    source = torch.ones(max(1, case.elements_moved // 2), dtype=dtype, device=device)
    target = torch.ones_like(source)
    return {_GEMM: gemm(dtype), _GEMM32: gemm(torch.float32), _COPY: lambda: target.copy_(source)}, side


def _twin(sample: Sample) -> Sample:
    """The same call in memory of its own: views of one storage are views of one again."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        view = tensor.new_empty(0).set_(storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())
        return view.requires_grad_(tensor.requires_grad)

    return sample.mapped(copy)


def cold_samples(case: BenchCase, dtype: torch.dtype, device: torch.device) -> list[Sample]:
    """As many copies of the case's call as make it miss the GPU's cache, see :func:`vitkernels.timing.cold_copies`. They are drawn once: on the CPU,
    a hundred million numbers take seconds.
    """
    first = case.make(dtype, str(device))
    return [first, *(_twin(first) for _ in range(timing.cold_copies(case.elements_moved * dtype.itemsize, device) - 1))]


def step(
    function: Callable[..., Any], samples: Sequence[Sample], grad_outputs: Sequence[Tensor] | None, *, allow_unused: bool = False
) -> timing.Call:
    """One step as a callable: the forward, or the forward and the gradient of every input; ``allow_unused``: of every one it uses."""
    if grad_outputs is None:
        return timing.rotating(lambda sample: function(*sample.args, **sample.kwargs), [(sample,) for sample in samples])

    def run(sample: Sample, wanted: list[Tensor]) -> Any:
        return accuracy.gradients(function(*sample.args, **sample.kwargs), wanted, grad_outputs, allow_unused=allow_unused)

    return timing.rotating(run, [(sample, accuracy.leaves(sample)) for sample in samples])


def captured(call: timing.Call) -> tuple[timing.Call, Any]:
    """A forward as a CUDA graph, and what it leaves its result in: the time of a replay is the GPU's, whatever the host takes to start it.

    Raises:
        RuntimeError: the call waits for the GPU, which a graph cannot hold.
    """
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
    return graph.replay, result


def _captured(contender: _Contender, samples: Sequence[Sample]) -> timing.Call:
    """A contender's forwards as CUDA graphs, one a sample."""
    with contender.context():
        graphs = [captured(partial(contender.function, *sample.args, **sample.kwargs)) for sample in samples]
    return timing.rotating(lambda replay, _: replay(), graphs)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def bench_case(
    spec: OpSpec,
    case: BenchCase,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    backward: bool = False,
    compiled: bool = True,
    rounds: int = 20,
    budget: float = 60.0,
) -> tuple[list[Row], list[Refused]]:
    """Check every contender on one case, then time those that are right.

    Args:
        spec: the op.
        case: one of its bench cases.
        dtype: of every tensor.
        device: where.
        backward: time forward and backward together, and judge the gradients too.
        compiled: let ``torch.compile`` of the reference take part.
        rounds: undisturbed timing rounds wanted.
        budget: seconds after which timing stops, once three rounds are there.

    Raises:
        torch.OutOfMemoryError, RuntimeError: the reference itself cannot run the case here.
    """
    device = torch.device(device)
    mode = proof.TRAINING if backward else proof.FORWARD
    dtype_name = str(dtype).removeprefix("torch.")
    samples = cold_samples(case, dtype, device)
    if backward:
        samples = [accuracy.with_grad(sample) for sample in samples]
    judge = accuracy.Judge(spec.reference, samples[0], spec.function)

    refused: list[Refused] = []
    right: dict[str, tuple[_Contender, accuracy.Comparison | None]] = {}
    for contender in _contenders(spec, samples[0].tensors()[0], compiled, backward):
        if contender.yardstick:
            right[contender.name] = (contender, None)
            continue
        try:
            # In the grad mode of the timing below, so that torch.compile compiles once.
            with contender.context(), torch.set_grad_enabled(backward):
                verdict = accuracy.worst(judge(contender.function))
        except Exception as error:  # a compiler that is missing, a peer that does not take the dtype: the row says why, the run goes on
            refused.append(Refused(spec.name, case.name, dtype_name, mode, contender.name, first_line(error), wrong=False))
            continue
        if verdict.holds:
            right[contender.name] = (contender, verdict)
        else:
            reason = f"{verdict.name}: error {verdict.error:.2e} against float64, eager's is {verdict.eager_error:.2e}"
            refused.append(Refused(spec.name, case.name, dtype_name, mode, contender.name, reason, wrong=True))

    calls = {name: step(contender.function, samples, judge.grad_outputs, allow_unused=contender.yardstick) for name, (contender, _) in right.items()}
    if device.type == "cuda" and not backward:
        for contender, judged in list(right.values()):
            if contender.backend == "reference":
                continue  # eager, under another name
            graph = replace(contender, name=contender.name + GRAPH, context=contextlib.nullcontext)
            try:
                calls[graph.name] = _captured(contender, samples)
            except RuntimeError as error:
                refused.append(Refused(spec.name, case.name, dtype_name, mode, graph.name, first_line(error), wrong=False))
                continue
            right[graph.name] = graph, judged
    roofs, side = _roofs(case, dtype, device)
    with torch.set_grad_enabled(backward):
        measured = timing.interleave(
            calls | roofs, rounds=rounds, budget=budget, device=device, contexts={name: contender.context for name, (contender, _) in right.items()}
        )

    flops = case.flops * (3 if backward else 1)

    def row(name: str) -> Row:
        contender, verdict = right[name]
        speedup = measured.speedup(name, over=EAGER)
        p20, p50, p80 = measured[name].quantiles.scaled(1e3)
        return Row(
            op=spec.name,
            case=case.name,
            dtype=dtype_name,
            device=device.type,
            mode=mode,
            variant=name,
            backend=contender.backend,
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            speedup_p20=speedup.p20,
            speedup_p50=speedup.p50,
            speedup_p80=speedup.p80,
            ours_speedup=measured.speedup(OURS, over=name).p50 if OURS in measured else None,
            gflops=flops / p50 / 1e6,
            gemm_fraction=measured.speedup(name, over=_GEMM).p50 * flops / (2 * side**3),
            gemm32_fraction=measured.speedup(name, over=_GEMM32).p50 * flops / (2 * side**3),
            # A copy of n bytes is over when n have been read and n written; the roof copies half of what the op must move.
            copy_fraction=None if backward else measured.speedup(name, over=_COPY).p50,
            error_tensor=verdict.name if verdict else "",
            error=verdict.relative_error if verdict else None,
            eager_error=verdict.relative_eager_error if verdict else None,
            rounds_kept=measured.kept,
            rounds_discarded=measured.discarded,
            weak=measured.weak,
        )

    return [row(name) for name in right], refused


Step = tuple[OpSpec, BenchCase, torch.dtype, bool]
"""One call of :func:`bench_case`: (op, case, dtype, backward)."""


def plan(
    specs: Sequence[OpSpec],
    dtypes: Sequence[torch.dtype],
    backward: bool,
    case_filter: Sequence[str] = (),
    quick: bool = False,
    device: str | torch.device = "cpu",
) -> Iterator[Step]:
    """The calls to :func:`bench_case` of one run.

    Args:
        specs: the ops.
        dtypes: the dtypes, each on every case.
        backward: also forward+backward.
        case_filter: keep the cases whose name holds one of these; all if empty.
        quick: the first two cases of each op only.
        device: where; a GPU has cases of its own.
    """
    for spec in specs:
        cases = [c for c in spec.cases(device) if not case_filter or any(f.lower() in c.name.lower() for f in case_filter)]
        for dtype in dtypes:
            for with_backward in (False, True) if backward and spec.differentiable else (False,):
                for case in cases[:2] if quick else cases:
                    yield spec, case, dtype, with_backward


def in_turns(plan: Sequence[Step]) -> list[Step]:
    """The same calls with the ops taking turns: a run that is cut short has measured some of each."""
    by_op: dict[str, list[Step]] = {}
    for one in plan:
        by_op.setdefault(one[0].name, []).append(one)
    return [one for turn in itertools.zip_longest(*by_op.values()) for one in turn if one is not None]
