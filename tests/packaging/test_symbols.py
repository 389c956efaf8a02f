"""The CPU library's symbols: it must load under every torch from 2.11 on, and never hand a CPU code that it cannot run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vitkernels import builder

NM = shutil.which("nm")
pytestmark = pytest.mark.skipif(NM is None, reason="nm (binutils) is not installed")


def _symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, demangled name) of each symbol."""
    lines = subprocess.run([str(NM), "-C", *options, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    matches = (re.match(r"[0-9a-f]*\s+([A-Za-z])\s+(.*)", line) for line in lines)
    return [(match[1], match[2]) for match in matches if match]


def test_only_the_stable_abi_is_used(cpu_library: Path) -> None:
    undefined = [name for _, name in _symbols(cpu_library, "-D", "--undefined-only")]
    shims = [name for name in undefined if name.startswith(("aoti_torch_", "torch_"))]
    assert shims, "no shim of the stable ABI is used: this is not the library, or nm could not read it"
    # Whatever is not a C shim must be the C++ runtime's or the C library's: those carry a version (GLIBC_2.14, CXXABI_1.3) or are the linker's own.
    tied = [n for n in undefined if re.search(r"\b(c10|at|torch|caffe2)::", n)]
    assert not tied, f"these tie the library to one torch: {tied}"


def test_no_path_of_the_building_machine(cpu_library: Path) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    dynamic = subprocess.run([readelf, "-d", str(cpu_library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in dynamic  # else it would load without torch, and fail at the first call
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert not re.search(r"NEEDED.*\[/", dynamic)


@pytest.fixture(scope="module")
def objects(cpu_library: Path) -> list[Path]:
    """The object files of the build that made the library: ``<source>.o``, and ``<source>.<instruction set>.o`` for kernels."""
    for folder in (cpu_library.parent / "objects", builder.csrc_dir().parent / "build" / "native"):
        built = folder / builder.CPU_LIBRARY
        if built.is_file() and built.read_bytes() == cpu_library.read_bytes():
            return sorted(path for path in folder.rglob("*.o") if "host" not in path.parts)
    pytest.skip("the objects of this library are not kept here (it came in a wheel)")


def _isa(path: Path) -> str | None:
    """The instruction set a kernel's object was compiled for; ``None`` for a portable one."""
    part = path.name.split(".")[-2]
    return None if part == "cpp" else part


def test_kernels_share_no_code_between_instruction_sets(objects: list[Path]) -> None:
    """The linker keeps one copy of an inline function that two objects define: it must never be one compiled for a newer CPU.

    So whatever such an object lets the linker see is in the namespace of its instruction set. ``DW.ref.*`` is data: a pointer.
    """
    kernels = [path for path in objects if _isa(path)]
    assert "baseline" in map(_isa, kernels)
    for path in kernels:
        own = f"vitkernels::{_isa(path)}::"
        visible = [n for kind, n in _symbols(path, "--defined-only") if kind in "WVTBDRuSG" and not n.startswith("DW.ref.")]
        assert any(own in name for name in visible), f"{path.name} defines nothing of its own"
        foreign = [name for name in visible if own not in name]
        assert not foreign, f"{path.name} shares {foreign[:5]}"


def test_portable_objects_hold_no_wide_instruction(objects: list[Path]) -> None:
    """They run on every CPU, before anything is chosen; and so does the baseline kernel."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump (binutils) is not installed")

    def wide(path: Path) -> bool:
        code = subprocess.run([objdump, "-d", str(path)], capture_output=True, text=True, check=True).stdout
        return re.search(r"%[yz]mm\d", code) is not None

    assert not [path.name for path in objects if _isa(path) in (None, "baseline") and wide(path)]
    # The same look finds them where they belong.
    assert all(wide(path) for path in objects if _isa(path) in ("avx2", "avx512", "avx512_bf16"))
