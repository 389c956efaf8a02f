"""``tune_allocator``: counted in page faults, in processes of their own, because it cannot be undone."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import vitkernels
from vitkernels import allocator, report

# Blocks that neither the largest threshold of the default (32 MiB) nor a piece of a thread's own arena (64 MiB) can hold.
FAULTS = """
import resource, sys, threading
import torch, vitkernels
from vitkernels import report

torch.set_num_threads(1)
assert report.malloc_setting() == "default"
if sys.argv[1] == "tuned":
    assert vitkernels.tune_allocator()
    assert report.malloc_setting() == "tuned"

def faults():
    def activations():
        for _ in range(4):
            [torch.empty(80 << 18).fill_(1) for _ in range(2)]
    for _ in range(4):  # until the heap has holes for two blocks at once, whatever small ones lie between
        activations()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations()
    counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

counted = []
faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
print(*counted)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_large_activations_are_not_faulted_in_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*report.TUNED_MALLOC, "MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    def count(setting: str) -> list[int]:
        run = subprocess.run([sys.executable, "-c", FAULTS, setting], capture_output=True, text=True, check=True)
        return [int(word) for word in run.stdout.split()]

    for default, tuned in zip(count("default"), count("tuned"), strict=True):  # in the main thread, and in another
        assert default >= 100  # 8 x 80 MiB, even in huge pages of 2 MiB
        assert tuned * 5 <= default  # none, or one block of eight where the heap still had to grow


def pretend(monkeypatch: pytest.MonkeyPatch, process: Any, libc: Any = None) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator, "_in_force", allocator.in_force())  # put back afterwards
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: process if name is None else libc)


def symbol() -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    tuning = vitkernels.tune_allocator()
    assert not tuning
    assert str(tuning) == "allocator unchanged: glibc's malloc is what it tunes, and this is darwin"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SimpleNamespace())
    tuning = vitkernels.tune_allocator()
    assert not tuning
    assert str(tuning) == "allocator unchanged: the C library is not glibc"


def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = SimpleNamespace(posix_memalign=symbol())  # without mallopt: calling it would raise
    pretend(monkeypatch, SimpleNamespace(gnu_get_libc_version=None, posix_memalign=symbol()), libc)
    tuning = vitkernels.tune_allocator()
    assert not tuning
    assert "another malloc" in tuning.reason
    assert "another malloc" in str(tuning)


@pytest.mark.parametrize(
    ("refused", "settings"),
    [
        ((), {"M_MMAP_THRESHOLD": 1 << 30, "M_TRIM_THRESHOLD": -1, "M_ARENA_MAX": 1}),
        ((-3,), {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": -1, "M_ARENA_MAX": 1}),
        ((-1, -3, -4, -8), {}),
    ],
    ids=["today", "older", "all"],
)
def test_what_is_set_where_glibc_refuses_some(monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...], settings: dict[str, int]) -> None:
    accepted: dict[int, int] = {}

    def mallopt(parameter: int, value: int) -> int:
        if parameter in refused:
            return 0
        accepted[parameter] = value
        return 1

    memalign = symbol()
    pretend(
        monkeypatch,
        SimpleNamespace(gnu_get_libc_version=None, posix_memalign=memalign),
        SimpleNamespace(posix_memalign=memalign, mallopt=mallopt),
    )
    tuning = vitkernels.tune_allocator()
    assert tuning.settings == settings
    assert sorted(accepted.values()) == sorted(settings.values())
    assert bool(tuning) == bool(settings)
    assert allocator.in_force() is tuning
    if settings:
        assert str(tuning) == "freed memory stays mapped: " + ", ".join(f"{name}={value}" for name, value in settings.items())
    else:
        assert str(tuning) == "allocator unchanged: mallopt refuses every setting"
