"""``vitkernels doctor``."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch

from vitkernels import backends, bench, builder, host, native, proof, registry, report
from vitkernels._version import __version__
from vitkernels.cli._common import json_option, out, print_json, table, verdict


@dataclass(frozen=True)
class _Backend:
    """One backend on this machine: what is there, what is not, and the command that changes it."""

    name: str
    built: bool
    usable: bool
    detail: str
    fix: str


def _native() -> _Backend:
    path = native.find(builder.CPU_LIBRARY)
    reason = native.why_not()
    if reason is None:
        return _Backend("native", True, True, f"{path}, runs {native.cpu_isa()}", "")
    return _Backend("native", path is not None, False, reason, "vitkernels build")


def _triton() -> _Backend:
    if not native.has_module("triton"):
        return _Backend("triton", False, False, "the triton package is not installed", "pip install triton (Linux)")
    version = report.package_version("triton")
    if torch.cuda.is_available():
        return _Backend("triton", True, True, f"triton {version}; kernels compile on first use", "")
    if backends.interpreting():
        return _Backend("triton", True, True, f"triton {version} in its interpreter (TRITON_INTERPRET=1): right, and slow", "")
    return _Backend("triton", True, False, f"triton {version}; no GPU here", "")


def _cuda() -> _Backend:
    if not builder.settings()["cuda"]["sources"]:
        return _Backend("cuda", False, False, "no op has CUDA C++ kernels yet; GPU kernels are Triton", "")
    path = native.find(builder.CUDA_LIBRARY)
    reason = native.why_not_cuda()
    if reason is None:
        return _Backend("cuda", True, True, str(path), "")
    fix = "vitkernels build" if torch.cuda.is_available() and path is None else ""
    return _Backend("cuda", path is not None, False, reason, fix)


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory
        gpus.append({"name": torch.cuda.get_device_name(device), "architecture": proof.architecture(device), "memory_gib": round(memory / 2**30, 1)})
    return gpus


def _ops() -> list[dict[str, Any]]:
    """For each op: what a float32 call without gradients would run on, on the CPU and on each GPU, and in what which kernels are verified there."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    rows = []
    for name, spec in registry.all_specs().items():
        for device in devices:
            with backends.backend("auto"), torch.no_grad():
                chosen = backends.select(name, torch.empty(0, device=device))
            rows.append({"op": name, "device": str(device), "auto": chosen, "verified": _verified(spec, device) if device.type == "cuda" else {}})
    return rows


def _verified(spec: registry.OpSpec, device: torch.device) -> dict[str, dict[str, bool]]:
    """By GPU backend, in which dtypes and modes ``auto`` may take the op's kernel, and in which not yet."""
    found: dict[str, dict[str, bool]] = {}
    for backend in ("triton", "cuda"):
        for name, dtype in bench.DTYPES.items():
            if backends.why_not(spec.name, backend, device, dtype) is None:
                for training in (False, True) if spec.differentiable else (False,):
                    mode = f"{name} {proof.TRAINING if training else proof.FORWARD}"
                    found.setdefault(backend, {})[mode] = proof.proved(spec.name, backend, device, dtype, training)
    return found


def diagnose() -> dict[str, Any]:
    """Everything ``doctor`` shows, as plain data."""
    isa = host.isa_report()
    backend_rows = [_Backend("reference", True, True, "plain PyTorch, always there", ""), _native(), _triton(), _cuda()]
    fixes = {row.fix: f"the {row.name} backend" for row in backend_rows if row.fix}
    ops = _ops()
    if any(not all(modes.values()) for row in ops for modes in row["verified"].values()):
        fixes["vitkernels verify"] = "GPU kernels as the default of auto: it checks and times them here"
    return {
        "versions": {
            "vitkernels": __version__,
            "torch": str(torch.__version__),
            "triton": report.package_version("triton"),
            "python": platform.python_version(),
        },
        "cpu": {
            "name": report.cpu_name(),
            "isa": native.cpu_isa(),
            "isa_available": list(isa.usable),
            "isa_compiled": list(isa.built),
            "isa_forced": native.requested_isa(),
            "isa_problem": isa.error,
            "threads": torch.get_num_threads(),
        },
        "gpus": _gpus(),
        "zoos": {name: report.package_version(name) for name in ("timm", "transformers", "vit-pytorch")},
        "backends": [asdict(row) for row in backend_rows],
        "ops": ops,
        "fixes": fixes,
    }


def _in_words(modes: dict[str, bool]) -> str:
    """What is verified of a kernel: yes, no, or in what."""
    done = [mode for mode, verified in modes.items() if verified]
    return "no" if not done else "yes" if len(done) == len(modes) else ", ".join(done)


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what is here and what is missing: backends, versions, CPU, GPU, and the command that fixes each gap."""
    found = diagnose()
    if as_json:
        print_json(found)
        return
    rows = [(b["name"], verdict(b["built"], no="no"), verdict(b["usable"], no="no"), b["detail"]) for b in found["backends"]]
    out.print(table("Backends", ("backend", "built", "usable", "detail"), rows))
    cpu = found["cpu"]
    isa = cpu["isa"] or "none in use: the native backend is not there"
    if cpu["isa_available"]:
        isa += f"; this CPU can run {', '.join(cpu['isa_available'])}"
    if cpu["isa_forced"]:
        isa += f"; {native.ISA_VARIABLE}={cpu['isa_forced']}"
    gpus = [f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB" for gpu in found["gpus"]]
    machine = [
        *((name, version) for name, version in found["versions"].items()),
        ("CPU", f"{cpu['name']}, {cpu['threads']} threads"),
        ("CPU kernels", isa),
        *((f"GPU {index}", text) for index, text in enumerate(gpus)),
        *([] if gpus else [("GPU", "none that torch can use")]),
        *((name, "not installed" if version == "absent" else version) for name, version in found["zoos"].items()),
    ]
    out.print(table("Machine", ("", ""), machine))
    ops = []
    for row in found["ops"]:
        proofs = "; ".join(f"{name}: {_in_words(modes)}" for name, modes in row["verified"].items())
        ops.append(
            (row["op"], row["device"], row["auto"], proofs or "needs no proof on the CPU" if row["device"] == "cpu" else proofs or "no GPU kernel")
        )
    out.print(table("Ops", ("op", "device", "auto takes", "GPU kernels verified"), ops))
    for command, what in found["fixes"].items():
        out.print(f"[bold]{command}[/bold]  to get {what}", highlight=False)
    if not found["fixes"]:
        out.print("Nothing to fix.")
