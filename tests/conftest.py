"""What every test shares: a torchvision that imports, the number of threads, uninitialised memory that shows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from . import interpreter


def _import_torchvision() -> torch.library.Library | None:
    """Both timm and transformers import torchvision. PyPI's wheel is built for CUDA: beside a CPU-only torch its operators do not load,
    and its import fails at the first shape function unless the operators it names exist. Nothing here calls them.
    """
    try:
        import torchvision
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return library
    return None


# On a GPU, eager's own sums are compared with ours under deterministic algorithms, which cuBLAS has only with a workspace of this size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_TORCHVISION = _import_torchvision()
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.hurry()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device the contract runs on: cpu or cuda")


@pytest.fixture
def poison() -> Iterator[None]:
    """``torch.empty`` comes filled with NaN (or the largest integer), so that an output nobody wrote fails the test instead of passing by luck."""
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # some of eager's own have no deterministic form on a GPU
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
