"""An op can be captured into a CUDA graph: it never waits for the GPU, and a replay reads the tensors anew."""

from __future__ import annotations

import pytest
import torch

from .oracle import Target, as_tuple, mapped

pytestmark = [pytest.mark.fused, pytest.mark.gpu]


def test_replay_computes_on_the_new_values(target: Target) -> None:
    if target.device != "cuda":
        pytest.skip("CUDA graphs need a GPU (pytest --device cuda)")
    for sample in target.every(4):
        static = mapped(sample, lambda t: t.detach().clone())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            target(*static.args, **static.kwargs)  # compiles; a compilation cannot be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = as_tuple(target(*static.args, **static.kwargs))
        for tensor in static.tensors():
            tensor.mul_(0.75)  # other values, and a variance stays one
        graph.replay()
        for a, b in zip(captured, as_tuple(target(*static.args, **static.kwargs)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
