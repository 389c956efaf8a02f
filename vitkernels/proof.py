"""Where it has been shown that a GPU kernel is right and not slower than eager.

A GPU kernel becomes ``auto``'s choice only on a proved architecture. Proof is one of two things: a run whose results are committed
(:data:`COMMITTED`, filled from ``benchmarks/results/``), or a stamp that ``vitkernels verify`` wrote on this very machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from vitkernels import builder
from vitkernels._version import __version__

# (op, backend, architecture such as "sm_90") -> the committed results that show it: right in every case, and in none slower than eager.
COMMITTED: dict[tuple[str, str, str], str] = {
    ("cascaded_group_attention", "triton", "sm_90"): "benchmarks/results/h200/bench.csv",
}


def architecture(device: torch.device) -> str:
    """``sm_90`` and the like; on ROCm the gfx name."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"


@functools.cache
def kernel_fingerprint() -> str:
    """A hash of the GPU kernels' sources, Triton and CUDA C++: a changed kernel invalidates its stamp."""
    digest = hashlib.sha256()
    for path in [*sorted((Path(__file__).parent / "ops").rglob("triton.py")), *builder.cuda_inputs()]:
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


def write_stamp(op: str, backend: str, device: torch.device) -> None:
    """Record that ``verify`` proved ``op`` on ``backend`` here, replacing an older stamp for the same op, backend and device."""
    key = stamp_key(device)
    stamps = [s for s in read_stamps() if (s.get("op"), s.get("backend"), s.get("device")) != (op, backend, key["device"])]
    stamps.append({"op": op, "backend": backend, **key})
    path = stamp_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(stamps, indent=1))
    partial.replace(path)
    _proved.cache_clear()


@functools.cache
def _proved(op: str, backend: str, index: int) -> bool:
    device = torch.device("cuda", index)
    if (op, backend, architecture(device)) in COMMITTED:
        return True
    wanted = {"op": op, "backend": backend, **stamp_key(device)}
    return any(wanted.items() <= stamp.items() for stamp in read_stamps())


def proved(op: str, backend: str, device: torch.device) -> bool:
    """True if ``op`` on ``backend`` is proved for this GPU, by committed results or by the user's own ``vitkernels verify``."""
    return _proved(op, backend, device.index if device.index is not None else torch.cuda.current_device())
