"""What makes a GPU kernel the default, in what was measured and no further: results in this repository, or the user's own `vitkernels verify`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
    shown = proof.shown(frame.to_dict("records"), registry.all_specs())
    claimed = {(dtype, mode) for dtype, modes in committed.passes.items() for mode in modes}
    assert claimed
    assert claimed <= set(shown[op, backend]), "a case has no row (it was wrong, or not run), or eager was faster"


def test_a_gpu_is_known_by_its_capability_and_not_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 describes an H200: ``gcnArchName``, on ROCm the architecture, is the product's name there."""
    properties = SimpleNamespace(gcnArchName="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert proof.architecture(GPU) == "sm_90"


def run(case: str, **milliseconds: float) -> list[dict[str, Any]]:
    """The rows of one case: of eager, taking 1 ms, and of the contenders given."""
    kind = {"op": OP, "case": case, "dtype": "float32", "mode": "forward", "device": "cuda"}
    named = {"triton": ("vitkernels [triton]", "triton"), "auto": ("vitkernels", "triton"), "graph": ("vitkernels [triton], CUDA graph", "triton")}
    others = {name: (name, "") for name in ("eager", "models", "other")} | {"reference": ("vitkernels", "reference")}
    times = {"eager": 1.0} | milliseconds
    return [kind | dict(zip(("variant", "backend"), (named | others)[who], strict=True)) | {"p50_ms": time} for who, time in times.items()]


def test_every_case_has_to_win() -> None:
    gpu_cases = tuple(dataclasses.replace(registry.get(OP).gpu_cases[0], name=name) for name in "ab")
    peers = {"models": lambda *a: a[0], "other": lambda *a: a[0]}
    specs = {OP: dataclasses.replace(registry.get(OP), gpu_cases=gpu_cases, peers=peers, otherwise=("models",))}
    forward = {(OP, "triton"): [("float32", "forward")]}
    good = run("b", triton=0.5)
    assert proof.shown([*run("a", triton=1.0), *good], specs) == forward
    assert proof.shown([*run("a", auto=1.0), *good], specs) == forward, "it was auto's choice already"
    assert proof.shown([*run("a", triton=1.01), *good], specs) == {}
    assert proof.shown(good, specs) == {}, "a was wrong, or not run"
    assert proof.shown([*run("a", graph=0.1), *good], specs) == {}
    assert proof.shown([*run("a", reference=0.1), *good], specs) == {}
    assert proof.shown([*run("a", triton=0.5, models=0.4), *good], specs) == {}, "what a model runs otherwise is faster"
    assert proof.shown([*run("a", triton=0.5, other=0.4), *good], specs) == forward, "what nobody runs counts for nothing"
    assert proof.shown([one | {"device": "cpu"} for one in (*run("a", triton=1.0), *good)], specs) == {}
    training = [one | {"mode": "forward+backward"} for one in (*run("a", triton=0.5), *run("b", triton=2.0))]
    assert proof.shown([*run("a", triton=1.0), *good, *training], specs) == forward
    half = [one | {"dtype": "bfloat16", "mode": "forward+backward"} for one in (*run("a", triton=0.5), *good)]
    assert proof.shown([*training, *half], specs) == {(OP, "triton"): [("bfloat16", "forward+backward")]}


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
