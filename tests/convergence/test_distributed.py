"""DDP and FSDP2 on two processes (gloo): the accelerated model ends with the parameters the original ends with, up to rounding.

How much rounding is measured: the same training in float64 is the truth, and the original's distance from it, plain and with its initial weights
moved by one rounding step, the yardstick.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import vitkernels
from vitkernels.integrations._fused import Fused

from .. import zoo
from . import digits

STEPS, BATCH, WORLD = 3, 12, 2
WAYS = ("ddp", "fsdp, accelerated before", "fsdp, accelerated after")


def wrap(model: nn.Module, way: str, accelerated: bool) -> tuple[nn.Module, vitkernels.Handle | None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    handle = vitkernels.accelerate(model) if accelerated and not way.endswith("after") else None
    if way == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for module in [*model.first.transformer, *model.second.transformer, model.second]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if accelerated and handle is None:
        handle = vitkernels.accelerate(model)
    return model, handle


def train(model: nn.Module, images: Tensor, labels: Tensor, rank: int) -> dict[str, Tensor]:
    """The parameters after a few steps, whole, on each rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dtype = next(model.parameters()).dtype
    model.train()
    for step in range(STEPS):
        start = (step * WORLD + rank) * BATCH
        batch = slice(start, start + BATCH)
        F.cross_entropy(model(images[batch].to(dtype)), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        whole[name.removeprefix("module.")] = value.clone()
    return whole


def work(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FSDPModule

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    images, labels = digits.images(size=16)
    start = zoo.settle(digits.model(), images[:64])
    outcomes: dict[str, Any] = {}
    for way in WAYS:

        def run(model: nn.Module, way: str = way, accelerated: bool = False) -> tuple[dict[str, Tensor], nn.Module, vitkernels.Handle | None]:
            model, handle = wrap(copy.deepcopy(model), way, accelerated)
            return train(model, images, labels, rank), model, handle

        exact = run(copy.deepcopy(start).double())[0]
        eager = [run(model)[0] for model in (start, *(zoo.jitter(start, seed) for seed in range(3)))]
        fast, model, handle = run(start, accelerated=True)
        assert handle is not None
        outcome: dict[str, Any] = {
            "exact": exact,
            "eager": eager,
            "fast": fast,
            "start": {name: parameter.detach() for name, parameter in start.named_parameters()},
            "replaced": len(handle.replaced),
            "fallbacks": handle.fallbacks,
            "fused": sum(isinstance(module, Fused) for module in model.modules()),
            "sharded": sum(isinstance(module, FSDPModule) for module in model.modules()),
        }
        handle.remove()
        outcome["fused after remove"] = sum(isinstance(module, Fused) for module in model.modules())
        outcome["classes after remove"] = sorted({type(module).__name__ for module in model.modules()})
        train(model, images, labels, rank)  # and it still trains
        outcomes[way] = outcome
    if rank == 0:
        torch.save(outcomes, f"{folder}/outcomes.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(work, args=(str(folder),), nprocs=WORLD)
    yield torch.load(Path(folder) / "outcomes.pt", weights_only=False)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("way", WAYS)
def test_ends_with_the_same_parameters(outcomes: dict[str, Any], way: str) -> None:
    outcome = outcomes[way]
    assert outcome["replaced"] == outcome["fused"] == 2 + 2 * 3 + 4
    assert not outcome["fallbacks"], outcome["fallbacks"]
    for name, truth in outcome["exact"].items():
        error, *eager_errors = (zoo.rms(result[name].double() - truth) for result in (outcome["fast"], *outcome["eager"]))
        moved = zoo.rms(truth - outcome["start"][name].double())
        floor = 2 * torch.finfo(torch.float32).eps * zoo.rms(truth)
        assert error <= 2 * max(eager_errors) + floor, f"{name}: error {error:.3g}, eager {max(eager_errors):.3g}, floor {floor:.3g}"
        if "attn" in name and name.endswith("weight"):  # a bias in front of a norm has no gradient
            assert moved > 100 * error, f"{name} hardly moved ({moved:.3g}): its agreement says nothing"


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("way", WAYS[1:])
def test_fsdp_and_our_classes_come_and_go_apart(outcomes: dict[str, Any], way: str) -> None:
    outcome = outcomes[way]
    assert outcome["sharded"] == 1 + 1 + 3
    assert outcome["fused after remove"] == 0
    assert {"FSDPDigits", "FSDPLinearTransformerBlock", "FSDPMobileVitV2Block", "MobileVitV2Block"} <= set(outcome["classes after remove"])
