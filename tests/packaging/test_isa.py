"""The instruction set that VITKERNELS_CPU_ISA asks for: honoured, or refused with one clear message."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vitkernels import host

MODULE_MISSING = host.why_not()
needs_module = pytest.mark.skipif(MODULE_MISSING is not None, reason=str(MODULE_MISSING))


@needs_module
def test_features_match_the_kernel() -> None:
    """What CPUID says against what Linux says in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    if not sys.platform.startswith("linux") or not info.is_file():
        pytest.skip("needs Linux's /proc/cpuinfo")
    flags = next((set(line.split(":")[1].split()) for line in info.read_text().splitlines() if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("/proc/cpuinfo lists no flags on this architecture")
    features = host.cpu_features()
    assert features
    assert features == {name: name in flags for name in features}


@needs_module
def test_every_usable_set_is_honoured(run_python, cpu_library) -> None:
    code = "from vitkernels import host, native; print(native.cpu_isa(), host.isa_report().selected)"
    for isa in host.isa_report().usable:
        done = run_python(code, VITKERNELS_CPU_ISA=isa)
        assert done.stdout.split() == [isa, isa], done.stderr


@needs_module
@pytest.mark.parametrize("value", ["avx1024", "AVX2"])
def test_an_unknown_set_is_an_error(run_python, cpu_library, value: str) -> None:
    """The call that asks for the native backend raises; the report, the explanation and doctor say the same words and go on."""
    code = """
import torch, vitkernels
from vitkernels import host
q, k, v = torch.randn(1, 1, 2, 5), torch.randn(1, 8, 2, 5), torch.randn(1, 8, 2, 5)
try:
    with vitkernels.backend("native"):
        vitkernels.ops.separable_attention(q, k, v)
except vitkernels.BackendUnavailable as error:
    print(error)
print(next(c.reason for c in vitkernels.explain(vitkernels.ops.separable_attention, q, k, v).candidates if c.backend == "native"))
print(host.isa_report().error)
vitkernels.cli.main(["doctor", "--json"])
"""
    done = run_python("import vitkernels.cli\n" + code, VITKERNELS_CPU_ISA=value)
    assert done.returncode == 0, done.stderr
    raised, explained, reported, doctor = done.stdout.split("\n", 3)
    for text in (raised, explained, reported, json.loads(doctor)["cpu"]["isa_problem"]):
        assert f"VITKERNELS_CPU_ISA is '{value}', which names no instruction set; here it can be: baseline" in text
