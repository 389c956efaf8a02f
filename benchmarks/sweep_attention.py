"""``ops.attention`` against PyTorch's ``scaled_dot_product_attention`` on 44 shapes: where ``auto`` hands over, and that it is nowhere slower.

``python benchmarks/sweep_attention.py --out benchmarks/results/attention`` writes ``sweep.csv`` and ``sweep.md``: the forward, or with ``--backward``
that and the gradients of q, k and v, all contenders interleaved in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import vitkernels
from vitkernels import ops, report, timing

_HEADS = {16: 8, 32: 6, 64: 12, 128: 8}
# Tokens, and the batches with which they are timed.
_TOKENS = {16: (1, 64), 49: (1, 64), 64: (8,), 197: (1, 8), 257: (4,), 577: (1, 4), 1025: (1,)}
SHAPES = tuple((batch, tokens, heads, dim) for tokens, batches in _TOKENS.items() for batch in batches for dim, heads in _HEADS.items())
COLUMNS = ("batch", "tokens", "heads", "dim", "dtype", "mode", "chosen", "auto_ms", "native_ms", "sdpa_ms", "auto_p20", "auto_p50", "auto_p80",
           "native_p20", "native_p50", "native_p80", "rounds", "discarded", "weak")  # fmt: skip


def compare(shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, rounds: int) -> dict[str, Any]:
    """One row: times, and how many times as fast as SDPA (p20, p50, p80 over the rounds)."""
    batch, tokens, heads, dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim, dtype=dtype, requires_grad=backward)
    q, k, v = (t.transpose(1, 2).detach().requires_grad_(backward) for t in qkv.unbind(2))
    grad = torch.randn(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)

    def step(attention: Callable[..., Any]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), grad)) if backward else (lambda: attention(q, k, v))

    contexts = {name: lambda name=name: vitkernels.backend(name) for name in ("auto", "native")}
    with torch.set_grad_enabled(backward):
        chosen = vitkernels.explain(ops.attention, q, k, v).chosen
        calls = {"auto": step(ops.attention), "native": step(ops.attention), "SDPA": step(F.scaled_dot_product_attention)}
        measured = timing.interleave(calls, rounds=rounds, contexts=contexts, min_time=0.005)
    row: dict[str, Any] = dict(
        zip(COLUMNS, (*shape, str(dtype).removeprefix("torch."), "forward+backward" if backward else "forward", chosen), strict=False)
    )
    row |= {f"{name.lower()}_ms": timings.quantiles.p50 * 1e3 for name, timings in measured.items()}
    for name in ("auto", "native"):
        speedup = measured.speedup(name, over="SDPA")
        row |= {f"{name}_p20": speedup.p20, f"{name}_p50": speedup.p50, f"{name}_p80": speedup.p80}
    return row | {"rounds": measured.kept, "discarded": measured.discarded, "weak": measured.weak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in options.dtype or ("float32", "bfloat16"):
        for shape in SHAPES:
            row = compare(shape, getattr(torch, dtype), options.backward, options.rounds)
            rows.append(row)
            batch, tokens, heads, dim = shape
            ratios = " ".join(
                f"{name} {row[f'{name}_p50']:.2f} ({row[f'{name}_p20']:.2f} to {row[f'{name}_p80']:.2f})" for name in ("auto", "native")
            )
            print(f"{dtype} B{batch} N{tokens} {heads}x{dim}: {row['chosen']}, times SDPA: {ratios}{' weak' if row['weak'] else ''}", flush=True)
    if folder:
        name, note = "sweep-backward" if options.backward else "sweep", "p20, p50 and p80: how many times as fast as SDPA, over the rounds."
        report.write_results(folder, name, "attention against SDPA", rows, COLUMNS, note)


if __name__ == "__main__":
    main()
