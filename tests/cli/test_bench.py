"""`bench`: what is written, and what is not."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from click.testing import Result

from vitkernels import bench as benchmark
from vitkernels import registry
from vitkernels import report as reports
from vitkernels.cli import bench as command

SELF = registry.get("separable_self_attention")
SMALL = next(case for case in SELF.bench_cases if case.name == "B1 d256 N16")
# Of every op its smallest.
CASES = (
    *("B1 d192", "M0s3", "small64", "T1024 d384", "T2048 d384", "B1 N197 d32 batch"),
    *("B1 N49 8x16", "B1 8x8 4x60", "B1 5 tasks", "B2 Q100", "B8 512x8x8"),
)
QUICK = ("--quick", "--threads", 1, *(word for case in CASES for word in ("--case", case)))


def test_quick_run_writes_csv_plot_and_report(vitkernels: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    result = vitkernels("bench", *QUICK, "--out", folder)
    assert result.exit_code == 0, result.output
    frame = pandas.read_csv(folder / "bench.csv")
    assert set(frame.op) == set(registry.all_specs())
    assert set(frame["mode"]) == {"forward", "forward+backward"}
    assert {"vitkernels", "eager"} <= set(frame.variant)
    assert "eager, keys not projected" in set(frame.variant[frame.op == SELF.name])

    # accuracy: each row says its own error and eager's, and keeps the rule; but for what computes something else, which has none
    yardsticks = {name for spec in registry.all_specs().values() for name in spec.yardsticks}
    assert yardsticks and set(frame.variant[frame.error.isna()]) == yardsticks
    judged = frame[frame.error.notna()]
    assert (judged.error >= 0).all()
    assert (judged.eager_error > 0).all()
    assert (judged.error <= 2 * judged.eager_error + 2 * torch.finfo(torch.float32).eps * 1.001).all()
    backward = frame[(frame["mode"] == "forward+backward") & (frame.variant == "vitkernels")]
    assert backward.error_tensor.str.match("output|grad ").all()

    # speed: the paired ratio of eager with itself is one, and the two directions agree
    eager = frame[frame.variant == "eager"]
    assert (eager.speedup_p50 == 1).all()
    assert (frame.p20_ms <= frame.p50_ms).all()
    assert (frame.p50_ms <= frame.p80_ms).all()
    multiplies = frame.op.map(lambda op: registry.get(op).bench_cases[0].flops > 0)  # the others are nothing but traffic
    assert ((frame[["gflops", "gemm_fraction", "gemm32_fraction"]] > 0).all(axis=1) == multiplies).all()
    assert (frame[frame["mode"] == "forward"].copy_fraction > 0).all()

    # provenance
    row = frame.iloc[0]
    assert row.torch == torch.__version__
    assert row.threads == 1
    assert row.malloc in ("default", "tuned")
    assert (frame[["date", "vitkernels", "triton", "machine", "isa"]].astype(str) != "").all().all()
    assert (frame.rounds_kept == 5).all()

    text = (folder / "report.md").read_text()
    assert "Where not to use it" in text
    for name in registry.all_specs():
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text


def test_json_names_what_ran(report: Callable[..., Any]) -> None:
    found = report("bench", "separable_attention", *QUICK, "--no-backward", "--dtype", "bfloat16")
    assert {row["dtype"] for row in found["rows"]} == {"bfloat16"}
    assert {row["mode"] for row in found["rows"]} == {"forward"}
    assert {row["op"] for row in found["rows"]} == {"separable_attention"}
    assert found["provenance"]["threads"] == 1


def timed(spec: registry.OpSpec, **kwargs: Any) -> tuple[set[str], dict[str, benchmark.Refused]]:
    rows, refused = benchmark.bench_case(spec, SMALL, torch.float32, rounds=1, **{"compiled": False, **kwargs})
    return {row.variant for row in rows}, {r.variant: r for r in refused}


def test_a_wrong_contender_gets_no_row() -> None:
    spec = dataclasses.replace(SELF, peers={"wrong": lambda *a, **k: SELF.reference(*a, **k) * 1.001, "right": SELF.reference})
    variants, refused = timed(spec)
    assert "right" in variants
    assert "wrong" not in variants
    assert refused["wrong"].wrong
    assert "output" in refused["wrong"].reason


def test_a_wrong_gradient_is_refused_only_where_gradients_are_timed() -> None:
    spec = dataclasses.replace(SELF, peers={"half": lambda x, *a, **k: SELF.reference((x + x.detach()) / 2, *a, **k)})
    assert "half" in timed(spec)[0]
    variants, refused = timed(spec, backward=True)
    assert "half" not in variants
    assert "grad x" in refused["half"].reason


def test_a_contender_that_raises_says_why_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler_missing(function: Any, **kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("No working C++ compiler found\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", compiler_missing)
    variants, refused = timed(SELF, compiled=True)
    assert {"vitkernels", "eager"} <= variants
    assert refused["torch.compile"].reason == "No working C++ compiler found"
    assert not refused["torch.compile"].wrong


def test_our_own_wrong_result_fails_the_command(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = dataclasses.replace(SELF, function=lambda *a, **k: SELF.reference(*a, **k) + 0.01)
    monkeypatch.setattr(registry, "get", lambda name: wrong)
    result = vitkernels("bench", SELF.name, *QUICK, "--no-backward", "--out", tmp_path)
    assert result.exit_code == 1
    assert "no row for vitkernels" in result.stderr
    frame = pandas.read_csv(tmp_path / "bench.csv")
    assert "vitkernels" not in set(frame.variant)
    assert "## No row" in (tmp_path / "report.md").read_text()


def test_losing_cases_are_kept() -> None:
    rows, _ = benchmark.bench_case(SELF, SMALL, torch.float32, rounds=1, compiled=False)
    faster_peer = [dataclasses.replace(row, ours_speedup=0.8 if row.variant == "eager" else 2.0) for row in rows]
    (line,) = command.losing(faster_peer)
    assert "B1 d256 N16" in line
    assert "eager is 1.25x as fast" in line
    assert command.losing([dataclasses.replace(row, ours_speedup=1.5) for row in rows]) == []


def test_a_report_of_a_gpu_says_what_it_proves(tmp_path: Path) -> None:
    rows, _ = benchmark.bench_case(SELF, SMALL, torch.float32, rounds=1, compiled=False)
    (eager,) = (dataclasses.replace(row, device="cuda", p50_ms=1.0) for row in rows if row.variant == "eager")
    kernel = dataclasses.replace(eager, variant="vitkernels [triton]", backend="triton", p50_ms=0.5)
    both = [dataclasses.replace(one, case=case.name) for case in SELF.gpu_cases for one in (eager, kernel)]
    origin = reports.provenance()
    command.write(tmp_path, both, [], origin)
    assert "- separable_self_attention on triton: float32 forward\n" in (tmp_path / "report.md").read_text()
    command.write(tmp_path, both[:-1], [], origin)
    assert "What this proves" not in (tmp_path / "report.md").read_text(), "the last case has no row of the kernel"


def test_plan_covers_every_case_once() -> None:
    specs = list(registry.all_specs().values())
    full = list(benchmark.plan(specs, [torch.float32, torch.bfloat16], backward=True))
    assert len(full) == 2 * sum(len(spec.bench_cases) * (1 + spec.differentiable) for spec in specs)
    assert len({(spec.name, case.name, dtype, backward) for spec, case, dtype, backward in full}) == len(full)
    one = list(benchmark.plan(specs[:1], [torch.float32], backward=False, case_filter=["b16 D128"]))
    assert [case.name for _, case, _, _ in one] == ["B16 d128 N256"]


def test_ops_take_turns_and_none_is_lost() -> None:
    specs = list(registry.all_specs().values())
    plan = list(benchmark.plan(specs, [torch.float32, torch.bfloat16], backward=True))
    turns = benchmark.in_turns(plan)
    assert [spec.name for spec, *_ in turns[: len(specs)]] == [spec.name for spec in specs]
    for name in registry.all_specs():
        assert [one for one in turns if one[0].name == name] == [one for one in plan if one[0].name == name]


def test_an_interrupt_loses_no_row(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, begun = benchmark.bench_case, []

    def second_is_interrupted(*args: Any, **kwargs: Any) -> Any:
        begun.append(args)
        if len(begun) == 2:
            assert set(pandas.read_csv(tmp_path / "bench.csv").dtype) == {"float32"}, "what was measured is written at once"
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(benchmark, "bench_case", second_is_interrupted)
    words = ("bench", SELF.name, "--case", SMALL.name, "--no-backward", "--no-compile", "--rounds", 1, "--threads", 1, "--out", tmp_path)
    assert vitkernels(*words, "--dtype", "float32", "--dtype", "bfloat16", "--dtype", "float16").exit_code == 130
    assert len(begun) == 2
    assert set(pandas.read_csv(tmp_path / "bench.csv").dtype) == {"float32"}
    assert (tmp_path / "report.md").read_text().count("left out: interrupted") == 2
    assert (tmp_path / f"{SELF.name}.png").exists()


def test_tuned_malloc_restarts_the_process_with_glibc_told(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    class Restarted(Exception):
        pass

    seen: dict[str, Any] = {}

    def execve(path: str, argv: list[str], env: dict[str, str]) -> None:
        seen.update(path=path, argv=argv, env=env)
        raise Restarted

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["vitkernels", "bench", "--tuned-malloc", "--json"])
    for name in reports.TUNED_MALLOC:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Restarted):
        vitkernels("bench", "--tuned-malloc", "--json")
    assert seen["argv"] == [sys.executable, "-m", "vitkernels", "bench", "--tuned-malloc", "--json"]
    assert seen["env"]["MALLOC_MMAP_THRESHOLD_"] == "4294967296"
    assert seen["env"]["MALLOC_TRIM_THRESHOLD_"] == "8589934592"


def test_the_malloc_setting_is_part_of_the_provenance(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in reports.TUNED_MALLOC.items():
        monkeypatch.setenv(name, value)
    words = ("bench", "separable_attention", *QUICK, "--no-backward", "--tuned-malloc", "--out", tmp_path)
    assert vitkernels(*words).exit_code == 0
    assert set(pandas.read_csv(tmp_path / "bench-tuned-malloc.csv").malloc) == {"tuned"}


def test_unknown_op_and_case_name_what_there_is(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str]) -> None:
    assert "did you mean separable_attention" in one_line_error(vitkernels("bench", "seperable_atention"))
    assert "B16 d128 N256" in one_line_error(vitkernels("bench", "--case", "B99"))


def test_unwritable_results_folder(
    vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], unwritable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "bench_case", lambda *a, **k: pytest.fail("computed before it looked whether it can write"))
    message = one_line_error(vitkernels("bench", *QUICK, "--out", unwritable))
    assert message.startswith(f"cannot write to the results folder {unwritable}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_results_folder(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in one_line_error(vitkernels("bench", *QUICK, "--out", tmp_path))


def test_interrupt(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "bench_case", interrupt)
    result = vitkernels("bench", *QUICK)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in result.output


def test_no_gpu_is_one_line(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str]) -> None:
    assert "no cuda:99 here" in one_line_error(vitkernels("bench", "--device", "cuda:99"))
    assert "no device named 'gpu'" in one_line_error(vitkernels("bench", "--device", "gpu"))


def test_rows_serialise() -> None:
    rows, _ = benchmark.bench_case(SELF, SMALL, torch.float32, rounds=1, compiled=False, backward=True)
    assert all(row.copy_fraction is None for row in rows)
    assert json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))[0].keys() == set(benchmark.COLUMNS)


def test_what_there_is_no_time_for_is_named(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "bench_case", lambda *a, **k: pytest.fail("the time was up"))
    found = report("bench", "masked_pool", "--device", "cpu", "--seconds", 0)
    assert found["rows"] == []
    assert {(r["case"], r["reason"]) for r in found["refused"]} == {
        (c.name, "left out: the time was up") for c in registry.get("masked_pool").bench_cases
    }


def test_a_copy_of_a_sample_keeps_its_layout_and_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.timing, "cold_copies", lambda moved, device: 3)
    spec = registry.get("attention")
    samples = benchmark.cold_samples(spec.bench_cases[4], torch.bfloat16, torch.device("cpu"))
    assert len(samples) == 3
    q, k, v = samples[0].tensors()
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr(), "the case is of one projection"
    for other in samples[1:]:
        for a, b in zip((q, k, v), other.tensors(), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
            assert b.stride() == a.stride() and b.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()
        assert len({t.untyped_storage().data_ptr() for t in other.tensors()}) == 1
