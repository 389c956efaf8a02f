"""Build hooks for setuptools; everything declarative is in pyproject.toml.

Where a C++ compiler, ninja and torch are at hand (``pip install --no-build-isolation .``) the native libraries go into the wheel. Where one is
missing, as in an isolated build, the wheel is pure Python and works: the reference and the Triton backend are there, and ``vitkernels build`` adds
the rest. ``VITKERNELS_NATIVE=0`` asks for pure Python, ``VITKERNELS_NATIVE=1`` fails instead of falling back to it. No GPU is looked for and torch
is not imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

if int(setuptools_version.split(".")[0]) < 77:
    sys.exit(f"vitkernels: setuptools {setuptools_version} is too old for this build: `pip install --upgrade setuptools` (77 or later)")


def _load_builder():
    spec = importlib.util.spec_from_file_location("vitkernels_builder", ROOT / "vitkernels" / "builder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = _load_builder()


def _native_wanted() -> bool:
    """Whether this build compiles the native libraries, with one line on stderr if it does not."""
    choice = os.environ.get("VITKERNELS_NATIVE", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"VITKERNELS_NATIVE is {choice!r}; it must be 0 (pure Python), 1 (native or fail) or unset")
    if choice == "0":
        return False
    try:
        builder.check()
    except builder.BuildError as error:
        if choice == "1":
            sys.exit(f"vitkernels: VITKERNELS_NATIVE=1, but {error}")
        print(f"vitkernels: pure Python build ({error}); `vitkernels build` can add the native libraries later", file=sys.stderr)
        return False
    return True


class BuildSources(build_py):
    """Put the C++ sources into the package, for ``vitkernels build``. An editable install finds them in the checkout."""

    def run(self) -> None:
        """Copy the Python files, then the C++ sources."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "vitkernels" / "_csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target, ignore=shutil.ignore_patterns("tests"))


class BuildNative(build_ext):
    """Compile the libraries with ninja: into the wheel, or beside the package for an editable install."""

    def run(self) -> None:
        """Build, or stop the installation with one clear message."""
        in_place = self.inplace or self.editable_mode
        package = ROOT / "vitkernels" if in_place else Path(self.build_lib).resolve() / "vitkernels"
        objects = ROOT / "build" / "native" if in_place else Path(self.build_temp)
        try:
            builder.build(package / "_lib", build_dir=objects)
        except builder.BuildError as error:
            sys.exit(f"vitkernels: {error}\nVITKERNELS_NATIVE=0 installs the pure Python package instead.")

    def get_outputs(self) -> list[str]:
        """Nothing: setuptools has no file of its own to account for."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing: an editable install loads the libraries from the checkout."""
        return {}


# The extension names no source: it makes setuptools run BuildNative and tag the wheel for this platform.
setup(
    ext_modules=[Extension("vitkernels._lib._host", sources=[])] if _native_wanted() else [],
    cmdclass={"build_py": BuildSources, "build_ext": BuildNative},
)
