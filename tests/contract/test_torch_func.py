"""``torch.func`` and forward-mode derivatives: what eager gives, or a clear refusal; never a derivative that is silently zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import vitkernels
from vitkernels import registry

from .oracle import Target, as_tuple


def _function(target: Target) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The op as a function of its first argument alone, reduced to one tensor, and that argument."""
    sample = target.samples()[0]
    return lambda first: as_tuple(target(first, *sample.args[1:], **sample.kwargs))[0], sample.args[0]


def _eager(target: Target) -> Callable[[Tensor], Tensor]:
    return _function(Target(target.spec, "reference", target.device))[0]


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def _dual(function: Callable[[Tensor], Tensor], primal: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(function(forward_ad.make_dual(primal, tangent)))
    return torch.zeros_like(result.primal) if result.tangent is None else result.tangent


# Each takes a function of one tensor, a point and a direction.
_TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "vmap": lambda f, x, t: torch.vmap(f)(torch.stack([x, t])),
    "grad": lambda f, x, t: torch.func.grad(lambda a: f(a).square().sum())(x),
    "per-sample grad": lambda f, x, t: torch.vmap(torch.func.grad(lambda a: f(a).square().sum()))(torch.stack([x, t])),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "forward-mode": _dual,
}
_EACH = pytest.mark.parametrize("transform", _TRANSFORMS)


@_EACH
def test_right_or_refused(target: Target, transform: str) -> None:
    """On a backend asked for by name."""
    function, x = _function(target)
    direction = torch.randn_like(x)
    try:
        got = _TRANSFORMS[transform](function, x, direction)
    except (RuntimeError, NotImplementedError) as error:
        assert target.backend != "reference"
        assert any(word in str(error) for word in ("functorch", "torch.func", "forward")), f"not a clear refusal: {error}"
    else:
        _close(got, _TRANSFORMS[transform](_eager(target), x, direction))


@_EACH
@pytest.mark.parametrize("name", registry.all_specs())
def test_automatic_choice_never_refuses(name: str, transform: str, device: str) -> None:
    """A model that ``torch.func`` takes apart today is taken apart after ``accelerate`` too, by the reference if need be."""
    spec = registry.get(name)
    eager, x = _function(Target(spec, "reference", device))
    automatic, _ = _function(Target(spec, "auto", device))
    direction = torch.randn_like(x)
    assert vitkernels.backends.requested() == "auto"
    _close(_TRANSFORMS[transform](automatic, x, direction), _TRANSFORMS[transform](eager, x, direction))
