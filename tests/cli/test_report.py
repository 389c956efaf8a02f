"""What every report shares."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

from vitkernels import report


def test_provenance_says_where_when_and_with_what() -> None:
    origin = report.provenance()
    assert origin["torch"] == torch.__version__
    assert origin["threads"] == torch.get_num_threads()
    assert origin["machine"]
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(origin["date"])
    assert abs(age.total_seconds()) < 60
    sentence = report.origin_sentence(origin)
    assert origin["machine"] in sentence
    assert f"{origin['threads']} threads" in sentence


def test_malloc_counts_as_tuned_only_with_both_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in report.TUNED_MALLOC:
        monkeypatch.delenv(name, raising=False)
    assert report.malloc_setting() == "default"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", report.TUNED_MALLOC["MALLOC_MMAP_THRESHOLD_"])
    assert report.malloc_setting() == "default"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", report.TUNED_MALLOC["MALLOC_TRIM_THRESHOLD_"])
    assert report.malloc_setting() == "tuned"


def test_csv_keeps_its_columns_without_rows(tmp_path: Path) -> None:
    report.write_csv(tmp_path / "a.csv", [], {"date": "today"}, ["op", "p50_ms"])
    assert list(pandas.read_csv(tmp_path / "a.csv").columns) == ["op", "p50_ms", "date"]
    report.write_csv(tmp_path / "a.csv", [{"op": "x, y", "p50_ms": 1.5}], {"date": "today"}, ["op", "p50_ms"])
    assert pandas.read_csv(tmp_path / "a.csv").iloc[0].tolist() == ["x, y", 1.5, "today"]


def test_markdown_escapes_bars() -> None:
    assert report.markdown_table(["a", "b"], [["1|2", "3"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1\\|2 | 3 |"]


def test_results_folder_is_made_and_tried(tmp_path: Path, unwritable: Path) -> None:
    assert report.results_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(OSError, match="cannot write to the results folder"):
        report.results_folder(unwritable)


def test_unknown_package_is_absent() -> None:
    assert report.package_version("no-such-package-here") == "absent"


def test_importing_the_package_and_its_help_needs_no_plotting_and_no_zoo() -> None:
    code = (
        "import sys, vitkernels.cli; print(sorted({'matplotlib', 'pandas', 'timm', 'transformers', 'vit_pytorch', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
