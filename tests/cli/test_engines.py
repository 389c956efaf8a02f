"""ONNX Runtime and OpenVINO as contenders: right, absent with a reason, and asleep while another is timed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn

from vitkernels.cli import _engines

WORDS = ("accelerate", "mobilevitv2_050", "--size", 64, "--repeats", 2, "--threads", 1, "--no-compile")
present = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime", "openvino")), reason="the engines are not installed"
)


@pytest.fixture
def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval(), torch.randn(2, 3, 8, 8)


@present
def test_engines_compute_what_the_model_computes(small: tuple[nn.Module, Tensor]) -> None:
    module, x = small
    with _engines.engines(module, x) as (found, notes):
        assert list(found) == ["ONNX Runtime", "OpenVINO"]
        assert notes == []
        for engine in found.values():
            torch.testing.assert_close(engine.output, module(x).detach())


def state(engine: _engines.Engine) -> str:
    return Path(f"/proc/{engine._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@present
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_an_engine_is_stopped_unless_it_is_timed(small: tuple[nn.Module, Tensor]) -> None:
    with _engines.engines(*small) as (found, _):
        engine = found["ONNX Runtime"]
        before = engine.cpu_seconds
        assert 0 < engine.seconds_per_call(200) < 1
        assert engine.cpu_seconds > before
        deadline = time.monotonic() + 5
        while state(engine) != "T" and time.monotonic() < deadline:  # a signal is delivered when the scheduler gets to it
            time.sleep(0.01)
        assert state(engine) == "T"
    assert engine._process.poll() is not None, "its process outlives the comparison"


@present
def test_an_engine_that_dies_says_so(small: tuple[nn.Module, Tensor]) -> None:
    with _engines.engines(*small) as (found, _):
        engine = found["OpenVINO"]
        engine._process.kill()
        with pytest.raises(_engines.EngineError, match="the process of openvino ended with exit code -9; --no-peers leaves it out"):
            engine.seconds_per_call(1)


@present
def test_a_model_that_cannot_be_exported_is_a_note(capfd: pytest.CaptureFixture[str]) -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x)

    with _engines.engines(Values(), torch.randn(1, 3, 4, 4)) as (found, notes):
        assert found == {}
        assert [note.partition(":")[0] for note in notes] == ["ONNX Runtime", "OpenVINO"]
        assert all("torch.onnx.export fails" in note and "svd" in note for note in notes)
    printed = capfd.readouterr()
    assert printed.out + printed.err == "", "the exporter's dump of the graph reaches the user"


@present
def test_a_model_an_engine_does_not_load_is_a_note(small: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: nn.Module, x: Tensor, folder: Path) -> tuple[Path, Path]:
        model, image = export(module, x, folder)
        model.write_text("not a model")
        return model, image

    export = _engines._export
    monkeypatch.setattr(_engines, "_export", broken)
    with _engines.engines(*small) as (found, notes):
        assert found == {}
        assert len(notes) == 2
        assert all("\n" not in note for note in notes)


@pytest.mark.parametrize(
    ("missing", "said"), [("openvino", "OpenVINO: openvino is not installed"), ("onnx", "ONNX Runtime: torch.onnx.export needs onnx")]
)
def test_absent_packages_are_notes(small: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch, missing: str, said: str) -> None:
    def export(*arguments: Any) -> Any:
        raise RuntimeError("exported for the other engine" if missing == "openvino" else "exported for nobody")

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest))
    monkeypatch.setattr(_engines, "_export", export)
    with _engines.engines(*small) as (found, notes):
        assert found == {}
        assert any(note.startswith(said) and "vitkernels[peers]" in note for note in notes), notes
        assert not any("exported for nobody" in note for note in notes)


@present
def test_accelerate_shows_them(report: Callable[..., Any], vitkernels: Callable[..., Result]) -> None:
    found = report(*WORDS)
    assert found["notes"] == []
    contenders = ("channels_last", *_engines.ENGINES)
    for name in contenders:
        assert 0 < found[f"{name}_p20_ms"] <= found[f"{name}_p50_ms"] <= found[f"{name}_p80_ms"]
        assert 0 < found[f"error_logits_{name}"] < 1e-3
    printed = vitkernels(*WORDS).stdout
    assert all(name in printed for name in contenders)


@pytest.mark.parametrize("words", [("--no-peers",), ("--dtype", "bfloat16"), ("--train", "--batch", 2)], ids=["no-peers", "bfloat16", "train"])
def test_they_run_only_where_they_compare(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]) -> None:
    monkeypatch.setattr(_engines, "engines", lambda *arguments: pytest.fail("no engine was asked for"))
    assert "ONNX Runtime_p50_ms" not in report(*WORDS, *words)


def test_an_engine_with_wrong_logits_is_not_timed(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Off:
        cpu_seconds = 0.0

        def __init__(self, output: Tensor) -> None:
            self.output = output

        def seconds_per_call(self, calls: int) -> float:
            pytest.fail("it was timed")

    @contextlib.contextmanager
    def engines(module: nn.Module, x: Tensor) -> Iterator[tuple[dict[str, Any], list[str]]]:
        with torch.no_grad():
            yield {"OpenVINO": Off(module(x) * 1.001)}, []

    monkeypatch.setattr(_engines, "engines", engines)
    found = report(*WORDS)
    assert found["accuracy_rule_holds"]
    (note,) = found["notes"]
    assert note.startswith("OpenVINO: not timed, its logits are off by ")
    assert "OpenVINO_p50_ms" not in json.dumps(found)
