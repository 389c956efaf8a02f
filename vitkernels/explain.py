"""``vitkernels.explain``: for these arguments, which backend would run an op, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from vitkernels import backends, registry


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> backends.Explanation:
    """For one call of an op: each backend, whether it can run, and why not.

    Args:
        op: a function of :mod:`vitkernels.ops`, or its name.
        *args: what you would call it with. Nothing is computed.
        **kwargs: likewise.

    Returns:
        An :class:`~vitkernels.backends.Explanation`; printing it gives a table.

    Raises:
        ValueError: no such op; the message lists near matches.
        TypeError: no tensor among the arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    spec = registry.get(name)
    tensor = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None)
    if tensor is None:
        raise TypeError(f"explain({spec.name}): give the tensors you would call it with; there is none among the arguments")
    return backends.explain_for(spec.name, tensor, args, kwargs)
