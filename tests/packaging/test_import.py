"""``import vitkernels`` is cheap and takes nothing along."""

from __future__ import annotations

from vitkernels import builder


def test_import_brings_no_zoo_and_compiles_nothing(run_python) -> None:
    """Neither a model zoo nor the command line's libraries are imported, no kernel is compiled, no library loaded, no GPU woken."""
    code = """
import sys
import torch
try:
    from triton.runtime.jit import JITFunction
    JITFunction.run = JITFunction.warmup = lambda *a, **k: sys.exit("a kernel was compiled")
except ImportError:
    pass
before = set(sys.modules)
import vitkernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"timm", "transformers", "vit_pytorch", "torchvision", "pandas", "matplotlib", "click", "rich"}))
print(sys.platform == "linux" and "libvitkernels" in open("/proc/self/maps").read(), torch.cuda.is_initialized())
"""
    done = run_python(code)
    assert done.stdout.splitlines() == ["[]", "False False"], done.stdout + done.stderr


def test_without_triton(run_python) -> None:
    """Triton exists for Linux only: everything else works without it."""
    code = """
import sys
sys.modules["triton"] = None  # "import triton" now raises ImportError
import torch, vitkernels
q, k, v = torch.randn(1, 1, 2, 5), torch.randn(1, 8, 2, 5), torch.randn(1, 8, 2, 5)
y = vitkernels.ops.separable_attention(q, k, v)
print((y - torch.relu(v) * (k * torch.softmax(q, -1)).sum(-1, keepdim=True)).abs().max() < 1e-5)
print(next(c.reason for c in vitkernels.explain(vitkernels.ops.separable_attention, q, k, v).candidates if c.backend == "triton"))
"""
    done = run_python(code)
    assert done.stdout.splitlines() == ["tensor(True)", "the triton package is not installed"], done.stdout + done.stderr


def test_builder_needs_only_the_standard_library(run_python) -> None:
    """setup.py loads it by its path, where neither torch nor vitkernels is installed: -S and -I leave nothing but the standard library."""
    code = """
import subprocess, sys
load = '''
import importlib.util, sys
spec = importlib.util.spec_from_file_location("builder", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.settings()["cpu"]["library"])
try:
    module.check()
except module.BuildError as error:
    print(error)
'''
sys.exit(subprocess.run([sys.executable, "-I", "-S", "-c", load, sys.argv[1]]).returncode)
"""
    done = run_python(code, builder.__file__)
    assert done.returncode == 0, done.stderr
    library, problem = done.stdout.strip().splitlines()
    assert library == builder.CPU_LIBRARY
    assert problem.startswith("torch is not installed here")
