"""What a CPU user exports to, as contenders: ONNX Runtime and OpenVINO on the ONNX export of the original model, in float32.

Each engine lives in a process of its own, and is stopped (SIGSTOP) while another contender is timed: an engine's threads spin on after a call, and in
one process they double the time of whatever runs next.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from vitkernels.bench import first_line
from vitkernels.cli._common import CliError

ENGINES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
OPSET = 17


class EngineError(CliError):
    """An engine that cannot take part, or no longer; the message says why, in one line."""


class Engine:
    """One engine with one model and one input: a :class:`vitkernels.timing.Elsewhere`.

    Attributes:
        output: what it computes for the input.
        cpu_seconds: CPU time its process has used.

    Raises:
        EngineError: it does not load the model, or dies.
    """

    def __init__(self, package: str, model: Path, image: Path, threads: int) -> None:
        output = model.with_name(f"{package}.npy")
        # As text: run by path, its folder would be the first to be searched, and `inspect` there is a command of ours.
        command = [sys.executable, "-c", Path(__file__).with_name("_engine_worker.py").read_text(), package, model, image, output, threads]
        self._package = package
        self._process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.cpu_seconds = 0.0
        try:
            self._answer()
            self.output = torch.from_numpy(numpy.load(output))
        except BaseException:
            self.close()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the process of {self._package} ended with exit code {self._process.wait()}; --no-peers leaves it out")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"].splitlines()[0])
        self.cpu_seconds = answer["cpu"]
        return answer

    def seconds_per_call(self, calls: int) -> float:
        """Wake it, let it run, and stop it again."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            with contextlib.suppress(BrokenPipeError):  # no answer will come: that is the error to report
                print(calls, file=self._process.stdin, flush=True)
            return float(self._answer()["seconds"])
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


@contextlib.contextmanager
def _without_graph_dump() -> Iterator[None]:
    """The exporter prints the whole graph of a model that it cannot export, from C++; torch 2.13's switch for that is always on."""
    torch._C._jit_set_onnx_log_output_stream("stderr")
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _export(module: nn.Module, x: Tensor, folder: Path) -> tuple[Path, Path]:
    """The model as ONNX and the input as a numpy file."""
    model, image = folder / "model.onnx", folder / "image.npy"
    numpy.save(image, x.numpy())
    with _without_graph_dump(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # dynamo=False is deprecated; it needs no further package, and exports models that dynamo does not
        torch.onnx.export(module, (x,), str(model), dynamo=False, opset_version=OPSET)
    return model, image


@contextlib.contextmanager
def engines(module: nn.Module, x: Tensor) -> Iterator[tuple[dict[str, Engine], list[str]]]:
    """The engines that run ``module`` (in eval mode, float32, on the CPU) on ``x``, with as many threads as torch has; and why the others do not."""
    found: dict[str, Engine] = {}
    notes: list[str] = []
    absent = {name: package for name, package in ENGINES.items() if importlib.util.find_spec(package) is None}
    notes += [f"{name}: {package} is not installed (`pip install vitkernels[peers]`)" for name, package in absent.items()]
    present = {name: package for name, package in ENGINES.items() if name not in absent}
    if present and importlib.util.find_spec("onnx") is None:
        notes += [f"{name}: torch.onnx.export needs onnx, which is not installed (`pip install vitkernels[peers]`)" for name in present]
        present = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitkernels-engines-")))
        try:
            model, image = _export(module, x, folder) if present else (folder, folder)
        except Exception as error:  # the exporter raises whatever it meets inside the model
            notes += [f"{name}: torch.onnx.export fails: {first_line(error)}" for name in present]
            present = {}
        for name, package in present.items():
            try:
                found[name] = Engine(package, model, image, torch.get_num_threads())
                stack.callback(found[name].close)
            except EngineError as error:
                notes.append(f"{name}: {error.format_message()}")
        yield found, notes
