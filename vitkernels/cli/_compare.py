"""Original against accelerated, on one model and one batch: errors against float64, then interleaved timing. Behind ``accelerate`` and ``demo``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkernels
from vitkernels import accuracy, timing
from vitkernels.bench import first_line
from vitkernels.cli import _engines, _zoo
from vitkernels.cli._common import CliError
from vitkernels.integrations import Record

ORIGINAL, ACCELERATED, LAST, COMPILED = "original", "accelerated", "channels_last", "torch.compile"


@dataclass(frozen=True)
class Error:
    """Error of both models against the original in float64, relative to the largest float64 value (logits) or to the norm (gradients)."""

    of: str
    original: float
    accelerated: float
    within_twice: bool

    @property
    def holds(self) -> bool:
        """Whether the accelerated model keeps the rule, on a signal: an original that is all error shows nothing about anything."""
        return self.within_twice and self.original < 0.5


@dataclass(frozen=True)
class Result:
    """Everything one comparison found.

    Attributes:
        replaced, skipped: what :func:`vitkernels.accelerate` did; ``fallbacks`` are replaced modules that ran their original code, and why.
        errors: of the logits, and in training of the gradient of all parameters.
        peer_errors: of the logits of each other contender that was timed, by its name.
        measured: ``None`` where nothing was timed.
    """

    name: str
    source: str
    batch: int
    size: int
    dtype: str
    device: str
    mode: str
    images: str
    replaced: tuple[Record, ...]
    skipped: tuple[Record, ...]
    fallbacks: dict[str, str]
    errors: tuple[Error, ...]
    measured: timing.Measurement | None
    notes: tuple[str, ...] = ()
    peer_errors: dict[str, float] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether the accelerated model keeps the accuracy rule."""
        return all(error.holds for error in self.errors)

    def error_of_logits(self, name: str) -> float | None:
        """Of one that was timed; None where it was not compared."""
        known = {ORIGINAL: self.errors[0].original, ACCELERATED: self.errors[0].accelerated}
        return (known | self.peer_errors).get(name)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.source}), batch {self.batch}, {self.size} px, {self.dtype}, {self.device}, {self.mode}"

    def summary(self) -> dict[str, Any]:
        """As plain data: one row of a CSV."""
        row: dict[str, Any] = {
            "model": self.name,
            "source": self.source,
            "batch": self.batch,
            "size": self.size,
            "dtype": self.dtype,
            "device": self.device,
            "mode": self.mode,
            "images": self.images,
            "replaced": len(self.replaced),
            "skipped": len(self.skipped),
        }
        for error in self.errors:
            row[f"error_{error.of}_original"] = error.original
            row[f"error_{error.of}_accelerated"] = error.accelerated
        row |= {f"error_logits_{name}": error for name, error in self.peer_errors.items()}
        row["accuracy_rule_holds"] = self.right
        if self.measured is not None:
            for name, found in self.measured.items():
                for quantile, seconds in asdict(found.quantiles).items():
                    row[f"{name}_{quantile}_ms"] = seconds * 1e3
            speedup = self.measured.speedup(ACCELERATED, over=ORIGINAL)
            row |= {"speedup_p20": speedup.p20, "speedup_p50": speedup.p50, "speedup_p80": speedup.p80}
            row |= {"rounds_kept": self.measured.kept, "rounds_discarded": self.measured.discarded, "weak": self.measured.weak}
        return row


def _without_dropout(module: nn.Module) -> nn.Module:
    """Training mode with every dropout off: two models that drop different elements cannot be compared."""
    module.train()
    for child in module.modules():
        # Of a layer that drops, or of one that calls F.dropout.
        names = ("p", "drop_prob") if "drop" in type(child).__name__.lower() else ("dropout", "attention_dropout", "activation_dropout")
        for attribute in names:
            if isinstance(getattr(child, attribute, None), float):
                setattr(child, attribute, 0.0)
    return module


def _forward(module: nn.Module, x: _zoo.Pixels, options: dict[str, Any]) -> Callable[[], Tensor]:
    return lambda: _zoo.logits(module(x, **options))


def _training_step(module: nn.Module, x: _zoo.Pixels, options: dict[str, Any], labels: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        output = _zoo.logits(module(x, **options))
        logits = output.flatten(0, -2)  # a detector's, of all its queries: the image's class for each
        wanted = labels.repeat_interleave(len(logits) // len(labels))
        F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), wanted).backward()
        return output

    return step


def compiled_for_inference(module: nn.Module, x: Any, options: dict[str, Any] | None = None) -> Any:
    """``torch.compile`` of a copy, run once; on the CPU with its weights taken for constants, as inductor's freezing does it for inference."""
    import torch._inductor.config as inductor

    program: Any = torch.compile(copy.deepcopy(module))
    on_cpu = next(module.parameters()).device.type == "cpu"
    with torch.no_grad(), inductor.patch(freezing=True) if on_cpu else contextlib.nullcontext():
        program(x, **(options or {}))
    return program


def _gradients(module: nn.Module) -> Tensor:
    """The gradient of all parameters as one vector; a parameter that got none counts as zeros."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters() if p.requires_grad])


def _errors(
    calls: dict[str, Callable[[], Tensor]], modules: dict[str, nn.Module], training: bool, context: Any
) -> tuple[tuple[Error, ...], dict[str, Tensor]]:
    """The errors, and the logits they are of."""
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for name, call in calls.items():
        with context():
            outputs[name] = call().detach().clone()
        if training:
            gradients[name] = _gradients(modules[name])
            modules[name].zero_grad(set_to_none=True)
    found = accuracy.compare_tensors("logits", outputs[ACCELERATED], outputs[ORIGINAL], outputs["float64"])
    errors = [Error("logits", found.relative_eager_error, found.relative_error, found.holds)]
    if training:
        # One number for all parameters: by the norm, since the gradient of a small tensor far from any fused module differs by luck alone.
        exact = gradients["float64"]
        norm = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
        relative = {name: float((gradients[name].double() - exact).norm() / norm) for name in (ORIGINAL, ACCELERATED)}
        floor = 2 * torch.finfo(gradients[ORIGINAL].dtype).eps
        holds = relative[ACCELERATED] <= 2 * relative[ORIGINAL] + floor
        errors.append(Error("gradients", relative[ORIGINAL], relative[ACCELERATED], holds))
    return tuple(errors), outputs


def compare(
    zoo_model: _zoo.ZooModel,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool = False,
    image: Path | None = None,
    rounds: int = 20,
    budget: float = 60.0,
    compiled: bool = False,
    peers: bool = False,
    progress: Callable[[], None] | None = None,
) -> Result:
    """Run one model as it is and accelerated, side by side.

    Args:
        zoo_model: the model; it is copied, not changed.
        batch: images in the batch.
        dtype: of weights and input.
        device: where.
        training: a training step (forward, cross-entropy, backward; dropout off) instead of inference.
        image: a file; default scikit-image's photos, else noise.
        rounds: undisturbed timing rounds wanted.
        budget: seconds after which timing stops, once three rounds are there.
        compiled: time ``torch.compile`` of the original too, in inference on the CPU with its weights frozen.
        peers: time what else a CPU user does, too: the original in channels_last and, for inference in float32, ONNX Runtime and OpenVINO on its
            ONNX export.
        progress: called after every timing round.

    Nothing is timed where there was nothing to replace: it would be the same model twice.

    Raises:
        CliError: the original model itself cannot run this input here.
    """
    pixels, shown = _zoo.images(zoo_model, batch, image)
    x: Any = _zoo.to(pixels, device=device, dtype=dtype)
    options = zoo_model.options
    labels = torch.arange(batch, device=device)
    original = copy.deepcopy(zoo_model.module).to(device=device, dtype=dtype)
    original = _without_dropout(original) if training else original.eval()
    accelerated = copy.deepcopy(original)
    handle = vitkernels.accelerate(accelerated)
    exact = copy.deepcopy(original).double()

    modules: dict[str, nn.Module] = {ORIGINAL: original, ACCELERATED: accelerated, "float64": exact}
    inputs = {ORIGINAL: x, ACCELERATED: x, "float64": _zoo.to(x, torch.float64)}
    calls = {n: _training_step(m, inputs[n], options, labels) if training else _forward(m, inputs[n], options) for n, m in modules.items()}
    context: Any = contextlib.nullcontext if training else torch.inference_mode
    try:
        with context():
            calls[ORIGINAL]()
    except (RuntimeError, ValueError) as error:
        raise CliError(f"{zoo_model.name} itself does not run batch {batch} at {zoo_model.size} px in {dtype}: {first_line(error)}") from error
    errors, outputs = _errors(calls, modules, training, context)
    del calls["float64"], modules["float64"], exact

    notes: list[str] = []
    measured = None
    peer_errors: dict[str, float] = {}

    def right(name: str, output: Tensor) -> bool:
        """Whether a contender in inference computes the same; if not, a note says so."""
        found = accuracy.compare_tensors("logits", output, outputs[ORIGINAL], outputs["float64"])
        if found.holds:
            peer_errors[name] = found.relative_error
        else:
            notes.append(f"{name}: not timed, its logits are off by {found.relative_error:.1e}, the original's by {errors[0].original:.1e}")
        return found.holds

    if handle.replaced:
        contexts = dict.fromkeys(calls, context)
        on_cpu, one_tensor = device.type == "cpu", isinstance(x, Tensor)
        if compiled:
            torch.compiler.reset()
            try:
                if training:
                    program: Any = torch.compile(copy.deepcopy(original))
                    call = _training_step(program, x, options, labels)
                    call()
                    calls[COMPILED], contexts[COMPILED] = call, context
                else:
                    call = _forward(compiled_for_inference(original, x, options), x, options)
                    with torch.no_grad():
                        same = right(COMPILED, call())
                    if same:
                        calls[COMPILED], contexts[COMPILED] = call, torch.no_grad
            except Exception as error:  # no C++ compiler, a graph it cannot take: said in the report, the run goes on
                notes.append(f"{COMPILED}: {first_line(error)}")
        if peers and on_cpu and one_tensor and x.dim() == 4:
            last: Any = copy.deepcopy(original)
            last.to(memory_format=torch.channels_last)
            last_x = x.contiguous(memory_format=torch.channels_last)
            call = _training_step(last, last_x, options, labels) if training else _forward(last, last_x, options)
            with context():
                output = call()
            if training:  # PyTorch's own norms are less exact there than the rule allows: no reason not to show how fast they are
                peer_errors[LAST] = accuracy.compare_tensors("logits", output.detach(), outputs[ORIGINAL], outputs["float64"]).relative_error
            if training or right(LAST, output):
                calls[LAST], contexts[LAST] = call, context
        comparable = peers and on_cpu and not training and dtype is torch.float32
        with contextlib.ExitStack() as stack:
            engines: dict[str, _engines.Engine] = {}
            if comparable and one_tensor:
                engines, reasons = stack.enter_context(_engines.engines(original, x))
                notes += reasons
            elif comparable:
                notes.append(
                    f"{', '.join(_engines.ENGINES)}: not timed, the model takes a list of images of any sizes, which torch.onnx does not export"
                )
            elsewhere = {name: engine for name, engine in engines.items() if right(name, engine.output)}
            measured = timing.interleave(
                calls, elsewhere=elsewhere, rounds=rounds, budget=budget, device=device, contexts=contexts, progress=progress
            )
    return Result(
        name=zoo_model.name,
        source=zoo_model.source,
        batch=batch,
        size=zoo_model.size,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        mode="training step" if training else "inference",
        images=shown,
        replaced=tuple(handle.replaced),
        skipped=tuple(handle.skipped),
        fallbacks=handle.fallbacks,
        errors=errors,
        measured=measured,
        notes=tuple(notes),
        peer_errors=peer_errors,
    )
