"""A check by running: whether a class that is known by its name and attributes alone computes what it is taken for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.backends import backend
from vitkernels.integrations._fused import Fused, swap


def why_not_same(known_as: str, module: Any, swaps: dict[str, type[Fused]], shape: tuple[int, ...], width: int | None = None) -> str | None:
    """A name and some attributes promise nothing about the code: run a copy once, in evaluation and in training, and compare.

    Args:
        known_as: what it is taken for.
        module: the module.
        swaps: what would be replaced in it, by path.
        shape: of an input, without the batch. Of several outputs the first is compared.
        width: channels of the widest layer, if not those of the input.
    """
    weight = swaps[""]._vk_weight(module)
    if weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        return "its code is recognised by attributes only, and cannot be checked by running it: its weights are not materialised here"
    cuda = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(cuda), torch.no_grad(), backend("reference"), torch.autocast(weight.device.type, enabled=False):
        theirs, ours = copy.deepcopy(module).double(), copy.deepcopy(module).double()
        for parameter, twin in zip(theirs.parameters(), ours.parameters(), strict=True):
            # Away from zeros that would hide what they are multiplied with, such as the last norm's weight at the start of training.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            twin.copy_(parameter)
        for path, mixin in swaps.items():
            swap(ours.get_submodule(path), mixin)
        x = torch.randn(2, *shape, dtype=torch.float64, device=weight.device)
        for training in (False, True):
            outputs = []
            for probe in (theirs, ours):
                probe.train(training)
                torch.manual_seed(0)
                try:
                    # Not a call: the hooks on the module are for the user's data.
                    found = probe.forward(x)
                    outputs.append(found[0] if isinstance(found, tuple) else found)
                except Exception as error:  # whatever foreign code may raise
                    return f"it has the attributes of {known_as}, but does not run like it: {error}"
            expected, got = outputs
            # Chained sums over d in another order differ by about d roundings each.
            bound = (width or shape[0]) ** 2 * torch.finfo(x.dtype).eps * expected.abs().max().clamp_min(1)
            if expected.shape != got.shape or not (expected - got).abs().max() <= bound:
                return f"it has the attributes of {known_as}, but computes something else"
    return None
