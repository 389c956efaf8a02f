"""Where it has been shown that a GPU kernel is right and not slower than eager.

A GPU kernel becomes ``auto``'s choice only on a proved architecture, and there only for what was measured: in a dtype, in the forward without
gradients or in forward and backward together. A kernel may win the one and lose the other. Proof is one of two things: a run whose results are
committed (:data:`COMMITTED`, filled from ``benchmarks/results/``), or a stamp that ``vitkernels verify`` wrote on this very machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitkernels import builder
from vitkernels._version import __version__

if TYPE_CHECKING:
    from vitkernels.registry import OpSpec

FORWARD, TRAINING = "forward", "forward+backward"
Measured = tuple[str, str]
"""A dtype's name and what was timed in it, :data:`FORWARD` or :data:`TRAINING`."""


@dataclass(frozen=True)
class Committed:
    """What committed results show: right in every case of the op's ``gpu_cases``, and in none slower than what would run otherwise.

    Attributes:
        results: the CSV of ``vitkernels bench``; its report says what could stand here.
        passes: by dtype, what was timed.
    """

    results: str
    passes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def holds(self, dtype: str, mode: str) -> bool:
        """Whether it shows this."""
        return mode in self.passes.get(dtype, ())


_H200 = "benchmarks/results/h200/third/bench.csv"
_BOTH = (FORWARD, TRAINING)
# By op, backend and architecture.
COMMITTED: dict[tuple[str, str, str], Committed] = {
    ("cascaded_group_attention", "triton", "sm_90"): Committed(_H200, {"bfloat16": _BOTH, "float16": _BOTH, "float32": (TRAINING,)}),
    ("cascaded_group_attention", "cuda", "sm_90"): Committed(_H200, {"bfloat16": _BOTH, "float16": _BOTH, "float32": _BOTH}),
    ("re_attention", "cuda", "sm_90"): Committed(_H200, {"bfloat16": (FORWARD,), "float16": (FORWARD,)}),
}


def shown(rows: Iterable[Mapping[str, Any]], specs: Mapping[str, OpSpec]) -> dict[tuple[str, str], list[Measured]]:
    """What the rows of ``vitkernels bench`` on a GPU show, by op and backend: in each such dtype and mode all of the op's cases have a row, which
    those that were wrong have not, and in none of them was eager, or a peer that would run ``otherwise``, faster in the median.

    Args:
        rows: with the columns of :class:`vitkernels.bench.Row`.
        specs: of the ops, by name.
    """
    # (op, dtype, mode) -> case -> contender -> milliseconds. A kernel is named by its backend, whether ``auto`` took it or it was asked for.
    times: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["device"] == "cuda":
            ours = row["backend"] in ("triton", "cuda") and row["variant"] in ("vitkernels", f"vitkernels [{row['backend']}]")
            case = times.setdefault((row["op"], row["dtype"], row["mode"]), {}).setdefault(row["case"], {})
            case[row["backend"] if ours else row["variant"]] = row["p50_ms"]
    found: dict[tuple[str, str], list[Measured]] = {}
    for (op, dtype, mode), by_case in times.items():
        spec = specs[op]
        for backend in ("triton", "cuda"):
            here = [by_case.get(case.name, {}) for case in spec.cases("cuda")]
            measured = all({backend, "eager"} <= case.keys() for case in here)  # a peer may not take a case
            if measured and all(case[backend] <= case.get(other, math.inf) for case in here for other in ("eager", *spec.otherwise)):
                found.setdefault((op, backend), []).append((dtype, mode))
    return found


def architecture(device: torch.device) -> str:
    """``sm_90`` and the like; on ROCm the gfx name (which torch for CUDA has, too: there it is the GPU's product name)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@functools.cache
def kernel_fingerprint() -> str:
    """A hash of the GPU kernels' sources, Triton (with what its kernels share) and CUDA C++: a changed kernel invalidates its stamp."""
    digest = hashlib.sha256()
    for path in [*sorted((Path(__file__).parent / "ops").rglob("*triton.py")), *builder.cuda_inputs()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def stamp_key(device: torch.device) -> dict[str, str]:
    """What a stamp is valid for: this device, these kernels, this torch and triton."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    return {
        "device": torch.cuda.get_device_name(device),
        "architecture": architecture(device),
        "vitkernels": __version__,
        "kernels": kernel_fingerprint(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def stamp_path() -> Path:
    """The file with this user's stamps."""
    return builder.cache_dir() / "verified.json"


def read_stamps() -> list[dict[str, Any]]:
    """All stamps of this user; an unreadable file counts as none."""
    try:
        stamps = json.loads(stamp_path().read_text())
    except (OSError, ValueError):
        return []
    return stamps if isinstance(stamps, list) else []


def write_stamp(op: str, backend: str, device: torch.device, measured: Sequence[Measured]) -> None:
    """Record what ``verify`` proved of ``op`` on ``backend`` here, replacing an older stamp for the same op, backend and device."""
    key = stamp_key(device)
    stamps = [s for s in read_stamps() if (s.get("op"), s.get("backend"), s.get("device")) != (op, backend, key["device"])]
    stamps.append({"op": op, "backend": backend, **key, "measured": [list(one) for one in measured]})
    path = stamp_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(stamps, indent=1))
    partial.replace(path)
    _proved.cache_clear()


@functools.cache
def _proved(op: str, backend: str, index: int, dtype: str, mode: str) -> bool:
    device = torch.device("cuda", index)
    committed = COMMITTED.get((op, backend, architecture(device)))
    if committed is not None and committed.holds(dtype, mode):
        return True
    wanted = {"op": op, "backend": backend, **stamp_key(device)}
    return any(wanted.items() <= stamp.items() and [dtype, mode] in stamp.get("measured", ()) for stamp in read_stamps())


def proved(op: str, backend: str, device: torch.device, dtype: torch.dtype, training: bool) -> bool:
    """True if ``op`` on ``backend`` is proved for this GPU, by committed results or by the user's own ``vitkernels verify``.

    Args:
        op: by name.
        backend: ``triton`` or ``cuda``.
        device: the GPU.
        dtype: of the call.
        training: whether a backward may follow: what is proved of the forward alone does not hold there, nor the other way round.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _proved(op, backend, index, str(dtype).removeprefix("torch."), TRAINING if training else FORWARD)
