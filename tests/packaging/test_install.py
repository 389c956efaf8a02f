"""Installing: an isolated build without torch gives a pure Python package that works and says what it lacks; one with torch carries the libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from vitkernels import builder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout")

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a user clones: no build folder, no compiled file."""
    folder = tmp_path_factory.mktemp("checkout") / "vitkernels"
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True)
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    else:
        ignored = shutil.ignore_patterns(".venv", ".git", "build", "dist", "_lib", "*.egg-info", "__pycache__", ".*_cache", "*.so")
        shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with setuptools and nothing else: what an isolated build sees, made without a network."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    spec = importlib.util.find_spec("setuptools")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("setuptools is not installed here")
    source = Path(spec.submodule_search_locations[0])
    for path in [source, source.parent / "_distutils_hack", *source.parent.glob("setuptools-*.dist-info")]:
        (site / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    missing = subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode
    assert missing != 0, "this Python must not find torch"
    return python


def _build(python: Path | str, hook: str, checkout: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a build hook as pip does, in the source folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("VITKERNELS_NATIVE", "PYTHONPATH")} | environment
    return subprocess.run([str(python), "-c", BUILD, hook, str(out)], cwd=checkout, env=env, capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="session")
def pure_wheel(checkout: Path, bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a checkout: sdist -> wheel, both without torch."""
    out = tmp_path_factory.mktemp("dist")
    done = _build(bare_python, "build_sdist", checkout, out)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(out)
    source = next(path for path in out.iterdir() if path.is_dir())
    done = _build(bare_python, "build_wheel", source, out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pure Python build (torch is not installed here" in done.stderr, "the build must say what it left out and why"
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def pure_install(pure_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into a folder, to be put on PYTHONPATH before anything else."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(target)
    return target


def test_pure_wheel(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(pure_wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert "vitkernels/_csrc/build.json" in names and "vitkernels/py.typed" in names
    config = json.loads((builder.csrc_dir() / "build.json").read_text())
    sources = [s for part in (config["cpu"]["portable_sources"], config["cpu"]["kernel_sources"], config["host"]["sources"]) for s in part]
    assert not [s for s in sources if f"vitkernels/_csrc/{s}" not in names], "`vitkernels build` could not compile from this wheel"
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "vitkernels").rglob("*.py")}
    assert not [p for p in packages if not any(name.startswith(f"{p}/") for name in names)], "a package was left out"
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_pure_install_works_and_says_what_is_missing(pure_install: Path, run_python, tmp_path: Path) -> None:
    code = """
import torch, vitkernels
from vitkernels import builder, host, native
print(vitkernels.__file__)
print(builder.csrc_dir())
q, k, v = torch.randn(2, 1, 4, 9), torch.randn(2, 8, 4, 9), torch.randn(2, 8, 4, 9, requires_grad=True)
y = vitkernels.ops.separable_attention(q, k, v)
want = torch.relu(v) * (k * torch.softmax(q, -1)).sum(-1, keepdim=True)
torch.testing.assert_close(y, want)
y.sum().backward()
print(vitkernels.explain(vitkernels.ops.separable_attention, q, k, v).chosen, native.find(builder.CPU_LIBRARY), host.isa_report().built_module)
try:
    with vitkernels.backend("native"):
        vitkernels.ops.separable_attention(q, k, v)
except vitkernels.BackendUnavailable as error:
    print(error)
"""
    environment = {
        "PYTHONPATH": str(pure_install),
        "VITKERNELS_CACHE": str(tmp_path / "cache"),
        "VITKERNELS_BACKEND": None,
        "VITKERNELS_CPU_ISA": None,
    }
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    where, csrc, state, error = done.stdout.strip().splitlines()
    assert Path(where).parent == pure_install / "vitkernels" and Path(csrc) == pure_install / "vitkernels" / "_csrc"
    assert state == "reference None False"
    assert "not built" in error and "vitkernels build" in error

    done = run_python("from vitkernels.cli import main; main(['doctor'])", **environment)
    assert done.returncode == 0, done.stderr
    assert "vitkernels build" in done.stdout and "not built" in " ".join(done.stdout.split()), done.stdout


def test_native_can_be_required_or_forbidden(checkout: Path, bare_python: Path, tmp_path: Path) -> None:
    required = _build(bare_python, "build_wheel", checkout, tmp_path, VITKERNELS_NATIVE="1")
    assert required.returncode != 0
    assert "VITKERNELS_NATIVE=1, but torch is not installed" in required.stderr
    assert not list(tmp_path.glob("*.whl"))
    wrong = _build(bare_python, "build_wheel", checkout, tmp_path, VITKERNELS_NATIVE="yes")
    assert wrong.returncode != 0 and "VITKERNELS_NATIVE is 'yes'; it must be 0" in wrong.stderr
    forbidden = _build(sys.executable, "build_wheel", checkout, tmp_path, VITKERNELS_NATIVE="0")
    assert forbidden.returncode == 0, forbidden.stderr[-2000:]
    assert [path.name.endswith("py3-none-any.whl") for path in tmp_path.glob("*.whl")] == [True]


def test_a_build_with_torch_carries_the_libraries(checkout: Path, tmp_path: Path, run_python) -> None:
    """With the kernels left out and no optimisation, to be quick: what is looked at is where the files go and what the wheel is called."""
    try:
        builder.check()
    except builder.BuildError as error:
        pytest.skip(str(error))
    source = tmp_path / "source"
    shutil.copytree(checkout, source, ignore=shutil.ignore_patterns("build"))
    config = json.loads((source / "csrc" / "build.json").read_text())
    config["flags"] = ["-O0", "-fPIC"]
    config["cpu"] |= {"portable_sources": ["common/isa.cpp"], "kernel_sources": []}
    (source / "csrc" / "build.json").write_text(json.dumps(config))
    done = _build(sys.executable, "build_wheel", source, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    assert "none-any" not in wheel.name, "a wheel with compiled code must be tagged for its platform"
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"vitkernels/_lib/{builder.CPU_LIBRARY}", f"vitkernels/_lib/{builder.host_module_name()}"} <= set(names)
    assert not [name for name in names if name.endswith((".o", ".ninja")) or "/objects/" in name]
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = run_python("from vitkernels import host; r = host.isa_report(); print(r.built_module, r.selected in r.usable)", PYTHONPATH=str(site))
    assert done.stdout.strip() == "True True", done.stderr
