"""The compiled libraries: found, loaded on first use, never required.

Two shared objects can exist: ``libvitkernels_cpu.so`` and, where it was built and a GPU is present, ``libvitkernels_cuda.so``. Both are looked for
beside the package (a wheel or ``setup.py``) and then in the user's cache (``vitkernels build``). Importing vitkernels loads neither.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import torch

from vitkernels import builder

ISA_VARIABLE = "VITKERNELS_CPU_ISA"


@functools.cache
def has_module(name: str) -> bool:
    """True if a module can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def search_path() -> list[Path]:
    """Where the libraries are looked for, in order."""
    return [builder.package_library_dir(), builder.cache_library_dir()]


def find(library: str) -> Path | None:
    """The path of a compiled library, or ``None`` where it was not built."""
    for folder in search_path():
        if (path := folder / library).is_file():
            return path
    return None


@functools.cache
def _load(library: str) -> str | None:
    """Load one library; ``None`` on success, else why it is not there."""
    path = find(library)
    if path is None:
        return f"{library} is not built here: `vitkernels build` compiles it (needs a C++20 compiler and ninja)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load: {error}"
    if library == builder.CPU_LIBRARY:
        try:
            torch.ops.vitkernels.cpu_isa()
        except RuntimeError as error:  # VITKERNELS_CPU_ISA names a set that is unknown or that cannot run here
            return str(error).splitlines()[0]
    return None


def why_not() -> str | None:
    """Why the CPU library cannot be used; ``None`` once it is loaded."""
    return _load(builder.CPU_LIBRARY)


def why_not_cuda() -> str | None:
    """Why the CUDA library cannot be used; ``None`` once it is loaded."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major != 8 and (major, minor) != (9, 0):  # csrc/build.json: machine code for sm_80 and sm_90a, no PTX
        return f"the CUDA C++ kernels are built for compute capability 8.x and 9.0; this GPU has {major}.{minor}"
    return _load(builder.CUDA_LIBRARY)


def forget() -> None:
    """Look for the libraries again, after a build in this process. A library that is already loaded stays loaded."""
    _load.cache_clear()


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels run with (``avx512_bf16``, ``avx512``, ``avx2``, ``baseline``), or ``None`` without the library.

    ``VITKERNELS_CPU_ISA`` forces a lower one; it is read once, when the library is loaded.
    """
    if why_not() is not None:
        return None
    return str(torch.ops.vitkernels.cpu_isa())


def requested_isa() -> str | None:
    """The value of ``VITKERNELS_CPU_ISA``, or ``None``."""
    return os.environ.get(ISA_VARIABLE)
