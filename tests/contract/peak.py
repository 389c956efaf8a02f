"""Measures the peak memory of one op's forward and backward in a process of its own; prints JSON. Run by test_memory.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import vitkernels
from vitkernels import accuracy, registry
from vitkernels.registry import Sample


class Meter:
    """Bytes in use and their peak since the last :meth:`reset`."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    @staticmethod
    def _status(field: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[field].split()[0]) * 1024

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
        self.before = self._status("VmRSS")

    def peak(self) -> int:
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return self._status("VmHWM") - self.before


def _size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main(name: str, backend: str, device: str) -> dict[str, object]:
    spec = registry.get(name)
    meter = Meter(device)
    cases = sorted(spec.cases(device), key=lambda case: case.elements_moved)

    def run(sample: Sample) -> dict[str, object]:
        sample = accuracy.with_grad(sample) if spec.differentiable else sample
        inputs = accuracy.leaves(sample)
        meter.reset()
        outputs = accuracy.as_tuple(spec.function(*sample.args, **sample.kwargs))
        forward = {"peak": meter.peak(), "results": _size(*outputs) + spec.saved_bytes(sample)}
        grads = [torch.ones_like(output) for output in outputs]
        meter.reset()
        gradients = accuracy.gradients(outputs, inputs, grads)
        backward = {"peak": meter.peak(), "results": _size(*gradients)}
        return {"forward": forward, "backward": backward, "activation": max(map(_size, sample.tensors()))}

    with vitkernels.backend(backend):
        try:
            meter.reset()
        except OSError as error:
            return {"skip": f"the peak cannot be reset here: {error}"}
        run(cases[0].make(torch.float32, device))  # loads libraries, starts threads, and is not counted
        return run(cases[-1].make(torch.float32, device))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
