"""Every Triton kernel compiled ahead of time for real GPUs, on a machine that has none, and what the binaries need.

``python -m vitkernels.aot`` prints the table. The launches come from the launch code itself, run on meta tensors with the start of each kernel
recorded in place of executed: what is compiled is what a GPU would run, specialisation of arguments included. A kernel fits a target when its shared
memory is within the target's limit and no register is spilled; both are read from the compiled binary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitkernels.ops import _triton as shared
from vitkernels.ops.cascaded_group import triton as cascaded_group
from vitkernels.ops.dense import triton as dense
from vitkernels.ops.head_mixing import triton as head_mixing
from vitkernels.ops.head_mixing.op import NORMS as HEAD_MIXING_NORMS
from vitkernels.ops.matching import triton as matching
from vitkernels.ops.memory import triton as memory
from vitkernels.ops.packed import layout as packed_layout
from vitkernels.ops.packed import triton as packed
from vitkernels.ops.packed.op import NORMS
from vitkernels.ops.separable import triton as separable

# Target -> what Triton calls it, and the shared memory (LDS) of one program in bytes.
TARGETS: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
DIMS = (64, 128, 192, 256, 384, 512)


class Stage(NamedTuple):
    """What attention sees of one stage of an EfficientViT (arXiv 2305.07027, table 2): ``channels`` per head, a depthwise kernel per head."""

    name: str
    channels: int
    window: int
    kernels: tuple[int, ...]


STAGES = (
    Stage("m0 stage 1", 16, 7, (5, 5, 5, 5)),
    Stage("m0 stage 2", 32, 7, (5, 5, 5, 5)),
    Stage("m0 stage 3", 48, 4, (5, 5, 5, 5)),
    Stage("m4 stage 1", 32, 7, (7, 5, 3, 3)),
    Stage("m4 stage 2", 64, 7, (7, 5, 3, 3)),
    Stage("m4 stage 3", 96, 4, (7, 5, 3, 3)),
    Stage("m5 stage 1", 64, 7, (7, 5, 3)),
    Stage("m5 stage 2", 96, 7, (7, 5, 3)),
    Stage("m5 stage 3", 96, 4, (7, 5, 3, 3)),
    Stage("14 x 14 window", 64, 14, (7, 5, 3, 3)),
)
HEAD_DIMS = (32, 64, 128)
# What makes varlen_attention's kernels differ: nothing; NaViT's norm; a layer norm with all else at once.
PACKED_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"norm": "l2", "gaps": True},
    "all": {"norm": "layer", "gaps": True, "bias": True, "dropout": True, "key_heads": 4},
}
# attention's kernels are those of varlen_attention, but for a bias that differs from image to image.
ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "bias of images": {"bias": True}}
MEMORY_DIMS = (*HEAD_DIMS, 256)
# What makes memory_attention's kernels differ: one memory for all queries; that of several tasks, with own keys; and dropout.
MEMORY_OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "tasks": {"tasks": 70},
    "few tasks": {"tasks": 5},
    "tasks dropout": {"tasks": 70, "dropout": True},
}
MATCHING_CLASSES = (2, 92, 365)
MATCHING_OPTIONS: dict[str, dict[str, Any]] = {"softmax": {}, "focal": {"focal": True}, "focal, gamma 1.5": {"focal": True, "gamma": 1.5}}
RE_ATTENTION_DIMS = (32, 33, 64)
# What makes re_attention's kernels differ: the norm, and dropout, without which a batch norm in training takes other sums.
RE_ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {"norm": "layer"},
    "layer dropout": {"norm": "layer", "dropout": True},
    "batch": {"norm": "batch"},
    "batch live": {"norm": "batch", "live": True},
    "batch live dropout": {"norm": "batch", "live": True, "dropout": True},
}
DTYPES = (torch.bfloat16, torch.float32)
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as the launch code starts it: types and specialisation of its arguments, compile-time constants and compiler options."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @staticmethod
    def of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
        """Specialise as Triton's launcher does: None and 1 are constants, multiples of 16 are known to be such."""
        names = list(inspect.signature(kernel.fn).parameters)
        values = dict(zip(names, args, strict=False)) | {name: options[name] for name in options if name in names}
        compiler_options = tuple((name, value) for name, value in options.items() if name not in names)
        signature, constants, aligned = [], [], []
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            if isinstance(value, torch.Tensor):
                signature.append((name, _POINTERS[value.dtype]))
                if value.storage_offset() * value.element_size() % 16 == 0:
                    aligned.append(index)
            elif parameter.is_constexpr or value is None or (value == 1 and isinstance(value, int) and not parameter.do_not_specialize):
                signature.append((name, "constexpr"))
                constants.append((name, value))
            elif isinstance(value, float):
                signature.append((name, "fp32"))
            else:
                signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned.append(index)
        return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), compiler_options)


@dataclass(frozen=True)
class Budget:
    """What one kernel compiled for one target needs: bytes of shared memory and its limit, registers a thread, bytes a thread spills to memory."""

    kernel: str
    case: str
    target: str
    shared: int
    shared_limit: int
    registers: int
    spills: int

    @property
    def fits(self) -> bool:
        """Whether the kernel can run there, and without spilling."""
        return self.shared <= self.shared_limit and self.spills == 0


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block every kernel start is recorded in the list, in place of executed."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        launches.append(Launch.of(kernel, args, options))

    original, shared.launch = shared.launch, record
    try:
        yield launches
    finally:
        shared.launch = original


@contextlib.contextmanager
def _platform_of(target: str) -> Iterator[None]:
    """Within the block the launch code sees the torch that a target has, ROCm's or CUDA's: tiles differ."""
    original, torch.version.hip = torch.version.hip, "ahead of time" if target.startswith("gfx") else None
    try:
        yield
    finally:
        torch.version.hip = original


def separable_launches(
    dim: int, dtype: torch.dtype, *, batch: int = 16, unfolded: bool = False, channels_last: bool = False, dropout: bool = False
) -> list[Launch]:
    """The distinct launches of forward and backward of both separable ops at one width.

    Args:
        dim: channels.
        dtype: of all tensors.
        batch: images; a small batch has smaller tiles.
        unfolded: [B, d, P, N] in place of a map with patches of 2 x 2.
        channels_last: the map's memory format.
        dropout: with dropout's multipliers of the scores.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    height, width = (4, 256) if unfolded else (32, 32)
    patch = (4, 1) if unfolded else (2, 2)
    x = empty(batch, dim, height, width)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    scale = empty(batch, height, width, dtype=torch.float32) if dropout else None
    weights = empty(1 + 2 * dim, dim), empty(1 + 2 * dim), empty(dim, dim), empty(dim)
    q, k, v = empty(batch, 1 + 2 * dim, 4, 256).split([1, dim, dim], dim=1)
    with recorded() as found:
        y, logits, stats, pooled = separable.separable_self_attention(x, *weights, scale, *patch)
        separable.separable_self_attention_backward(y, x, *weights[:3], scale, logits, stats, pooled, *patch, True, True, True)
        out, scores, context = separable.separable_attention(q, k, v)
        separable.separable_attention_backward(out, k, v, scores, context, True, True, True)
    return list(dict.fromkeys(found))


def cascaded_group_launches(stage: Stage, dtype: torch.dtype, *, batch: int = 16, channels_last: bool = False, bias: bool = True) -> list[Launch]:
    """The distinct launches of forward and backward of cascaded group attention at one stage, on a map of 2 x 2 windows.

    Args:
        stage: shape of the attention.
        dtype: of all tensors.
        batch: images.
        channels_last: the map's memory format.
        bias: with all biases, as in an EfficientViT whose BatchNorms are folded.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, key_dim, size = len(stage.kernels), 16, 2 * stage.window
    channels = heads * stage.channels
    x = empty(batch, channels, size, size)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    qkv_weight = empty(heads, 2 * key_dim + stage.channels, stage.channels)
    qkv_bias, dw_bias, proj_bias = (empty(*shape) if bias else None for shape in (qkv_weight.shape[:2], (heads, key_dim), (channels,)))
    dw_weight = empty(sum(key_dim * k * k for k in stage.kernels))
    weights = qkv_weight, qkv_bias, dw_weight, dw_bias, empty(heads, stage.window**2), empty(channels, channels)
    options = list(stage.kernels), key_dim, key_dim**-0.5, stage.window
    with recorded() as found:
        y = cascaded_group.cascaded_group_attention(x, *weights, proj_bias, *options)
        cascaded_group.cascaded_group_attention_backward(y, x, *weights, *options, True, True)
    return list(dict.fromkeys(found))


def packed_launches(
    dim: int,
    dtype: torch.dtype,
    *,
    tokens: int = 16384,
    heads: int = 8,
    key_heads: int = 8,
    norm: str | None = None,
    gaps: bool = False,
    bias: bool = False,
    dropout: bool = False,
) -> list[Launch]:
    """The distinct launches of forward and backward of varlen_attention at one head dim, on slices of one projection.

    Args:
        dim: of the heads.
        dtype: of q, k and v.
        tokens: of all sequences; few have smaller tiles.
        heads: of q.
        key_heads: of k and v.
        norm: ``qk_norm``, with all the weights it has.
        gaps: with ``seqused_k``.
        bias: with one that is trained.
        dropout: with dropout.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = empty(tokens, heads + 2 * key_heads, dim, dtype=dtype).split([heads, key_heads, key_heads], dim=1)
    sequences, longest = 128, 256
    cu_seqlens = empty(sequences + 1, dtype=torch.int32)
    used = empty(sequences, dtype=torch.int32) if gaps else None
    work = empty(4 * tokens + 2 * shared.cdiv(tokens, packed_layout.TILE), dtype=torch.int32)
    table = empty(heads, longest, longest) if bias else None
    present = {None: (), "l2": (0, 2), "rms": (0, 2), "layer": (0, 1, 2, 3)}[norm]
    weights = [empty((heads, heads, key_heads, key_heads)[i], dim) if i in present else None for i in range(4)]
    options = NORMS[norm], 1e-6, dim**-0.5, 0.1 if dropout else 0.0, empty(dtype=torch.int64) if dropout else None
    inputs: list[Any] = [cu_seqlens, cu_seqlens, used, work, table, *weights, *options]
    needed: list[Any] = [True, True, True, bias, norm is not None]
    with recorded() as found:
        out, lse = packed.varlen_attention(q, k, v, *inputs)
        packed.varlen_attention_backward(*[out, lse, q, k, v, out, lse, *inputs, *needed])
    return list(dict.fromkeys(found))


def attention_launches(dim: int, dtype: torch.dtype, *, batch: int = 8, heads: int = 12, tokens: int = 577, bias: bool = False) -> list[Launch]:
    """The distinct launches of forward and backward of attention at one head dim, on slices of one projection.

    Args:
        dim: of the heads.
        dtype: of q, k and v.
        batch: images.
        heads: of all.
        tokens: of an image.
        bias: with one of every image and head that is trained.
    """
    q, k, v = torch.empty(batch, tokens, 3, heads, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    table = torch.empty(batch, heads, tokens, tokens, device="meta") if bias else None
    inputs: list[Any] = [table, None, None, None, dim**-0.5, 0.0, None]
    with recorded() as found:
        out, lse = dense.attention(*[q, k, v, *inputs])
        dense.attention_backward(*[out, lse, q, k, v, out, lse, *inputs, True, True, True, bias, False, False])
    return list(dict.fromkeys(found))


def memory_launches(
    dim: int, dtype: torch.dtype, *, batch: int = 64, heads: int = 6, tokens: int = 197, tasks: int | None = None, dropout: bool = False
) -> list[Launch]:
    """The distinct launches of forward and backward of memory_attention at one head dim.

    Args:
        dim: of the heads.
        dtype: of all tensors.
        batch: images.
        heads: of all.
        tokens: of an image.
        tasks: as many queries, each with a memory of ten and a key of its own; None: the tokens are the queries, and ten the memory.
        dropout: with dropout.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = empty(batch, heads, tasks or tokens, dim)
    k = v = empty(batch, heads, tokens, dim)
    memory_k = memory_v = empty(10 * (tasks or 1), heads, dim)
    tensors: list[Any] = [q, k, v, memory_k, memory_v, *((None, None) if tasks is None else (q, q))]
    options: list[Any] = [[10] * (tasks or 0), dim**-0.5, 0.1 if dropout else 0.0, empty(dtype=torch.int64) if dropout else None]
    with recorded() as found:
        out, lse = memory.memory_attention(*tensors, *options)
        memory.memory_attention_backward(*[out, lse, *tensors, lse, *options, *[True] * 7])
    return list(dict.fromkeys(found))


def re_attention_launches(
    dim: int, dtype: torch.dtype, *, heads: int = 12, tokens: int = 577, norm: str | None = None, live: bool = False, dropout: bool = False
) -> list[Launch]:
    """The distinct launches of forward and backward of re_attention at one head dim, on slices of one projection.

    Args:
        dim: of the heads.
        dtype: of q, k and v.
        heads: of the maps.
        tokens: of a sample.
        norm: of the mixed maps, with all the weights it has.
        live: with the batch's statistics.
        dropout: with dropout.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = empty(8, tokens, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    affine = (None, None) if norm is None else (empty(heads), empty(heads))
    given = (empty(heads), empty(heads)) if norm == "batch" and not live else (None, None)
    options = live, 1e-5, dim**-0.5, 0.1 if dropout else 0.0, empty(dtype=torch.int64) if dropout else None
    small: list[Any] = [empty(heads, heads), empty(heads), HEAD_MIXING_NORMS[norm], *affine]
    with recorded() as found:
        out, lse, mean, var = head_mixing.re_attention(*[q, k, v, *small, *given, *options])
        head_mixing.re_attention_backward(*[out, q, k, v, lse, *small, *((mean, var) if live else given), *options, True, True, True])
    return list(dict.fromkeys(found))


def matching_launches(classes: int, dtype: torch.dtype, *, focal: bool = False, gamma: float = 2.0) -> list[Launch]:
    """The launches of the matching cost, and of forward and backward of the set loss, of six layers.

    Args:
        classes: of the logits.
        dtype: of logits and boxes.
        focal: of the class cost and loss.
        gamma: theirs.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, boxes = empty(6, 16, 300, classes), empty(6, 16, 300, 4)
    targets = empty(320, dtype=torch.int64), empty(320, 4, dtype=torch.float32)
    inputs: list[Any] = [logits, boxes, *targets, empty(6, 16, 300, dtype=torch.int64), empty(dtype=torch.float32)]
    with recorded() as found:
        matching.pairwise_box_cost(logits, boxes, *targets, empty(17, dtype=torch.int32), [1.0, 5.0, 2.0], focal, 0.25, gamma)
        losses, divisors = matching.detection_set_loss(*[*inputs, 0.1, focal, 0.25, gamma])
        matching.detection_set_loss_backward(*[losses, *inputs, divisors, 0.1, focal, 0.25, gamma])
    return list(dict.fromkeys(found))


def compile_for(launch: Launch, target: str) -> Any:
    """Compile one launch for one of :data:`TARGETS`; no GPU needed."""
    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    return triton.compile(source, target=TARGETS[target][0], options=dict(launch.options))


def budget(launch: Launch, target: str, case: str) -> Budget:
    """Compile one launch for one target and read what the binary needs."""
    compiled = compile_for(launch, target)
    registers, spills = _amd_resources(compiled.asm["amdgcn"]) if target.startswith("gfx") else _cuda_resources(compiled.asm["cubin"])
    return Budget(launch.name, case, target, compiled.metadata.shared, TARGETS[target][1], registers, spills)


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory) by Triton's own cuobjdump. A Triton kernel has no stack but for what it spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers a thread, bytes of scratch memory a thread) from the metadata at the end of the assembly.

    Scalar registers that do not fit go to lanes of vector registers: no memory, no scratch.
    """
    numbers = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)}
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"]


def budgets(
    launches: Callable[[], Iterable[Launch]], case: str, targets: Iterable[str] = tuple(TARGETS), progress: Callable[[Budget], None] = lambda _: None
) -> list[Budget]:
    """What every kernel that ``launches()`` starts needs on every target."""
    table = []
    for target in targets:
        with _platform_of(target):
            found = launches()
        for launch in found:
            table.append(budget(launch, target, case))
            progress(table[-1])
    return table


def all_budgets(progress: Callable[[Budget], None] = lambda _: None) -> list[Budget]:
    """What every kernel needs on every target, at every width and stage, in every dtype."""
    table = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for dim in DIMS:
            table += budgets(functools.partial(separable_launches, dim, dtype), f"d{dim} {name}", progress=progress)
        for stage in STAGES:
            table += budgets(functools.partial(cascaded_group_launches, stage, dtype), f"{stage.name} {name}", progress=progress)
    for dtype in (*DTYPES, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim, (case, options) in itertools.product(HEAD_DIMS, PACKED_OPTIONS.items()):
            table += budgets(functools.partial(packed_launches, dim, dtype, **options), f"head {dim} {case} {name}", progress=progress)
        for dim, (case, options) in itertools.product(HEAD_DIMS, ATTENTION_OPTIONS.items()):
            table += budgets(functools.partial(attention_launches, dim, dtype, **options), f"attention {dim} {case} {name}", progress=progress)
        for dim, (case, options) in itertools.product(MEMORY_DIMS, MEMORY_OPTIONS.items()):
            table += budgets(functools.partial(memory_launches, dim, dtype, **options), f"memory {dim} {case} {name}", progress=progress)
        for dim, (case, options) in itertools.product(RE_ATTENTION_DIMS, RE_ATTENTION_OPTIONS.items()):
            table += budgets(functools.partial(re_attention_launches, dim, dtype, **options), f"12 heads {dim} {case} {name}", progress=progress)
        for classes, (case, options) in itertools.product(MATCHING_CLASSES, MATCHING_OPTIONS.items()):
            table += budgets(functools.partial(matching_launches, classes, dtype, **options), f"{classes} classes {case} {name}", progress=progress)
    return table


def main() -> int:
    """Print the table of all budgets; 1 if one of them does not fit."""
    from rich.console import Console
    from rich.table import Table

    if triton.knobs.runtime.interpret:
        print("Kernels cannot be compiled under TRITON_INTERPRET=1; unset it.", file=sys.stderr)
        return 1
    console = Console()
    with console.status("compiling") as status:
        table = all_budgets(lambda b: status.update(f"{b.target} {b.case} {b.kernel}"))
    shown = Table("kernel", "case", "target", "shared bytes", "limit", "registers", "spills", "fits")
    for b in table:
        shown.add_row(b.kernel, b.case, b.target, str(b.shared), str(b.shared_limit), str(b.registers), str(b.spills), "yes" if b.fits else "[red]no")
    console.print(shown)
    return 0 if all(b.fits for b in table) else 1


if __name__ == "__main__":
    sys.exit(main())
