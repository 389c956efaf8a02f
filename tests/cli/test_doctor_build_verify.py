"""`doctor`, `build` and `verify`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from click.testing import Result

from vitkernels import backends, builder, native, proof, registry, timing
from vitkernels.cli import verify
from vitkernels.registry import OpSpec

CPU = torch.device("cpu")


def test_doctor_reports_every_backend_op_and_version(report: Callable[..., Any]) -> None:
    found = report("doctor")
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert {row["name"] for row in found["backends"]} == set(backends.BACKENDS)
    rows = {row["name"]: row for row in found["backends"]}
    assert rows["reference"]["usable"]
    assert rows["native"]["usable"] is (native.why_not() is None)
    assert rows["cuda"]["usable"] is False
    assert all(row["detail"] for row in rows.values())
    on_cpu = {row["op"]: row["auto"] for row in found["ops"] if row["device"] == "cpu"}
    assert on_cpu.keys() == registry.all_specs().keys()
    assert set(on_cpu.values()) == {"native" if native.why_not() is None else "reference"}
    assert found["cpu"]["isa"] == native.cpu_isa()


def test_doctor_names_the_command_that_builds_what_is_missing(
    report: Callable[..., Any], vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "libvitkernels_cpu.so is not built here")
    monkeypatch.setattr(native, "find", lambda library: None)
    found = report("doctor")
    (row,) = (row for row in found["backends"] if row["name"] == "native")
    assert (row["built"], row["usable"], row["fix"]) == (False, False, "vitkernels build")
    assert row["detail"] == "libvitkernels_cpu.so is not built here"
    assert {row["auto"] for row in found["ops"] if row["device"] == "cpu"} == {"reference"}
    assert "vitkernels build" in found["fixes"]
    assert "vitkernels build" in vitkernels("doctor").stdout


def test_doctor_as_a_table(vitkernels: Callable[..., Result]) -> None:
    result = vitkernels("doctor")
    assert result.exit_code == 0
    for word in (*backends.BACKENDS, *registry.all_specs(), torch.__version__):
        assert word in result.stdout


def test_build_without_a_compiler_is_one_line(
    vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    message = one_line_error(vitkernels("build"))
    assert "no-such-compiler" in message


def test_build_says_where_it_went(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    asked = []

    def build(folder: Any, verbose: bool = False) -> list[Any]:
        asked.append(folder)
        return [folder / builder.CPU_LIBRARY]

    monkeypatch.setattr(builder, "build", build)
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(native, "cpu_isa", lambda: "baseline")
    result = vitkernels("build")
    assert result.exit_code == 0, result.output
    assert asked == [builder.cache_library_dir()]
    assert str(tmp_path) in result.stdout
    assert "baseline" in result.stdout


def test_build_that_does_not_load_is_an_error(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "build", lambda folder, verbose=False: [])
    monkeypatch.setattr(native, "why_not", lambda: "undefined symbol: _Z3foo")
    result = vitkernels("build")
    assert result.exit_code == 2
    assert "undefined symbol: _Z3foo" in result.stderr


def only(spec: OpSpec, backend: str = "reference") -> Callable[[], Iterator[tuple[OpSpec, str, torch.device]]]:
    small = dataclasses.replace(spec, bench_cases=spec.bench_cases[2:3], samples=lambda *a, **k: _first(spec, *a, **k))
    return lambda only: iter([(small, backend, CPU)])


def _first(spec: OpSpec, *args: Any, **kwargs: Any) -> Iterator[Any]:
    samples = spec.samples(*args, **kwargs)
    return iter([next(samples), next(samples), next(samples)])


def test_verify_finds_each_kernel_that_can_run_here() -> None:
    found = {(spec.name, backend) for spec, backend, device in verify.targets() if device == CPU}
    assert ({backend for _, backend in found} == {"native"} or backends.interpreting()) if native.why_not() is None else True
    assert all(backend != "reference" for _, backend in found)
    for name in registry.all_specs():
        assert ((name, "native") in found) is (native.why_not() is None)


def test_verify_passes_what_is_right_and_times_it(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.get("separable_self_attention")
    monkeypatch.setattr(verify, "targets", only(spec))
    monkeypatch.setattr(proof, "write_stamp", lambda *a: pytest.fail("a CPU kernel needs no stamp"))
    found = report("verify", "--rounds", 1, "--threads", 1)
    (row,) = found["proofs"]
    assert found["ok"]
    # three samples in three dtypes, each the output and the gradient of every tensor (the third sample has no biases)
    assert row["checked"] == 3 * (6 + 6 + 4)
    assert row["wrong"] == []
    assert 0 <= row["worst"] <= 1
    assert set(row["speedups"]) == {"B1 d256 N16, float32, forward", "B1 d256 N16, float32, forward+backward"}


def test_verify_fails_on_a_wrong_gradient(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.get("separable_attention")
    wrong = dataclasses.replace(spec, function=lambda q, k, v: spec.reference(q.detach() + 1e-6 * q, k, v))
    monkeypatch.setattr(verify, "targets", only(wrong))
    result = vitkernels("verify", "--json", "--threads", 1)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["ok"]
    (row,) = found["proofs"]
    assert any("grad q" in line for line in row["wrong"])
    assert row["speedups"] == {}, "what is wrong is not timed"


def test_verify_reports_a_kernel_that_raises(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Any, k: Any, v: Any) -> Any:
        raise RuntimeError("out of shared memory\nat line 3")

    monkeypatch.setattr(verify, "targets", only(dataclasses.replace(registry.get("separable_attention"), function=broken)))
    result = vitkernels("verify", "--threads", 1)
    assert result.exit_code == 1
    assert "out of shared memory" in result.stderr


def test_verify_names_what_there_was_no_time_for(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "targets", only(registry.get("separable_attention")))
    found = report("verify", "--seconds", 0, "--threads", 1)
    assert found["proofs"] == []
    assert found["left_out"] == ["separable_attention on reference (cpu)"]


def test_what_was_timed_in_part_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.get("separable_attention")
    two = dataclasses.replace(spec, bench_cases=spec.bench_cases[2:4])
    result = verify.Proof(spec.name, "reference", "cpu", checked=1)
    clock = itertools.count()  # one look a case: the second case of the backward is past the time
    monkeypatch.setattr(verify.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        verify.timing, "interleave", lambda *a, **k: timing.Measurement({w: timing.Timing((1.0,)) for w in ("vitkernels", "eager")}, 1, 0, False)
    )
    with pytest.raises(verify.TimeUp):
        verify.race(two, "reference", CPU, result, rounds=1, until=2.5)
    assert result.earned == [("float32", "forward")]
    with pytest.raises(verify.TimeUp):
        verify.check(two, "reference", CPU, result, until=2.5)


def test_verify_with_nothing_to_verify_says_so(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "targets", lambda only: iter(()))
    result = vitkernels("verify")
    assert result.exit_code == 0
    assert "vitkernels doctor" in result.stdout


def test_a_kernel_earns_its_place_only_where_right_timed_and_nowhere_slower() -> None:
    fast, even, slow = (1.1, 1.3, 1.4), (0.9, 0.98, 1.01), (0.5, 0.6, 0.99)
    forward, training = ("float32", "forward"), ("float32", "forward+backward")
    good = verify.Proof("op", "triton", "cuda:0", checked=9, speedups={("a", *forward): fast, ("b", *forward): even, ("a", *training): fast})
    assert good.earned == [forward, training]
    assert not dataclasses.replace(good, wrong=["grad x is off"]).earned
    assert not dataclasses.replace(good, checked=0).earned
    assert not dataclasses.replace(good, speedups={}).earned
    slower = dataclasses.replace(good, speedups=good.speedups | {("b", *training): slow})
    assert slower.slower == ["b, float32, forward+backward"]
    assert slower.earned == [forward], "the forward is not slower"
