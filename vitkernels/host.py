"""What the host's CPU can do, and what is computed on it for numpy arrays, from the compiled module ``vitkernels._host`` (pybind11, no torch)."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vitkernels import builder


@dataclass(frozen=True)
class IsaReport:
    """The instruction sets of the CPU kernels on this machine.

    Attributes:
        built_module: False if ``vitkernels._host`` is not built; everything below is then empty.
        detected: the best one that is compiled in and that this CPU runs at full speed.
        selected: the one in force: ``detected``, or the value of ``VITKERNELS_CPU_ISA``.
        built: all that are compiled in.
        usable: those of ``built`` that this CPU can run, the least capable first.
        forced: the value of ``VITKERNELS_CPU_ISA``, or ``None``.
        error: why ``forced`` is not honoured, or why there is nothing to report.
    """

    built_module: bool
    detected: str | None = None
    selected: str | None = None
    built: tuple[str, ...] = ()
    usable: tuple[str, ...] = ()
    forced: str | None = None
    error: str | None = None


@functools.cache
def _module() -> ModuleType | None:
    """The compiled module, from beside the package or from the user's cache; ``None`` where it was not built."""
    for folder in (builder.package_library_dir(), builder.cache_library_dir()):
        path = folder / builder.host_module_name()
        spec = importlib.util.spec_from_file_location("vitkernels._host", path) if path.is_file() else None
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


def why_not() -> str | None:
    """Why the compiled module cannot be used; ``None`` if it can."""
    return None if _module() is not None else "vitkernels._host is not built here: `vitkernels build` compiles it"


def forget() -> None:
    """Look for the module again, after a build in this process."""
    _module.cache_clear()
    compiled.cache_clear()


def cpu_features() -> dict[str, bool]:
    """The CPU features behind the choice of instruction set, by name (``avx2``, ``avx512f``, ...). Empty where the module is not built."""
    module = _module()
    return {} if module is None else dict(module.cpu_features())


def isa_report() -> IsaReport:
    """Which instruction sets the CPU kernels hold, which of them this CPU can run, and which one is in force."""
    forced = os.environ.get("VITKERNELS_CPU_ISA") or None
    module = _module()
    if module is None:
        return IsaReport(False, forced=forced, error=why_not())
    report = module.isa_report()
    return IsaReport(
        True, report["detected"], report["selected"], tuple(report["built"]), tuple(report["usable"]), forced=forced, error=report["error"]
    )


@functools.cache
def compiled(name: str) -> Callable[..., Any] | None:
    """A compiled function by its name, ``None`` where the module is not built. What each takes and returns says ``csrc/host/module.cpp``.

    - ``first_fit``, ``best_fit_decreasing``: the bin packers behind :func:`vitkernels.navit.pack`.
    - ``assign``, ``assign_all``, ``pairs_of``: the linear sum assignment behind :func:`vitkernels.ops.linear_sum_assignment`, and its pairs.
    - ``unchanged``, ``marks``: of :mod:`vitkernels.nn._derived`.

    Nothing is checked in them that the function to call has checked.
    """
    return getattr(_module(), name, None)
