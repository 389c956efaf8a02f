"""What makes a GPU kernel the default without `vitkernels verify` on the user's machine: results in this repository."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from vitkernels import proof, registry

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("op", "backend", "architecture"), proof.COMMITTED)
def test_a_committed_proof_is_in_the_results(op: str, backend: str, architecture: str) -> None:
    frame = pandas.read_csv(ROOT / proof.COMMITTED[op, backend, architecture], comment="#")
    rows = frame[(frame.op == op) & (frame.device == "cuda") & (frame.variant == f"vitkernels [{backend}]")]
    modes, dtypes = {"forward", "forward+backward"}, {"float32", "bfloat16"}
    wanted = {(case.name, dtype, mode) for case in registry.get(op).gpu_cases for dtype in dtypes for mode in modes}
    assert set(zip(rows.case, rows.dtype, rows["mode"], strict=True)) == wanted, "a case without a row was wrong, or was not run"
    assert (rows.speedup_p80 >= 1).all(), "eager is faster even at the 80th percentile"
