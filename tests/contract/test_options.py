"""The options that `make gpu` runs the contract with."""

from __future__ import annotations

from pathlib import Path

from .oracle import python


def test_outcomes_are_recorded_as_they_come_and_other_ops_left_out(tmp_path: Path) -> None:
    record = tmp_path / "new" / "record.txt"
    words = ("--op", "separable_attention", "--op", "masked_pool", "--record", record, "-k", "reference or native")
    run = python("-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).with_name("test_bad_inputs.py"), *words)
    assert run.returncode == 0, run.stdout
    lines = record.read_text().splitlines()
    assert f"{len(lines)} passed" in run.stdout
    assert all(line.startswith("passed ") for line in lines)
    refused = [line.partition("test_refused_in_words[")[2] for line in lines if "test_refused_in_words" in line]
    assert {name.split("-")[1] for name in refused} == {"separable_attention", "masked_pool"}
