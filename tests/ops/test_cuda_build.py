"""The CUDA C++ kernels compiled for real GPUs: registers, spills and shared memory read from the binary. No GPU needed, only nvcc.

What the kernels compute is tested by csrc/tests/test_cascaded_block.cpp and test_re_attention_block.cpp, which run their own code on the CPU; how
much shared memory they ask for at a launch, and that it fits each GPU, by test_cascaded_schedule.cpp and the latter.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from vitkernels import builder

if builder.find_nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_90a")
ELEMENTS = {
    "f": "float32",
    "N10vitkernels8BFloat16E": "bfloat16",
    "NS_8BFloat16E": "bfloat16",
    "N10vitkernels7Float16E": "float16",
    "NS_7Float16E": "float16",
}
REGISTER_FILE, THREADS = 65536, 256
# Row blocks of 16 tokens -> blocks that are to run on one multiprocessor at once (cuda_kernels.cuh: __launch_bounds__).
FORWARD_BLOCKS = {1: 2, 4: 2, 13: 1}
# Bytes of stack a thread may have; all others have none. In float32 a row of 208 scores and the halves they are split into are all that 255 registers
# hold, and what spills is read a few times a window; in the other case 8 bytes buy a second block a multiprocessor.
STACK_BUDGET = {("bwd", "float32", 13): 128, ("fwd", "float32", 4): 16}
# Re-Attention: heads there is room for, steps of 16 columns, groups of 16 queries, the last with 128 threads each. With four groups a thread has 128
# registers and spills a few; on an H200 it is the fastest of the three all the same.
PLANS = [
    *((heads, steps, groups) for heads in (8, 12) for steps in (2, 4) for groups in (1, 2, 4) if (heads, steps, groups) != (12, 4, 4)),
    *((16, 2, groups) for groups in (1, 2)),
    (16, 4, 1),
]
PLAN_STACK_BUDGET = {(12, 2, 4): 64, (8, 4, 4): 32, (16, 4, 1): 32}
LSE_BLOCKS, LSE_THREADS = 4, 128


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel and what its binary says."""

    architecture: str
    name: str
    element: str
    row_blocks: int | None
    registers: int
    stack: int
    shared: int

    def __str__(self) -> str:
        return f"{self.name}<{self.element}, {self.row_blocks}> on {self.architecture}: {self.registers} registers, {self.stack} bytes of stack"


def _cuobjdump() -> str:
    """The toolkit's, else the one in the triton package."""
    nvcc = Path(str(builder.find_nvcc())).resolve()
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(nvcc.parent)):
        return found
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump" if spec and spec.submodule_search_locations else None
    if bundled is None or not bundled.is_file():
        pytest.skip("cuobjdump is neither in the CUDA toolkit nor in a triton package")
    return str(bundled)


def _resources(binary: Path) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, mangled name, resources) of each kernel in a library or object."""
    report = subprocess.run([_cuobjdump(), "--dump-resource-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    found, architecture, function = [], "", ""
    for line in report.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            function = match[1]
        elif "REG:" in line:
            found.append((architecture, function, {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}))
    return found


@pytest.fixture(scope="module")
def library() -> Path:
    """The CUDA library of this checkout; built here once, then only what changed."""
    folder = builder.csrc_dir().parent / "build" / "cuda"
    (path,) = builder.build(folder, cuda=True, cpu=False, build_dir=folder / "objects")
    return path


@pytest.fixture(scope="module")
def resources(library: Path) -> list[tuple[str, str, dict[str, int]]]:
    found = _resources(library)
    for _, function, _ in found:
        assert re.search(r"(cascaded_group|re)_attention_\w+_kernel", function), f"{function} is no kernel of ours"
    return found


@pytest.fixture(scope="module")
def kernels(resources: list[tuple[str, str, dict[str, int]]]) -> list[Kernel]:
    found = []
    for architecture, function, used in resources:
        if match := re.search(r"cascaded_group_attention_(fwd|bwd|bwd_weights)_kernelI(f|N[S0-9].*?E)(?:Li(\d+)ELb[01]E)?E+v", function):
            stack = used["STACK"] + used["LOCAL"]
            found.append(Kernel(architecture, match[1], ELEMENTS[match[2]], int(match[3]) if match[3] else None, used["REG"], stack, used["SHARED"]))
    return found


def test_re_attention_has_every_plan_within_its_budget(resources: list[tuple[str, str, dict[str, int]]]) -> None:
    rows, lse = [], []
    for architecture, function, used in resources:
        stack = used["STACK"] + used["LOCAL"]
        if match := re.search(r"re_attention_rows_kernelI(N[S0-9].*?E)Li(\d+)ELi(\d+)ELi(\d+)EE+v", function):
            plan = (int(match[2]), int(match[3]), int(match[4]))
            rows.append((architecture, ELEMENTS[match[1]], plan))
            assert used["REG"] <= min(255, REGISTER_FILE // (128 * plan[2])), f"{function}: {used}"
            assert stack <= PLAN_STACK_BUDGET.get(plan, 0), f"{function}: {used}"
        elif match := re.search(r"re_attention_lse_kernelI(N[S0-9].*?E)Li(\d+)EE+v", function):
            lse.append((architecture, ELEMENTS[match[1]], int(match[2])))
            assert used["REG"] <= REGISTER_FILE // (LSE_THREADS * LSE_BLOCKS) and stack == 0, f"{function}: {used}"
    elements = ("bfloat16", "float16")
    assert sorted(rows) == sorted((a, e, plan) for a in ARCHITECTURES for e in elements for plan in PLANS)
    assert sorted(lse) == sorted((a, e, steps) for a in ARCHITECTURES for e in elements for steps in (2, 4))


def test_every_kernel_is_compiled_for_every_architecture(kernels: list[Kernel]) -> None:
    assert builder.settings()["cuda"]["architectures"] == list(ARCHITECTURES)
    wanted = {
        (architecture, name, element, row_blocks)
        for architecture in ARCHITECTURES
        for element in ("float32", "bfloat16", "float16")
        for name, row_blocks in [*((name, n) for name in ("fwd", "bwd") for n in FORWARD_BLOCKS), ("bwd_weights", None)]
    }
    assert {(k.architecture, k.name, k.element, k.row_blocks) for k in kernels} == wanted
    assert len(kernels) == len(wanted)


def test_registers_leave_room_for_the_blocks(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        blocks = FORWARD_BLOCKS[kernel.row_blocks] if kernel.name == "fwd" and kernel.row_blocks else 1
        assert 0 < kernel.registers <= min(255, REGISTER_FILE // (THREADS * blocks)), str(kernel)


def test_nothing_spills_beyond_its_budget(kernels: list[Kernel]) -> None:
    spilled = [str(k) for k in kernels if k.stack > STACK_BUDGET.get((k.name, k.element, k.row_blocks or 0), 0)]
    assert not spilled, "\n".join(spilled)


def test_no_static_shared_memory(kernels: list[Kernel]) -> None:
    """All of it is asked for at the launch, as schedule.h lays it out. sm_90 reserves 1024 bytes a block, which its limit of 227 KiB leaves out."""
    assert all(k.shared <= (1024 if k.architecture == "sm_90a" else 0) for k in kernels)


def test_no_loop_meets_the_instruction_that_loses_a_sign(library: Path) -> None:
    """cuda_forward.h, convolve: for sm_90a ptxas 13.0 makes of max(-a, b, c), the length of a loop, a VIMNMX3 of a, b and c."""
    command = [_cuobjdump(), "-sass", "-arch", "sm_90a", str(library)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "HMMA" in sass
    assert "VIMNMX3" not in sass


def test_a_spill_is_seen(tmp_path: Path) -> None:
    """The reader of budgets on a kernel that is refused the registers it needs."""
    source = tmp_path / "squeezed.cu"
    source.write_text(
        "__global__ void squeezed(const float* x, float* y) {\n"
        "  float v[64];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) v[i] = x[64 * threadIdx.x + i];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) v[i] = v[63 - i] * v[(7 * i) % 64] + v[i];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) y[64 * threadIdx.x + i] = v[i];\n"
        "}\n"
    )
    binary = source.with_suffix(".cubin")
    subprocess.run(
        [str(builder.find_nvcc()), "-arch=sm_80", "-maxrregcount=32", "-cubin", str(source), "-o", str(binary)], check=True, capture_output=True
    )
    ((_, function, used),) = _resources(binary)
    assert "squeezed" in function
    assert used["REG"] <= 32 and used["STACK"] + used["LOCAL"] > 0


def test_only_the_stable_abi_is_used(library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    symbols = subprocess.run([nm, "-D", "-C", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    undefined = [line.split(maxsplit=1)[1] for line in symbols.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in undefined, "the kernels are not launched on PyTorch's stream"
    tied = [name for name in undefined if re.search(r"\b(c10|at|torch|caffe2)::", name)]
    assert not tied, f"these tie the library to one torch: {tied}"
    cuda = [name for name in undefined if re.match(r"(cuda[A-Z]|cu[A-Z]|__cuda)", name)]
    assert not cuda, f"the CUDA runtime is not linked in: {cuda}"
