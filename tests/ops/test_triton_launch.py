"""A kernel's second start goes round Triton's look at its arguments; what would have been another kernel still is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vitkernels.ops import _triton as shared


class _Compiled:
    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.log.append((self.name, grid, args))


class _Kernel:
    """Stands for a JITFunction: every start through it compiles."""

    arg_names = ("x", "n", "scale", "BLOCK")

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.compilations = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any, **options: Any) -> _Compiled:
            self.compilations += 1
            return _Compiled(self.log, f"compiled {self.compilations}")

        return start


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    monkeypatch.setattr(shared, "INTERPRET", False)
    monkeypatch.setattr(shared, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return _Kernel()


def test_the_second_start_is_direct_and_passes_the_constants_in_order(kernel: _Kernel) -> None:
    x, other = torch.empty(64), torch.empty(64)
    shared.launch(kernel, 3, x, 7, 0.5, BLOCK=16, num_warps=4)
    assert (kernel.compilations, kernel.log) == (1, [])
    shared.launch(kernel, 5, other, 7, 0.5, BLOCK=16, num_warps=4)
    assert kernel.compilations == 1
    ((name, grid, args),) = kernel.log
    assert (name, grid) == ("compiled 1", (5, 1, 1))
    assert args[0] is other and args[1:] == (7, 0.5, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.empty(64, dtype=torch.bfloat16)},
        {"x": torch.empty(65)[1:]},  # no longer at a multiple of 16 bytes
        {"x": None},
        {"n": 1},
        {"n": 32},
        {"n": 2**31},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=lambda change: next(f"{name} {getattr(value, 'dtype', value)}" for name, value in change.items()),
)
def test_what_triton_compiles_anew_is_compiled_anew(kernel: _Kernel, change: dict[str, Any]) -> None:
    call = {"x": torch.empty(64), "n": 7, "scale": 0.5, "BLOCK": 16, "num_warps": 4}
    for values in (call, call | change):
        shared.launch(kernel, 1, values["x"], values["n"], values["scale"], BLOCK=values["BLOCK"], num_warps=values["num_warps"])
    assert kernel.compilations == 2


def test_nothing_to_do_starts_nothing(kernel: _Kernel) -> None:
    shared.launch(kernel, 0, torch.empty(64), 7, 0.5, BLOCK=16)
    assert kernel.compilations == 0
