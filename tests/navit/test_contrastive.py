"""The chunked contrastive loss on 1, 2 and 4 gloo processes against the dense loss on one: value, every gradient, memory.

Four processes are started once. The smaller worlds are groups of theirs, so the group argument is part of every test.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitkernels.accuracy import compare_tensors
from vitkernels.navit import contrastive_loss

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")

SIZES = {1: [(24,)], 2: [(12, 12), (17, 7)], 4: [(6, 6, 6, 6), (9, 0, 1, 14)]}
CASES = [
    (world, sizes, kind, dtype) for world in SIZES for sizes in SIZES[world] for kind in ("softmax", "sigmoid") for dtype in ("float64", "float32")
]
DRAWS, WIDTH, CHUNK = 9, 16, 5
NAMES = ("loss", "image", "text", "logit_scale", "bias")


def draw(seed: int, pairs: int, dtype: torch.dtype, scale: float = 14.0) -> dict[str, Tensor]:
    """Features of unit length, pairs that resemble each other, and SigLIP's first scale and bias: exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=1)
    text = F.normalize(image + 0.7 * torch.randn(pairs, WIDTH, generator=generator), dim=1)
    given = {"image": image, "text": text, "logit_scale": torch.tensor(scale), "bias": torch.tensor(-10.0)}
    return {name: value.to(dtype).requires_grad_() for name, value in given.items()}


def dense(image: Tensor, text: Tensor, logit_scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    logits = logit_scale * image @ text.T
    if kind == "softmax":
        labels = torch.arange(len(image))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return -F.logsigmoid((2 * torch.eye(len(image), dtype=image.dtype) - 1) * (logits + bias)).sum() / len(image)


def results(loss: Tensor, given: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    names = [name for name in given if name != "bias" or kind == "sigmoid"]
    grads = torch.autograd.grad(loss, [given[name] for name in names], torch.tensor(3.0, dtype=loss.dtype))
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def dense_results(seed: int, pairs: int, dtype: torch.dtype, kind: str, scale: float = 14.0) -> dict[str, Tensor]:
    given = draw(seed, pairs, dtype, scale)
    return results(dense(**given, kind=kind), given, kind)


def shuffled_results(seed: int, pairs: int, dtype: torch.dtype, kind: str, scale: float = 14.0) -> dict[str, Tensor]:
    """The dense loss with the pairs, and the features of each, in another order: it differs by rounding alone, the only yardstick float64 has."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(pairs, generator=generator), torch.randperm(WIDTH, generator=generator)
    given = {name: value.detach() for name, value in draw(seed, pairs, dtype, scale).items()}
    given = {name: (value[rows][:, columns] if value.dim() else value).requires_grad_() for name, value in given.items()}
    found = results(dense(**given, kind=kind), given, kind)
    return {name: value[rows.argsort()][:, columns.argsort()] if value.dim() else value for name, value in found.items()}


def assert_as_exact(draws: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """The rule of vitkernels.accuracy for draws of (found, eager, exact): of each tensor the median error over the draws counts."""
    for name in draws[0][1]:
        judged = [compare_tensors(name, found[name], eager[name], exact[name]) for found, eager, exact in draws]
        error, eager_error, floor = (statistics.median(getattr(c, field) for c in judged) for field in ("error", "eager_error", "floor"))
        assert error <= 2 * eager_error + floor, f"{name}: error {error:.3g}, eager {eager_error:.3g}, floor {floor:.3g}"


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))])
        return out


def local(rank: int, sizes: tuple[int, ...], given: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {name: (value.detach()[rows] if value.dim() else value.detach()).clone().requires_grad_() for name, value in given.items()}


def sharded(rank: int, sizes: tuple[int, ...], kind: str, dtype: torch.dtype, group: Any) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(DRAWS):
        given = local(rank, sizes, draw(seed, sum(sizes), dtype))
        bias = {} if kind == "softmax" else {"bias": given["bias"]}
        loss = contrastive_loss(given["image"], given["text"], given["logit_scale"], **bias, kind=kind, chunk=CHUNK, group=group)  # type: ignore[arg-type]
        found.append(results(loss, given, kind))
    return found


def largest(rank: int, group: Any, kind: str) -> tuple[int, int]:
    """The largest tensor in forward and backward, and the bytes saved for backward, of 64 pairs on each of two processes."""
    given = local(rank, (64, 64), draw(0, 128, torch.float32))
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    with Largest() as mode, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        contrastive_loss(given["image"], given["text"], given["logit_scale"], kind=kind, chunk=20, group=group).backward()  # type: ignore[arg-type]
    return mode.elements, saved


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(WIDTH, 8).double(), nn.Linear(WIDTH, 8).double()
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.log_scale.exp()


def data_parallel(rank: int, group: Any) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(Towers(), process_group=group)
    given = local(rank, (17, 7), draw(0, 24, torch.float64))
    loss = contrastive_loss(*model(given["image"].detach(), given["text"].detach()), chunk=CHUNK, group=group)
    (loss * 2).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def frozen_image(rank: int, group: Any) -> Tensor:
    """Gradients wanted on one process only: of its texts. The other must take part all the same."""
    given = local(rank, (17, 7), draw(0, 24, torch.float64))
    text = given["text"].requires_grad_(rank == 0)
    scale = given["logit_scale"]
    return torch.autograd.grad(contrastive_loss(given["image"].detach(), text, scale, group=group), text if rank == 0 else scale)[0]


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def disagreements(rank: int, group: Any) -> list[str]:
    image = torch.zeros(2, 3 + rank)
    empty = torch.zeros(0, 3)
    alike = torch.zeros(2, 3, dtype=(torch.float32, torch.bfloat16)[rank])
    return [message(lambda x=x: contrastive_loss(x, x, 1.0, group=group)) for x in (image, empty, alike)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    groups = {1: dist.new_group([0]), 2: dist.new_group([2, 1]), 4: None}  # a rank in the group that is not the rank in the world
    found: dict[Any, Any] = {}
    for world, group in groups.items():
        if group is not None and dist.get_rank(group) < 0:
            outside = message(lambda group=group: contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, group=group))
            assert "this process is not in the group" in outside, outside
            continue
        inside = dist.get_rank(group)
        for case in CASES:
            if case[0] == world:
                found[case] = sharded(inside, case[1], case[2], getattr(torch, case[3]), group)
        if world == 2:
            found["largest"] = {kind: largest(inside, group, kind) for kind in ("softmax", "sigmoid")}
            found["ddp"] = data_parallel(inside, group)
            found["frozen"] = frozen_image(inside, group)
            found["messages"] = disagreements(inside, group)
        torch.save(found, f"{folder}/{world}-{inside}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[Any, Any]]]:
    """What every process of a world found, by rank."""
    folder = tmp_path_factory.mktemp("contrastive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.set_forkserver_preload(["torch", "vitkernels.navit"])  # imported once, not four times
        mp.start_processes(work, args=(str(folder),), nprocs=4, start_method="forkserver")
    return lambda world: [torch.load(Path(folder) / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]


@needs_gloo
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}-{case[3]}-{'+'.join(map(str, case[1]))}")
def test_value_and_gradients(outcome: Callable[[int], list[dict[Any, Any]]], case: tuple[int, tuple[int, ...], str, str]) -> None:
    world, sizes, kind, dtype = case
    ranks = [found[case] for found in outcome(world)]
    draws = []
    for seed in range(DRAWS):
        eager = shuffled_results(seed, sum(sizes), getattr(torch, dtype), kind)
        exact = dense_results(seed, sum(sizes), torch.float64, kind)
        whole = {}
        for name, like in eager.items():
            parts = [found[seed][name] for found in ranks]
            if name == "loss":
                assert all(part == parts[0] for part in parts), "the loss is not the same number everywhere"
                whole[name] = parts[0]
            else:
                whole[name] = torch.cat(parts) if like.dim() else torch.stack(parts).sum(0)
            assert whole[name].dtype is like.dtype
        draws.append((whole, eager, exact))
    assert_as_exact(draws)


@needs_gloo
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory(outcome: Callable[[int], list[dict[Any, Any]]], kind: str) -> None:
    """Of 128 x 128 logits a process holds 64 x 20 at a time, and saves the features and four numbers a pair."""
    for found in outcome(2):
        elements, saved = found["largest"][kind]
        assert elements == 64 * 20
        assert saved <= 4 * (2 * 64 * WIDTH + 4 * 64 + 2)


@needs_gloo
def test_with_ddp_the_loss_times_the_world_gives_the_exact_parameter_gradients(outcome: Callable[[int], list[dict[Any, Any]]]) -> None:
    model = Towers()
    given = draw(0, 24, torch.float64)
    dense(*model(given["image"].detach(), given["text"].detach()), None, "softmax").backward()
    for found in outcome(2):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["ddp"][name], parameter.grad, rtol=1e-12, atol=1e-15)


@needs_gloo
def test_gradients_wanted_on_one_process_only(outcome: Callable[[int], list[dict[Any, Any]]]) -> None:
    given = draw(0, 24, torch.float64)
    exact = torch.autograd.grad(dense(**given, kind="softmax"), given["text"])[0]
    torch.testing.assert_close(outcome(2)[0]["frozen"], exact[:17], rtol=1e-12, atol=1e-15)


@needs_gloo
def test_processes_that_disagree_all_raise(outcome: Callable[[int], list[dict[Any, Any]]]) -> None:
    for found in outcome(2):
        width, empty, dtype = found["messages"]
        assert "[2, 3] torch.float32 softmax, [2, 4] torch.float32 softmax; D, dtype and kind must be the same" in width
        assert "the batch is empty on every process" in empty
        assert "[2, 3] torch.float32 softmax, [2, 3] torch.bfloat16 softmax" in dtype


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_gradcheck_without_torch_distributed(kind: str, chunk: int) -> None:
    given = draw(0, 9, torch.float64)
    operands = [value for name, value in given.items() if name != "bias" or kind == "sigmoid"]

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return contrastive_loss(image, text, scale, kind=kind, bias=bias, chunk=chunk)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, operands)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(kind: str, dtype: torch.dtype) -> None:
    """Logits and sums are float32: against float64 on the same features the loss is as near as a float32 loss, the gradients but for one rounding.
    Under autocast, too.
    """
    given = {name: value.detach().to(dtype if value.dim() else torch.float32).requires_grad_() for name, value in draw(0, 40, torch.float32).items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    bias = {} if kind == "softmax" else {"bias": given["bias"]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(given["image"], given["text"], given["logit_scale"], **bias, kind=kind, chunk=16)  # type: ignore[arg-type]
    found, truth = results(loss, given, kind), results(dense(**exact, kind=kind), exact, kind)
    assert found["loss"].dtype is torch.float32
    for name, value in found.items():
        eps = torch.finfo(value.dtype).eps
        scale = truth[name].abs().max()
        assert (value.double() - truth[name]).abs().max() <= (eps / 2 + 40 * torch.finfo(torch.float32).eps) * scale, name


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_large_logits_neither_overflow_nor_vanish(kind: str) -> None:
    """Logits of some thousands: exp of any of them overflows, and the true loss is finite."""
    draws = []
    for seed in range(DRAWS):
        given = draw(seed, 20, torch.float64, 5000.0)
        bias = None if kind == "softmax" else given["bias"]
        loss = contrastive_loss(given["image"], given["text"], given["logit_scale"], kind=kind, bias=bias, chunk=6)  # type: ignore[arg-type]
        assert 0 < float(loss.detach()) < 20 * 5000
        args = (seed, 20, torch.float64, kind, 5000.0)
        draws.append((results(loss, given, kind), shuffled_results(*args), dense_results(*args)))
    assert_as_exact(draws)


def test_a_second_derivative_raises() -> None:
    given = draw(0, 4, torch.float64)
    loss = contrastive_loss(given["image"], given["text"], given["logit_scale"])
    (grad,) = torch.autograd.grad(loss, given["image"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kind": "clip"}, ValueError, "kind is 'clip'"),
        ({"bias": 0.0}, ValueError, "bias is given with kind='softmax'"),
        ({"chunk": 0}, ValueError, "chunk is 0"),
        ({"text": torch.zeros(3, 5)}, ValueError, r"image has shape \[4, 5\] and text \[3, 5\]"),
        ({"text": torch.zeros(4, 5, dtype=torch.float64)}, TypeError, "image is torch.float32 on cpu, text torch.float64"),
        ({"image": torch.zeros(4, 5, dtype=torch.int64), "text": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "floating dtype"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale has shape \[2\]; it must have one element"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        contrastive_loss(**{"image": torch.zeros(4, 5), "text": torch.zeros(4, 5), "logit_scale": 1.0, **change})
