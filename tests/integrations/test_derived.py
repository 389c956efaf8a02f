"""What is derived from weights is thrown away for every change of what it came from, and for nothing else; as asked in C and in Python."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitkernels import host
from vitkernels.nn import _derived
from vitkernels.nn._derived import Derived

COMPILED = pytest.mark.skipif(host.compiled("unchanged") is None, reason="the host module is not built")


@pytest.fixture(params=[pytest.param("compiled", marks=COMPILED), "python"], autouse=True)
def asked_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(host, "compiled", lambda name: None)
    return str(request.param)


class Scaled(nn.Module):
    """Something with a parameter, a buffer and a setting of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.zeros(3))


class Twin(Scaled):
    pass


class Watched:
    """A model, and how often its plan and its value were made."""

    def __init__(self) -> None:
        self.model: Any = nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LayerNorm(3), nn.GELU(), nn.Sequential(Scaled(), nn.Identity())
        ).eval()
        self.plans = self.values = 0
        self.derived: Derived[int, int] = Derived(self._plan, lambda module: None, below=("scale",))
        assert self.now() == (1, 1) and self.now() == (1, 1)

    def _plan(self, model: Any) -> int:
        self.plans += 1
        return self.plans

    def _value(self) -> int:
        self.values += 1
        return self.values

    def now(self) -> tuple[int, int]:
        self.derived.entry(self.model).value("key", self._value)
        return self.plans, self.values


@pytest.fixture
def watched() -> Watched:
    return Watched()


def _hook(*_: Any) -> None:
    pass


def _in_training(model: Any) -> None:
    model[1].train()


STRUCTURE: dict[str, Callable[[Any], Any]] = {
    "a child more": lambda m: m[4].add_module("more", nn.Identity()),
    "a child of a layer without": lambda m: m[3].add_module("more", nn.Identity()),
    "a child less": lambda m: m[4].__delitem__(1),
    "another child": lambda m: m[4].__setitem__(1, nn.Identity()),
    "another child on top": lambda m: m.__setitem__(3, nn.GELU()),
    "another order": lambda m: m[4]._modules.update({"0": m[4]._modules.pop("0")}),
    "no child": lambda m: m.__setitem__(3, None),
    "a parameter more": lambda m: m[3].register_parameter("weight", nn.Parameter(torch.ones(1))),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach())),
    "a parameter less": lambda m: setattr(m[0], "bias", None),
    "a buffer more": lambda m: m[2].register_buffer("more", torch.ones(1)),
    "another buffer": lambda m: setattr(m[4][0], "shift", torch.zeros(3)),
    "a buffer less": lambda m: delattr(m[4][0], "shift"),
    "forward hook": lambda m: m[4][0].register_forward_hook(_hook),
    "forward pre-hook": lambda m: m[4][0].register_forward_pre_hook(_hook),
    "backward hook": lambda m: m[4][0].register_full_backward_hook(_hook),
    "backward pre-hook": lambda m: m[4][0].register_full_backward_pre_hook(_hook),
    "another class": lambda m: setattr(m[4][0], "__class__", Twin),
    "a forward of its own": lambda m: setattr(m[3], "forward", m[3].forward),
    "stride": lambda m: setattr(m[0], "stride", (2, 2)),
    "padding mode": lambda m: setattr(m[0], "padding_mode", "circular"),
    "eps": lambda m: setattr(m[1], "eps", 0.1),
    "eps of a layer norm": lambda m: setattr(m[2], "eps", 0.1),
    "approximation": lambda m: setattr(m[3], "approximate", "tanh"),
    "training": _in_training,
    "own setting": lambda m: setattr(m[4][0], "scale", 3.0),
    "training beside an own setting": lambda m: m[4][0].train(),
}


def _forth_and_back(model: Any) -> None:
    """The dictionaries grow beyond their memory and shrink again."""
    for table in (model[0].__dict__, model[0]._parameters, model[4]._modules):
        for i in range(100):
            table[f"more {i}"] = None
        for i in range(100):
            del table[f"more {i}"]


SAME: dict[str, Callable[[Any], Any]] = {
    "an equal setting": lambda m: setattr(m[0], "stride", tuple(int(one) for one in "11")),
    "an equal number of another type": lambda m: setattr(m[4][0], "scale", 2),
    "an attribute nobody reads": lambda m: setattr(m[0], "note", "new"),
    "there and back": _forth_and_back,
    "a hook gone again": lambda m: m[0].register_forward_hook(_hook).remove(),
    "a count of batches": lambda m: m[1].num_batches_tracked.add_(1),
    "gradients": lambda m: m.requires_grad_(False),
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "a parameter in place": lambda m: m[0].weight.add_(1),
    "a buffer in place": lambda m: m[1].running_var.mul_(2),
    "through a view": lambda m: m[4][0].weight[:1].zero_(),
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "data of a buffer": lambda m: setattr(m[4][0].shift, "data", torch.zeros(3)),
    "half": lambda m: m[0].half(),
    "a state loaded": lambda m: m.load_state_dict(m.state_dict()),
}


@pytest.mark.parametrize("change", STRUCTURE)
def test_every_change_of_structure_makes_a_new_plan(watched: Watched, change: str) -> None:
    STRUCTURE[change](watched.model)
    assert watched.now() == (2, 2)


@pytest.mark.parametrize("change", SAME)
def test_nothing_else_does(watched: Watched, change: str) -> None:
    SAME[change](watched.model)
    assert watched.now() == (1, 1)


@pytest.mark.parametrize("change", WRITES)
def test_every_write_makes_new_values(watched: Watched, change: str) -> None:
    with torch.no_grad():
        WRITES[change](watched.model)
    assert watched.now() == (1, 2)
    assert watched.now() == (1, 2)


@pytest.mark.parametrize("what", ["hook", "forward"])
def test_what_waited_below_is_seen_to_be_gone(watched: Watched, what: str) -> None:
    """A plan that was made while it was there says so, and is not kept."""
    layer = watched.model[1]
    if what == "hook":
        remove = layer.register_forward_hook(_hook).remove
    else:
        layer.forward = layer.forward

        def remove() -> None:
            del layer.forward

    assert watched.now() == (2, 2)
    remove()
    assert watched.now() == (3, 3) and watched.now() == (3, 3)


def test_tensors_without_versions_are_never_trusted(watched: Watched) -> None:
    with torch.inference_mode():
        watched.model[4][0].shift = torch.zeros(3)
    assert [watched.now(), watched.now()] == [(2, 2), (2, 3)]


class Marked(Tensor):
    """A subclass that says of itself what it likes."""

    marks: tuple[int, int]

    @property
    def _version(self) -> int:
        return self.marks[0]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].marks[1] if function is Tensor.data_ptr else super().__torch_function__(function, types, args, kwargs)


def test_subclasses_are_asked_by_their_own_rules(watched: Watched) -> None:
    shift = torch.zeros(3).as_subclass(Marked)
    shift.marks = (7, 4096)
    watched.model[4][0].shift = shift
    assert [watched.now(), watched.now()] == [(2, 2), (2, 2)]
    shift.marks = (8, 4096)
    assert watched.now() == (2, 3)
    shift.marks = (8, 8192)
    assert watched.now() == (2, 4)


def test_under_a_torch_function_mode(watched: Watched) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with Mode():
        assert watched.now() == (1, 1)
        with torch.no_grad():
            watched.model[0].weight.add_(1)
        assert watched.now() == (1, 2)


def test_settings_that_act_when_they_are_compared(watched: Watched) -> None:
    own = watched.model[4][0].__dict__

    class Acting:
        def __eq__(self, other: object) -> bool:
            own.pop("scale", None)
            gc.collect()
            return True

        __hash__ = None  # type: ignore[assignment]

    own["scale"] = Acting()
    assert watched.now() == (1, 1) and "scale" not in own
    with pytest.raises(KeyError, match="scale"):
        watched.derived._entries[watched.model].snapshot.holds()

    class Failing:
        def __eq__(self, other: object) -> bool:
            raise ValueError("not to be compared")

        __hash__ = None  # type: ignore[assignment]

    own["scale"] = Failing()
    with pytest.raises(ValueError, match="not to be compared"):
        watched.now()


def test_asking_keeps_no_reference(watched: Watched) -> None:
    """Also not where it ends early, or in an exception."""
    snapshot = watched.derived.entry(watched.model).snapshot
    missing: dict[str, Any] = {}

    def ask() -> None:
        assert snapshot.holds() and snapshot.marks() == snapshot.marks()
        watched.model[1].eps, kept = 0.1, watched.model[1].eps
        assert not snapshot.holds()
        watched.model[1].eps = kept
        with pytest.raises(KeyError):
            _unchanged()((), (), (), (), (), (), (missing,), ("eps",), (0.1,))
        with pytest.raises(RuntimeError):
            (host.compiled("marks") or _derived.marks)((tensor, inference), *_derived._ASKED)

    with torch.inference_mode():
        inference = torch.zeros(3)
    tensor = torch.zeros(3)
    objects = [item for part in snapshot._was for item in part] + [tensor, inference, missing, *snapshot.tensors, *_derived._ASKED]
    ask()
    before = list(map(sys.getrefcount, objects))
    for _ in range(50):
        ask()
    assert list(map(sys.getrefcount, objects)) == before


def _unchanged() -> Callable[..., bool]:
    return host.compiled("unchanged") or _derived.unchanged


@pytest.mark.parametrize(("place", "wrong", "error"), [(0, (3,), TypeError), (5, (3,), TypeError), (4, (int,), ValueError), (6, ({},), ValueError)])
def test_wrong_arguments_of_the_compiled_functions(asked_in: str, place: int, wrong: tuple[Any, ...], error: type[Exception]) -> None:
    if asked_in != "compiled":
        pytest.skip("the Python functions rely on their one caller")
    arguments: list[tuple[Any, ...]] = [()] * 9
    arguments[place] = wrong
    with pytest.raises(error):
        _unchanged()(*arguments)
