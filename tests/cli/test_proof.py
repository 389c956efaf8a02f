"""What makes a GPU kernel the default, in what was measured and no further: results in this repository, or the user's own `vitkernels verify`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from vitkernels import backends, proof, registry
from vitkernels.cli import doctor

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
OP = "separable_attention"


@pytest.mark.parametrize(("op", "backend", "architecture"), proof.COMMITTED)
def test_a_committed_proof_is_in_the_results(op: str, backend: str, architecture: str) -> None:
    committed = proof.COMMITTED[op, backend, architecture]
    frame = pandas.read_csv(ROOT / committed.results, comment="#")
    shown = proof.shown(frame.to_dict("records"), {name: [case.name for case in registry.get(name).cases("cuda")] for name in set(frame.op)})
    claimed = {(dtype, mode) for dtype, modes in committed.passes.items() for mode in modes}
    assert claimed
    assert claimed <= set(shown[op, backend]), "a case has no row (it was wrong, or not run), or eager was faster"


def row(case: str, speedup: float, **changed: str) -> dict[str, Any]:
    kind = {"op": OP, "backend": "triton", "dtype": "float32", "mode": "forward", "variant": "vitkernels [triton]", "device": "cuda"}
    return {"case": case, "speedup_p50": speedup, **kind, **changed}


def test_every_case_has_to_win() -> None:
    cases = {OP: ["a", "b"]}
    good = [row("a", 1.0), row("b", 3.0, variant="vitkernels")]  # `auto` took it there
    assert proof.shown(good, cases) == {(OP, "triton"): [("float32", "forward")]}
    assert proof.shown([row("a", 0.99), *good[1:]], cases) == {}
    assert proof.shown(good[:1], cases) == {}, "b was wrong, or not run"
    assert proof.shown([row("a", 1.0, variant="vitkernels [triton], CUDA graph"), good[1]], cases) == {}
    assert proof.shown([{**one, "device": "cpu"} for one in good], cases) == {}
    assert proof.shown([{**one, "backend": "reference", "variant": "vitkernels"} for one in good], cases) == {}
    training = [row("a", 0.5, mode="forward+backward"), row("b", 2.0, mode="forward+backward")]
    half = [row(case, 2.0, dtype="bfloat16", mode=mode) for case in "ab" for mode in ("forward", "forward+backward")]
    assert proof.shown([*good, *training, *half], cases) == {
        (OP, "triton"): [("float32", "forward"), ("bfloat16", "forward"), ("bfloat16", "forward+backward")]
    }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU of which nothing is proved, as far as the choice of a backend sees; and where its stamps are."""
    stamps = tmp_path / "verified.json"
    monkeypatch.setattr(proof, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(proof, "stamp_key", lambda device: {"device": "one", "kernels": "these"})
    monkeypatch.setattr(proof, "stamp_path", lambda: stamps)
    monkeypatch.setattr(proof, "COMMITTED", {})
    monkeypatch.setattr(backends.native, "has_module", lambda name: True)
    proof._proved.cache_clear()
    yield stamps
    proof._proved.cache_clear()


def taken() -> set[tuple[str, str]]:
    """The dtypes and modes in which `auto` takes the Triton kernel."""
    found = set()
    with backends.backend("auto"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for training, mode in ((False, "forward"), (True, "forward+backward")):
                with torch.set_grad_enabled(training):
                    chosen = backends._resolve(OP, "auto", GPU, dtype, torch.is_grad_enabled())
                    reason = backends.why_not(OP, "triton", GPU, dtype, auto=True)
                assert chosen == ("reference" if reason else "triton")
                if reason:
                    words = (str(dtype).removeprefix("torch."), "with gradients" if training else "without gradients", "vitkernels verify")
                    assert all(word in reason for word in words)
                else:
                    found.add((str(dtype).removeprefix("torch."), mode))
    return found


def test_auto_goes_no_further_than_the_committed_results(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken() == set()
    proof._proved.cache_clear()
    some = {"bfloat16": (proof.FORWARD, proof.TRAINING), "float32": (proof.FORWARD,)}
    monkeypatch.setattr(proof, "COMMITTED", {(OP, "triton", "sm_90"): proof.Committed("", some)})
    assert taken() == {("bfloat16", "forward"), ("bfloat16", "forward+backward"), ("float32", "forward")}
    monkeypatch.setattr(proof, "architecture", lambda device: "sm_80")
    proof._proved.cache_clear()
    assert taken() == set()


def test_auto_goes_no_further_than_the_stamp(gpu: Path) -> None:
    proof.write_stamp(OP, "triton", GPU, [("float16", "forward+backward")])
    assert taken() == {("float16", "forward+backward")}
    proof.write_stamp("attention", "triton", GPU, [("float32", "forward")])
    proof.write_stamp(OP, "triton", GPU, [("float32", "forward")])
    assert taken() == {("float32", "forward")}, "a new stamp replaces the old"
    stamps = json.loads(gpu.read_text())
    assert {stamp["op"] for stamp in stamps} == {OP, "attention"}
    for stamp in stamps:
        del stamp["measured"]  # of a time when a stamp did not say
    gpu.write_text(json.dumps(stamps))
    proof._proved.cache_clear()
    assert taken() == set()


def test_doctor_says_in_what_a_kernel_is_verified(gpu: Path) -> None:
    assert set(doctor._verified(registry.get(OP), GPU)["triton"].values()) == {False}
    proof.write_stamp(OP, "triton", GPU, [("float32", "forward")])
    found = doctor._verified(registry.get(OP), GPU)["triton"]
    assert [mode for mode, verified in found.items() if verified] == ["float32 forward"]
    assert doctor._in_words(found) == "float32 forward"
    assert doctor._in_words(dict.fromkeys(found, True)) == "yes"
    assert set(doctor._verified(registry.get("pairwise_box_cost"), GPU)["triton"]) == {
        f"{dtype} forward" for dtype in ("float32", "bfloat16", "float16")
    }
