"""The builder on a small source tree of its own: what it compiles, what it leaves out, and what it says when it cannot."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from vitkernels import builder, proof

pytestmark = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")

PORTABLE = """
#include "names.h"
extern "C" __attribute__((visibility("default"))) const char* isas() { return kPrefix
#ifdef VITKERNELS_HAVE_BASELINE
  " baseline"
#endif
#ifdef VITKERNELS_HAVE_OTHER
  " other"
#endif
#ifdef VITKERNELS_HAVE_IMPOSSIBLE
  " impossible"
#endif
  ; }
"""
KERNEL = """
#define JOIN(a, b) a##b
#define NAME(isa) JOIN(kernel_, isa)
extern "C" __attribute__((visibility("default"))) int NAME(VITKERNELS_ISA)() { return LEVEL; }
"""
HOST = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&definition); }
"""
CUDA = """
__global__ void twice_kernel(float* x) { x[threadIdx.x] *= 2; }
extern "C" __attribute__((visibility("default"))) void twice(float* x) { twice_kernel<<<1, 32>>>(x); }
"""


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with a space in its path, as people have them; the builder looks there."""
    folder = tmp_path / "my sources"
    folder.mkdir()
    for name, text in {"portable.cpp": PORTABLE, "kernel.cpp": KERNEL, "host.cpp": HOST, "names.h": '#define kPrefix "isas:"\n'}.items():
        (folder / name).write_text(text)
    config = {
        "standard": "c++20",
        "defines": [],
        "flags": ["-O0", "-fPIC", "-fvisibility=hidden"],
        "cpu": {
            "library": builder.CPU_LIBRARY,
            "portable_sources": ["portable.cpp"],
            "kernel_sources": ["kernel.cpp"],
            "isas": {platform.machine(): {"baseline": ["-DLEVEL=1"], "other": ["-DLEVEL=2"], "impossible": ["-DLEVEL=3", "-mno-such-extension"]}},
        },
        "host": {"module": "_host", "sources": ["host.cpp"]},
        "cuda": {"library": builder.CUDA_LIBRARY, "sources": [], "architectures": ["sm_80", "sm_90a"]},
    }
    (folder / "build.json").write_text(json.dumps(config))
    monkeypatch.setattr(builder, "csrc_dir", lambda: folder)
    return folder


def _isas(library: Path, tmp_path: Path) -> str:
    """What the library says, read from a copy of its own name, since a library is loaded once for each name."""
    copy = shutil.copy(library, tmp_path / f"{library.stat().st_mtime_ns}.so")
    loaded = ctypes.CDLL(str(copy))
    loaded.isas.restype = ctypes.c_char_p
    assert (loaded.kernel_baseline(), loaded.kernel_other()) == (1, 2)
    return loaded.isas().decode()


def test_build_and_rebuild(csrc: Path, tmp_path: Path) -> None:
    said: list[str] = []
    products = builder.build(tmp_path / "out", log=said.append)
    assert [p.name for p in products] == [builder.CPU_LIBRARY, builder.host_module_name()]
    assert all(p.parent == tmp_path / "out" and p.is_file() for p in products)
    # The kernel was compiled once for each instruction set the compiler knows, and the dispatcher was told which those are.
    assert _isas(products[0], tmp_path) == "isas: baseline other"
    assert any("impossible" in line for line in said), said

    unchanged = products[0].stat().st_mtime_ns
    builder.build(tmp_path / "out", log=said.append)
    assert products[0].stat().st_mtime_ns == unchanged, "nothing changed, and it was built again"

    (csrc / "names.h").write_text('#define kPrefix "after a header changed:"\n')
    builder.build(tmp_path / "out", log=said.append)
    assert _isas(products[0], tmp_path) == "after a header changed: baseline other"


def test_the_cache_is_keyed_on_the_sources(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path / "cache"))
    before = builder.cache_library_dir()
    assert before.is_relative_to(tmp_path / "cache" / "native")
    assert builder.cache_library_dir() == before
    (csrc / "names.h").write_text('#define kPrefix "changed"\n')
    after = builder.cache_library_dir()
    assert after != before
    (csrc / "build.json").write_text((csrc / "build.json").read_text().replace("-O0", "-O1"))
    assert builder.cache_library_dir() not in (before, after)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITKERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert builder.cache_dir() == tmp_path / "vitkernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builder.cache_dir() == tmp_path / ".cache" / "vitkernels"


def test_the_compilers_words_are_passed_on(csrc: Path, tmp_path: Path) -> None:
    (csrc / "portable.cpp").write_text('#error "these very words"\n')
    with pytest.raises(builder.BuildError, match="these very words"):
        builder.build(tmp_path / "out", log=lambda _: None)
    assert not (tmp_path / "out" / builder.CPU_LIBRARY).exists()


def test_an_undefined_function_fails_the_link(csrc: Path, tmp_path: Path) -> None:
    """Not the first call on a user's machine."""
    with (csrc / "portable.cpp").open("a") as file:
        file.write(
            'extern "C" int nobody_defines_this(); extern "C" __attribute__((visibility("default"))) int f() { return nobody_defines_this(); }\n'
        )
    with pytest.raises(builder.BuildError, match="nobody_defines_this"):
        builder.build(tmp_path / "out", log=lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"PATH": "/nonexistent", "CXX": None}, r"no C\+\+ compiler"),
    ],
)
def test_a_missing_compiler_is_one_line(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], message: str
) -> None:
    monkeypatch.setattr(builder, "find_ninja", lambda: "ninja")
    for key, value in change.items():
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)
    with pytest.raises(builder.BuildError, match=message) as caught:
        builder.build(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_missing_torch_and_ninja_are_named(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(builder.BuildError, match="torch is not installed"):
        builder.build(tmp_path / "out")
    monkeypatch.setattr(builder, "find_torch", lambda: tmp_path)
    monkeypatch.setattr(builder.shutil, "which", lambda name, path=None: None)
    with pytest.raises(builder.BuildError, match="pip install ninja"):
        builder.build(tmp_path / "out")


def test_a_folder_that_cannot_be_written(csrc: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(builder.BuildError, match="cannot write the build"):
        builder.build(tmp_path / "out", log=lambda _: None)


@pytest.mark.skipif(builder.find_nvcc() is None, reason="nvcc is not installed")
def test_cuda_library(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with a CPU build of torch at hand: it asks for libtorch_cuda, so only a CUDA build of torch loads it."""
    (csrc / "kernel.cu").write_text(CUDA)
    config = json.loads((csrc / "build.json").read_text())
    config["cuda"]["sources"] = ["kernel.cu"]
    (csrc / "build.json").write_text(json.dumps(config))

    def built(**options: bool) -> list[str]:
        return [p.name for p in builder.build(tmp_path / "out", log=said.append, **options)]

    # Left to itself the builder makes what can be used here: a CPU build of torch loads no CUDA library.
    said: list[str] = []
    monkeypatch.delenv("VITKERNELS_CUDA", raising=False)
    cuda_torch = (builder.find_torch() / "lib" / "libtorch_cuda.so").is_file()
    assert (builder.CUDA_LIBRARY in built()) == cuda_torch
    monkeypatch.setenv("VITKERNELS_CUDA", "0")
    assert builder.CUDA_LIBRARY not in built()
    assert built(cuda=True, cpu=False) == [builder.CUDA_LIBRARY]
    monkeypatch.setenv("VITKERNELS_CUDA", "1")
    assert built() == [builder.CPU_LIBRARY, builder.host_module_name(), builder.CUDA_LIBRARY]
    library = tmp_path / "out" / builder.CUDA_LIBRARY
    for architecture in (b"sm_80", b"sm_90a"):
        assert architecture in library.read_bytes()
    if readelf := shutil.which("readelf"):
        dynamic = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True, check=True).stdout
        assert "[libtorch_cuda.so]" in dynamic and "[libtorch_cpu.so]" in dynamic and "cudart" not in dynamic
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    with pytest.raises(builder.BuildError, match="nvcc"):
        built()


def test_a_missing_nvcc_is_said_where_it_would_be_used(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CUDA build of torch the CUDA library is expected; without nvcc the rest is built and a line says what is missing."""
    config = json.loads((csrc / "build.json").read_text())
    config["cuda"]["sources"] = ["kernel.cu"]
    (csrc / "build.json").write_text(json.dumps(config))
    torch = tmp_path / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "lib" / "libtorch_cuda.so").touch()
    for folder in ("include", "lib"):
        for path in (builder.find_torch() / folder).iterdir():
            (torch / folder).mkdir(exist_ok=True)
            if not (torch / folder / path.name).exists():
                (torch / folder / path.name).symlink_to(path)
    monkeypatch.setattr(builder, "find_torch", lambda: torch)
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    monkeypatch.delenv("VITKERNELS_CUDA", raising=False)
    said: list[str] = []
    products = builder.build(tmp_path / "out", log=said.append)
    assert builder.CUDA_LIBRARY not in [p.name for p in products]
    assert any("CUDA library" in line and "nvcc" in line for line in said), said


def test_cuda_inputs_follow_includes(csrc: Path) -> None:
    """What a stamp of a CUDA kernel is keyed on: its source, what that includes, and nothing else."""
    config = json.loads((csrc / "build.json").read_text())
    config["cuda"]["sources"] = ["kernel.cu"]
    (csrc / "build.json").write_text(json.dumps(config))
    (csrc / "kernel.cu").write_text('#include "direct.cuh"\n#include <cmath>\n')
    (csrc / "direct.cuh").write_text('#include "indirect.h"\n#include "direct.cuh"\n')
    (csrc / "indirect.h").write_text("int x;\n")
    assert {path.name for path in builder.cuda_inputs()} == {"kernel.cu", "direct.cuh", "indirect.h"}
    before = proof.kernel_fingerprint.__wrapped__()
    (csrc / "indirect.h").write_text("int y;\n")
    assert proof.kernel_fingerprint.__wrapped__() != before
