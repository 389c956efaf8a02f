"""Five tasks over one ViT-S, and what people run today: how much the tasks add to the ViT, and how much faster they are than adapters one by one.

``python benchmarks/learnable_memory.py --out benchmarks/results/memory`` writes ``tasks.csv`` and ``tasks.md``. All contenders are interleaved in
the same rounds, after a check that ours and the original agree.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import report, timing
from vitkernels.cli import _zoo
from vitkernels.memory import MemoryViT, run_adapters

TASKS, MEMORIES, CLASSES = 5, 10, 10
# Of a contender: which other one is measured against it, and how the ratio is read.
RATIOS = (
    ("tasks beside the ViT", "timm's ViT alone"),
    ("tasks beside the ViT, accelerated", "the ViT alone, accelerated"),
    ("tasks beside the ViT, accelerated", "timm's ViT alone"),
    ("adapters, shared pass", "adapters, one by one"),
    ("adapters, shared pass", "their ViT alone, accelerated"),
)
COLUMNS = (
    "batch",
    "dtype",
    "contender",
    "ms",
    "against",
    "times_as_long_p20",
    "times_as_long_p50",
    "times_as_long_p80",
    "rounds",
    "discarded",
    "weak",
)


def adapters(dtype: torch.dtype) -> tuple[nn.ModuleList, nn.ModuleList]:
    """vit_pytorch's adapters over one ViT-S, and the same accelerated."""
    _zoo._package("vit_pytorch")
    zoo = importlib.import_module("vit_pytorch.learnable_memory_vit")
    vit = zoo.ViT(image_size=224, patch_size=16, num_classes=CLASSES, dim=384, depth=12, heads=6, mlp_dim=1536)
    original = nn.ModuleList(zoo.Adapter(vit=vit, num_memories_per_layer=MEMORIES, num_classes=CLASSES) for _ in range(TASKS)).eval().to(dtype)
    fast = copy.deepcopy(original)
    vitkernels.accelerate(fast)
    return original, fast


def compare(batch: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each of ``RATIOS``."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, dtype=dtype)
    vit = _zoo.load("vit_small_patch16_224", "timm").module.eval().to(dtype)
    model = MemoryViT(copy.deepcopy(vit))
    for i in range(TASKS):
        model.add_task(str(i), CLASSES, MEMORIES)
    model.eval()
    whole, fast_vit = copy.deepcopy(model), copy.deepcopy(vit)
    for one in (whole.vit, fast_vit):
        vitkernels.accelerate(one)
    original, fast = adapters(dtype)
    shared: Any = fast[0]

    def one_by_one() -> list[Tensor]:
        return [adapter(images) for adapter in original]

    calls = {
        "timm's ViT alone": lambda: vit(images),
        "tasks beside the ViT": lambda: model(images),
        "the ViT alone, accelerated": lambda: fast_vit(images),
        "tasks beside the ViT, accelerated": lambda: whole(images),
        "adapters, one by one": one_by_one,
        "adapters, shared pass": lambda: run_adapters(list(fast), images),
        "their ViT alone, accelerated": lambda: shared.vit(images),
    }
    with torch.inference_mode():
        if not torch.equal(model(images).base, vit(images)):
            raise SystemExit("the ViT's logits are not the same to the bit beside five tasks: nothing is measured")
        close: Any = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(whole(images).tasks, model(images).tasks, **close)
        torch.testing.assert_close(fast_vit(images), vit(images), **close)
        for a, b in zip(one_by_one(), run_adapters(list(fast), images), strict=True):
            torch.testing.assert_close(b, a, **close)
        measured = timing.interleave(calls, rounds=rounds, min_time=0.005)
    rows = []
    for contender, against in RATIOS:
        longer = measured.speedup(against, over=contender)
        values = (
            batch,
            str(dtype).removeprefix("torch."),
            contender,
            measured[contender].quantiles.p50 * 1e3,
            against,
            longer.p20,
            longer.p50,
            longer.p80,
        )
        rows.append(dict(zip(COLUMNS, (*values, measured.kept, measured.discarded, measured.weak), strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in options.dtype or ("float32", "bfloat16"):
        for batch in options.batch or (1, 8):
            for row in compare(batch, getattr(torch, dtype), options.rounds):
                rows.append(row)
                times = " to ".join(f"{row[f'times_as_long_{p}']:.3g}" for p in ("p20", "p50", "p80"))
                print(
                    f"{dtype} B{batch}: {row['contender']} {row['ms']:.1f} ms, {times} times {row['against']}{' weak' if row['weak'] else ''}",
                    flush=True,
                )
    if folder:
        title = f"{TASKS} tasks of {MEMORIES} memory tokens a layer over one ViT-S"
        report.write_results(folder, "tasks", title, rows, COLUMNS)


if __name__ == "__main__":
    main()
