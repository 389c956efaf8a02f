"""Compile the native libraries with ninja: one way to build, for setup.py, for ``vitkernels build`` and for tests.

What is compiled, and with which flags, is written in ``csrc/build.json`` and nowhere else. This module uses the standard library only and never
imports torch, so that setup.py can load it by its path where nothing is installed yet.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CPU_LIBRARY = "libvitkernels_cpu.so"
CUDA_LIBRARY = "libvitkernels_cuda.so"

_PACKAGE = Path(__file__).resolve().parent
_COMPILERS = ("c++", "g++", "clang++")


class BuildError(RuntimeError):
    """The native libraries cannot be built here. The message says why in one line, or ends with the compiler's own words."""


def csrc_dir() -> Path:
    """The C++ sources: the copy inside an installed package, else those of the checkout.

    Raises:
        BuildError: neither is there.
    """
    for folder in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"):
        if (folder / "build.json").is_file():
            return folder
    raise BuildError("the C++ sources are not part of this install")


def package_library_dir() -> Path:
    """Where a wheel or an editable install keeps the libraries: beside the package."""
    return _PACKAGE / "_lib"


def cache_library_dir() -> Path:
    """Where ``vitkernels build`` puts the libraries: a folder of the user's cache, named by a hash of all that goes into them.

    After an upgrade the name changes, so a library built from older sources is never loaded. ``VITKERNELS_CACHE`` moves the cache.
    """
    return cache_dir() / "native" / _key()


def cache_dir() -> Path:
    """The user's cache folder for vitkernels: ``$VITKERNELS_CACHE``, else ``$XDG_CACHE_HOME/vitkernels``, else ``~/.cache/vitkernels``."""
    if chosen := os.environ.get("VITKERNELS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitkernels"


def host_module_name() -> str:
    """The file name of the compiled ``vitkernels._host`` for this Python."""
    return "_host" + str(sysconfig.get_config_var("EXT_SUFFIX"))


def settings() -> dict[str, Any]:
    """``csrc/build.json`` as a dictionary."""
    return json.loads((csrc_dir() / "build.json").read_text())


def _key() -> str:
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()}".encode())
    try:
        root = csrc_dir()
    except BuildError:
        return digest.hexdigest()[:16]
    for path in sorted(p for p in root.rglob("*") if p.is_file() and "tests" not in p.relative_to(root).parts):
        digest.update(f"\0{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cuda_inputs() -> list[Path]:
    """What the CUDA library is made from: its sources and every header of ours that they include, directly or not. Empty without the C++ sources."""
    try:
        root = csrc_dir()
    except BuildError:
        return []
    found: set[Path] = set()
    waiting = [root / source for source in settings()["cuda"]["sources"]]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.add(path)
            waiting += [root / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)]
    return sorted(found)


def find_compiler() -> str:
    """The C++ compiler: ``$CXX``, else the first of c++, g++, clang++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildError(f"the C++ compiler named by CXX is not there: {asked}" if asked else f"no C++ compiler ({', '.join(_COMPILERS)}) on the PATH")


def find_ninja() -> str:
    """The ninja executable: on the PATH, beside this Python, or in the ``ninja`` package.

    Raises:
        BuildError: there is none.
    """
    beside = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    if found := shutil.which("ninja", path=os.pathsep.join(beside)):
        return found
    spec = importlib.util.find_spec("ninja")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if found := shutil.which("ninja", path=str(Path(folder) / "data" / "bin")):
            return found
    raise BuildError("no ninja: `pip install ninja` brings it")


def find_torch() -> Path:
    """The folder of the torch package, found without importing it.

    Raises:
        BuildError: torch is not installed, or too old to have the stable ABI's headers.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed here, and the native libraries are compiled against its headers")
    root = Path(spec.submodule_search_locations[0])
    if not (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"the torch at {root} has no stable ABI headers: torch 2.11 or later is needed")
    return root


def find_nvcc() -> str | None:
    """The CUDA compiler, or ``None``: on the PATH, else under ``$CUDA_HOME`` or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def check() -> None:
    """Find out whether anything can be built here, without building.

    Raises:
        BuildError: torch, a C++20 compiler or ninja is missing; the message says which.
    """
    find_torch()
    find_ninja()
    csrc_dir()
    compiler, standard = find_compiler(), settings()["standard"]
    if not _accepts(compiler, (f"-std={standard}",)):
        raise BuildError(f"{compiler} cannot compile {standard}")


@functools.cache
def _accepts(compiler: str, flags: tuple[str, ...]) -> bool:
    """True if the compiler takes the flags: an older one may not know a standard or an instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return 0; }\n")
        command = [compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def _host_includes(torch: Path) -> list[Path] | None:
    """The include folders of Python and pybind11 (its own package, else torch's copy), or ``None`` if Python's headers are not installed."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        return None
    spec = importlib.util.find_spec("pybind11")
    candidates = [Path(folder) / "include" for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in [*candidates, torch / "include"]:
        if (folder / "pybind11" / "pybind11.h").is_file():
            return [python, folder]
    return None


def _escape(text: str | Path) -> str:
    """Quote a path for a build.ninja file."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quote(words: Iterable[str]) -> str:
    """Join command-line words for a ninja variable: the shell's quoting, then ninja's."""
    return shlex.join(words).replace("$", "$$")


class _Ninja:
    """A build.ninja in the making: rules are fixed, edges are added."""

    def __init__(self, compiler: str, nvcc: str | None, csrc: Path) -> None:
        self._csrc = csrc
        self._lines = [
            "ninja_required_version = 1.5",
            f"cxx = {_escape(compiler)}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  command = $cxx -shared -o $out $in $flags",
            "  description = link $out",
        ]
        if nvcc is not None:
            self._lines += [
                f"nvcc = {_escape(nvcc)}",
                "rule cuda",
                "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = nvcc $out",
                "rule link_cuda",
                "  command = $nvcc -shared -cudart static -o $out $in $flags",
                "  description = link $out",
                "rule stub",
                "  command = $cxx -shared -Wl,-soname,$out -x c++ /dev/null -o $out",
            ]
        self._seen: set[str] = set()

    def object(self, source: str, flags: list[str], suffix: str = "", rule: str = "compile") -> str:
        """Compile ``source`` (relative to csrc) and return the object's name."""
        name = f"{source}{suffix}.o"
        if name not in self._seen:
            self._seen.add(name)
            self._lines += [f"build {_escape(name)}: {rule} {_escape(self._csrc / source)}", f"  flags = {_quote(flags)}"]
        return name

    def link(self, name: str, objects: list[str], flags: list[str], rule: str = "link", needs: str = "") -> None:
        """Link ``objects`` into a shared object."""
        implicit = f" | {needs}" if needs else ""
        self._lines += [f"build {_escape(name)}: {rule} {' '.join(map(_escape, objects))}{implicit}", f"  flags = {_quote(flags)}"]

    def stub(self, name: str) -> None:
        """An empty shared object with that soname, for the linker to record as needed."""
        self._lines.append(f"build {name}: stub")

    def write(self, path: Path) -> None:
        """Write the file, leaving it alone if nothing changed."""
        text = "\n".join([*self._lines, ""])
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def _known_isas(config: dict[str, Any], compiler: str, log: Callable[[str], None]) -> dict[str, list[str]]:
    """The instruction sets of this machine's architecture that the compiler can compile for, with their flags."""
    isas = config["cpu"]["isas"].get(platform.machine(), {"baseline": []})
    known = {}
    for name, flags in isas.items():
        if _accepts(compiler, tuple(flags)):
            known[name] = flags
        else:
            log(f"left out {name}: {compiler} does not know its flags")
    return known


def build(
    out_dir: Path | str,
    verbose: bool = False,
    cuda: bool | None = None,
    *,
    cpu: bool = True,
    build_dir: Path | str | None = None,
    host_dir: Path | str | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Path]:
    """Compile everything that can be compiled here into ``out_dir``.

    Args:
        out_dir: gets ``libvitkernels_cpu.so``, and ``libvitkernels_cuda.so`` where there is something to put into it.
        verbose: show ninja's commands and output.
        cuda: build the CUDA library; ``None`` builds it if nvcc is found and torch is a CUDA build, as only such a torch loads it.
            ``VITKERNELS_CUDA=1`` makes that "in any case", ``VITKERNELS_CUDA=0`` "never".
        cpu: build the CPU library and the host module, too.
        build_dir: objects and build.ninja, kept for the next, incremental build. Default: ``out_dir/objects``.
        host_dir: gets the ``_host`` module. Default: ``out_dir``.
        log: is told what was left out and why. Default: a line on stderr.

    Returns:
        The files that now stand in ``out_dir`` and ``host_dir``.

    Raises:
        BuildError: a compiler, ninja or torch is missing, or the compiler failed (the message ends with its output).
    """
    check()
    log = log or (lambda message: print(f"vitkernels: {message}", file=sys.stderr))
    compiler, ninja, torch, csrc, config = find_compiler(), find_ninja(), find_torch(), csrc_dir(), settings()
    nvcc = _wanted_nvcc(config, cuda, torch, log)
    out_dir = Path(out_dir).resolve()
    build_dir = Path(build_dir).resolve() if build_dir else out_dir / "objects"
    host_dir = Path(host_dir).resolve() if host_dir else out_dir

    isas = _known_isas(config, compiler, log) if cpu else {}
    common = [f"-std={config['standard']}", *config["flags"], *(f"-D{d}" for d in config["defines"])]
    common += [f"-DVITKERNELS_HAVE_{isa.upper()}" for isa in isas]
    common += [f"-I{csrc}", "-isystem", str(torch / "include")]

    file = _Ninja(compiler, nvcc, csrc)
    products: dict[str, Path] = {}
    if cpu:
        _add_cpu(file, config, common, torch, isas)
        products[CPU_LIBRARY] = out_dir
        if _add_host(file, config, common, torch):
            products[host_module_name()] = host_dir
        else:
            log("left out the host module: Python's development headers are not installed")
    if nvcc is not None:
        _add_cuda(file, config, common, torch)
        products[CUDA_LIBRARY] = out_dir

    try:
        for folder in (build_dir, out_dir, host_dir):
            folder.mkdir(parents=True, exist_ok=True)
        # Two processes may build into one cache; the second then finds nothing left to do.
        with (build_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file.write(build_dir / "build.ninja")
            _run_ninja([ninja, *(["-v"] if verbose else []), *products], build_dir, verbose)
            return [_install(build_dir / name, folder / name) for name, folder in products.items()]
    except OSError as error:
        raise BuildError(f"cannot write the build: {error}") from error


def _wanted_nvcc(config: dict[str, Any], cuda: bool | None, torch: Path, log: Callable[[str], None]) -> str | None:
    """The CUDA compiler if the CUDA library is to be built, else ``None``."""
    variable = os.environ.get("VITKERNELS_CUDA")
    if cuda is None and variable in ("0", "1"):
        cuda = variable == "1"
    if cuda is None and not (torch / "lib" / "libtorch_cuda.so").is_file():
        return None
    if cuda is False or not config["cuda"]["sources"]:
        return None
    nvcc = find_nvcc()
    if nvcc is None and cuda is None:
        log("left out the CUDA library: nvcc is not on the PATH, under CUDA_HOME or in /usr/local/cuda")
    if nvcc is None and cuda:
        raise BuildError("the CUDA library was asked for and nvcc is not on the PATH, under CUDA_HOME or in /usr/local/cuda")
    return nvcc


def _add_cpu(file: _Ninja, config: dict[str, Any], common: list[str], torch: Path, isas: dict[str, list[str]]) -> None:
    """Add the CPU library."""
    objects = [file.object(source, common) for source in config["cpu"]["portable_sources"]]
    # Baseline comes first on the linker's command line: should two objects hold the same inline function, the linker keeps the first.
    for isa, flags in isas.items():
        objects += [file.object(source, [*common, f"-DVITKERNELS_ISA={isa}", *flags], f".{isa}") for source in config["cpu"]["kernel_sources"]]
    # No path of this machine's torch goes into the library: torch is loaded before it, by its soname.
    file.link(CPU_LIBRARY, objects, ["-Wl,-z,defs", "-Wl,--as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"])


def _add_host(file: _Ninja, config: dict[str, Any], common: list[str], torch: Path) -> bool:
    """Add the host module; False where Python's headers are missing."""
    folders = _host_includes(torch)
    if folders is None:
        return False
    includes = [word for folder in folders for word in ("-isystem", str(folder))]
    shared = set(config["cpu"]["portable_sources"])
    host = [file.object(source, common if source in shared else [*common, *includes]) for source in config["host"]["sources"]]
    file.link(host_module_name(), host, [])
    return True


def _add_cuda(file: _Ninja, config: dict[str, Any], common: list[str], torch: Path) -> None:
    """Add the CUDA library. It needs no CUDA build of torch: it is linked against a stub of libtorch_cuda and resolved when it is loaded."""
    host_flags = [flag for flag in common if flag.startswith(("-f", "-W"))]
    flags = [flag for flag in common if flag not in host_flags]
    flags += ["-DUSE_CUDA", "-cudart", "static", "--threads", "2", "-Xcompiler", ",".join(host_flags)]
    architectures = [f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in config["cuda"]["architectures"]]
    flags += architectures
    objects = [file.object(source, flags, rule="cuda") for source in config["cuda"]["sources"]]
    file.stub("libtorch_cuda.so")
    libraries = [
        *architectures,
        "-Xlinker",
        "--no-as-needed,--unresolved-symbols=ignore-all",
        "-L.",
        f"-L{torch / 'lib'}",
        "-ltorch_cpu",
        "-ltorch_cuda",
    ]
    file.link(CUDA_LIBRARY, objects, libraries, rule="link_cuda", needs="libtorch_cuda.so")


def _run_ninja(command: list[str], folder: Path, verbose: bool) -> None:
    result = subprocess.run(command, cwd=folder, stdout=None if verbose else subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise BuildError("the native build failed" + (f":\n{result.stdout.strip()}" if result.stdout else ", see the output above"))


def _install(source: Path, target: Path) -> Path:
    """Put a finished file in its place in one step: a process that has the old one loaded, or looks just now, never sees half of it."""
    if not target.is_file() or target.stat().st_mtime_ns != source.stat().st_mtime_ns:
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(source, scratch)
        scratch.replace(target)
    return target
