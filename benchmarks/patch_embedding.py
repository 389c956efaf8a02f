"""Patch embeddings: the op against the convolution it stands for, in either memory format, and against ``unfold`` and ``linear`` written by hand.

``python benchmarks/patch_embedding.py --out benchmarks/results/patch_embedding`` writes ``patch_embedding.csv`` and ``patch_embedding.md``. A row
exists only if the op's result passed the accuracy rule against float64 in that run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vitkernels import accuracy, backends, report, timing
from vitkernels.ops.bottleneck.reference import Affine
from vitkernels.ops.patch_embedding import op
from vitkernels.ops.patch_embedding.reference import patch_embedding

# channels, out channels, patch, side, batch: the last four have short rows, for which `accelerate` does not take it.
CASES = (
    (3, 192, 16, 224, 1),
    (3, 384, 16, 224, 1),
    (3, 384, 16, 224, 16),
    (3, 768, 16, 224, 1),
    (3, 768, 16, 384, 1),
    (3, 1024, 14, 224, 1),
    (3, 768, 32, 224, 1),
    (3, 768, 32, 224, 16),
    (3, 384, 8, 224, 1),
    (1, 64, 7, 28, 8),
    (3, 96, 4, 224, 1),
    (3, 96, 4, 224, 16),
    (96, 192, 2, 56, 1),
    (1, 64, 4, 28, 1),
)
CONVOLUTION, LAST, BY_HAND, OURS = "Conv2d", "Conv2d, channels_last", "unfold, linear", "vitkernels"
CONTENDERS = (CONVOLUTION, LAST, BY_HAND, OURS)
SHAPE = ("channels", "out", "patch", "side", "batch")
COLUMNS = (*SHAPE, "dtype", *(f"{name} ms" for name in CONTENDERS), "best other", "times as fast p20", "p50", "p80", "rounds", "weak")


def compare(case: tuple[int, ...], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row."""
    channels, out, patch, side, batch = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, bias = draw(batch, channels, side, side).to(dtype), draw(out).to(dtype)
    weight = (draw(out, channels, patch, patch) / (channels * patch**2) ** 0.5).to(dtype)
    last, last_weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    matrix = Affine(weight.flatten(1), bias)
    packed = op.pack(Affine(*(t.float() for t in matrix)), (patch, patch), activations=dtype)
    calls = {
        CONVOLUTION: lambda: F.conv2d(x, weight, bias, patch),
        LAST: lambda: F.conv2d(last, last_weight, bias, patch),
        BY_HAND: lambda: patch_embedding(x, matrix, (patch, patch)),
        OURS: lambda: op.run(x, packed),
    }
    exact = F.conv2d(x.double(), weight.double(), bias.double(), patch)
    found = accuracy.compare_tensors("patches", calls[OURS](), calls[CONVOLUTION](), exact)
    if not found.holds:
        raise SystemExit(f"{case}, {dtype}: breaks the accuracy rule, nothing is measured: {found}")
    measured = timing.interleave(calls, rounds=rounds)
    times = {name: measured[name].quantiles.p50 * 1e3 for name in CONTENDERS}
    best = min((name for name in CONTENDERS if name != OURS), key=lambda name: times[name])
    faster = measured.speedup(OURS, over=best)
    values = (*case, str(dtype).removeprefix("torch."), *times.values(), best, faster.p20, faster.p50, faster.p80, measured.kept, measured.weak)
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="default: both")
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    torch.set_num_threads(options.threads)
    if (reason := backends.why_not(op.NAME, "native", torch.device("cpu"), torch.float32)) is not None:
        raise SystemExit(reason)
    rows = []
    with torch.inference_mode():
        for dtype in options.dtype or ("float32", "bfloat16"):
            for case in CASES:
                rows.append(compare(case, getattr(torch, dtype), options.rounds))
                print(", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in rows[-1].items()))
    if folder:
        title = "Patch embeddings; how many times as fast as the best of the others the op is"
        report.write_results(folder, "patch_embedding", title, rows, COLUMNS)


if __name__ == "__main__":
    main()
