"""Keep freed activation memory: :func:`tune_allocator`, an opt-in for the whole process."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The numbers of <malloc.h>, which are glibc's ABI.
_PARAMETERS = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4, "M_ARENA_MAX": -8}
# No activation is as large as this; what is (a data set, a table of weights) is still mapped by itself and given back when it is freed.
_MMAP_THRESHOLD = 1 << 30


@dataclass(frozen=True)
class AllocatorTuning:
    """What :func:`tune_allocator` did. True where it set something; printing it says what, or why nothing.

    Attributes:
        settings: the settings of glibc's malloc that are now in force, by their name in ``mallopt(3)``.
        reason: why nothing was set; empty if something was.
    """

    settings: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.settings)

    def __str__(self) -> str:
        if not self:
            return f"allocator unchanged: {self.reason}"
        return "freed memory stays mapped: " + ", ".join(f"{name}={value}" for name, value in self.settings.items())


_in_force = AllocatorTuning(reason="tune_allocator was not called")


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _glibc() -> tuple[Any, str]:
    """The C library, and why its settings would change nothing (empty if they would)."""
    if sys.platform != "linux":
        return None, f"glibc's malloc is what it tunes, and this is {sys.platform}"
    process = ctypes.CDLL(None)
    if not hasattr(process, "gnu_get_libc_version"):
        return None, "the C library is not glibc"
    libc = ctypes.CDLL("libc.so.6")
    # torch allocates tensors by posix_memalign, and takes the first that the process has: a preloaded one, or one the interpreter is linked to.
    if _address(process.posix_memalign) != _address(libc.posix_memalign):
        return None, "another malloc (jemalloc, tcmalloc, mimalloc, a sanitizer's) stands in for glibc's, and has settings of its own"
    return libc, ""


def tune_allocator() -> AllocatorTuning:
    """Tell the C library's malloc to keep freed memory mapped, so that large activations are not faulted in anew at each call.

    By default glibc maps a block of more than 32 MiB (128 KiB, until larger ones have been freed) by itself and unmaps it when it is freed, and
    hands back what is free at the end of its heap. The next call of a model then takes a page fault, and the kernel clears 4 KiB, for every page of
    the same activations. Writing to fresh pages takes several times as long as to pages that are there.

    What it sets, for the whole process and for everything in it that calls malloc:

    - ``M_MMAP_THRESHOLD`` to 1 GiB: smaller blocks come from the heap. Where glibc refuses that (older ones allow 32 MiB), ``M_MMAP_MAX`` to 0: no
      block is mapped by itself.
    - ``M_TRIM_THRESHOLD`` to -1: the heap never shrinks by itself.
    - ``M_ARENA_MAX`` to 1: threads share that heap. An arena of a thread's own is made of pieces of 64 MiB, so that larger blocks would be mapped
      and unmapped as before, and what one thread has freed would not serve another.

    What it costs: the process keeps its peak memory until it ends, and threads that allocate at the same time wait for each other, small blocks from
    a thread's cache excepted. Do not use it where memory is shared with others and peaks are rare (a model that is loaded, run once and dropped;
    batches of very different sizes), or where many threads allocate without computing much. It gains nothing on a GPU, and little where
    activations are small: measure, as ``benchmarks/allocator.py`` does.

    Call it early: a thread that has an arena keeps it. Calling it again does no harm. Within the process it cannot be undone: ``mallopt`` takes other
    numbers, but not the threshold that adapts to what is freed, which is the default. ``malloc_trim(0)`` of the C library still gives back what is
    free at that moment.

    Returns:
        An :class:`AllocatorTuning`: what was set; or the reason why nothing was, where the C library is not glibc or another malloc has
        taken its place. It does not raise.
    """
    global _in_force
    libc, reason = _glibc()
    if reason:
        return AllocatorTuning(reason=reason)
    settings: dict[str, int] = {}

    def put(name: str, value: int) -> bool:
        accepted = bool(libc.mallopt(_PARAMETERS[name], value))
        if accepted:
            settings[name] = value
        return accepted

    if not put("M_MMAP_THRESHOLD", _MMAP_THRESHOLD):
        put("M_MMAP_MAX", 0)
    put("M_TRIM_THRESHOLD", -1)
    put("M_ARENA_MAX", 1)
    _in_force = AllocatorTuning(settings, "" if settings else "mallopt refuses every setting")
    return _in_force


def in_force() -> AllocatorTuning:
    """What the last call of :func:`tune_allocator` left in force in this process."""
    return _in_force
