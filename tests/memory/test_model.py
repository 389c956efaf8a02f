"""``MemoryViT`` against the paper's formula, and what it promises: the ViT's own outputs to the bit, tasks that do not see each other, files."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkernels
from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.integrations.folded import left_to_pytorch
from vitkernels.memory import MemoryTask, MemoryViT
from vitkernels.memory.layers import frame_of

from .. import zoo

SIZES = (3, 0, 10, 1, 4)  # tokens of memory of five tasks


def timm_vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    small = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return VisionTransformer(**{**small, **options})


def transformers_vit(kind: str = "ViTForImageClassification") -> nn.Module:
    import transformers

    small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
    return getattr(transformers, kind)(transformers.ViTConfig(**small))


def vit_pytorch_vit(kind: str = "vit") -> nn.Module:
    import importlib

    small = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 3, "heads": 3, "mlp_dim": 96, "dim_head": 16}
    return importlib.import_module(f"vit_pytorch.{kind}").ViT(**small)


VITS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm, norms of q and k, scaled layers": lambda: timm_vit(qk_norm=True, init_values=0.3, reg_tokens=2, global_pool="avg"),
    "transformers": transformers_vit,
    "transformers, no head": lambda: transformers_vit("ViTModel"),
    "vit_pytorch": vit_pytorch_vit,
    "vit_pytorch, of the adapter": lambda: vit_pytorch_vit("learnable_memory_vit"),
}
EACH = pytest.mark.parametrize("kind", VITS)


def a_vit(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return zoo.jitter(VITS[kind](), 1, eps=0.1).eval()


@pytest.fixture
def images() -> Tensor:
    return zoo.photos(32)


def with_tasks(vit: nn.Module, sizes: tuple[int, ...] = SIZES, **options: Any) -> MemoryViT:
    model = MemoryViT(vit, **options)
    for i, memories in enumerate(sizes):
        model.add_task(str(i), 3 + i, memories, norm_memory=i % 2 == 0)
    with torch.no_grad():
        for parameter in model.tasks.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def tensor_of(output: Any) -> Tensor:
    """Of a model's result."""
    return output if isinstance(output, Tensor) else output.logits if "logits" in output else output.last_hidden_state


# --- the formula -------------------------------------------------------------------------------------------------------------------


def _layers(vit: Any) -> list[Any]:
    vit = getattr(vit, "vit", vit)
    return list(vit.blocks if hasattr(vit, "blocks") else vit.layers if hasattr(vit, "layers") else vit.transformer.layers)


def by_the_paper(vit: nn.Module, task: MemoryTask, images: Tensor) -> Tensor:
    """z_l = [class token; tokens; memory_l], y_l = layer(z_l) under the mask, whose memory is dropped; by timm's and transformers' own layers."""
    layers = _layers(vit)
    seen: list[Tensor] = []
    handle = layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        vit(images)
    handle.remove()
    x = torch.cat([task.class_token.expand(len(images), 1, -1), seen[0]], dim=1)
    memories = task.memory.shape[1]
    total = x.shape[1] + memories
    mask = torch.ones(total, total, dtype=torch.bool)
    mask[1 : -memories or None, 0] = False  # the model's tokens do not see the task's class token ...
    mask[1 : total - memories, total - memories :] = False  # ... nor its memory
    for index, layer in enumerate(layers):
        z = torch.cat([x, task.memory[index].expand(len(images), -1, -1)], dim=1)
        y = layer(z, mask[None, None].expand(len(images), 1, -1, -1)) if "transformers" in type(layer).__module__ else layer(z, attn_mask=mask)
        x = y[:, : total - memories]
    return task(x[:, 0])


@pytest.mark.parametrize("kind", [kind for kind in VITS if "vit_pytorch" not in kind])
def test_it_is_the_papers_formula(kind: str, images: Tensor) -> None:
    vit, images = a_vit(kind).double(), images.double()
    model = MemoryViT(vit)
    task = model.add_task("a", 4, 5)
    assert task.norm_memory
    with torch.no_grad():
        task.memory.add_(torch.randn_like(task.memory))
    got, expected = model(images).tasks["a"], by_the_paper(vit, task, images)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(got)
    for name, parameter in task.named_parameters():
        (a,), (b,) = (torch.autograd.grad((x * weights).sum(), parameter, retain_graph=True) for x in (got, expected))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_without_the_norm_it_is_vit_pytorchs_adapter(images: Tensor) -> None:
    from vit_pytorch.learnable_memory_vit import Adapter

    vit, images = a_vit("vit_pytorch, of the adapter").double(), images.double()
    adapter = Adapter(vit=vit, num_memories_per_layer=6, num_classes=4).double()
    model = MemoryViT(vit)
    task = model.add_task("a", 4, 6, norm_memory=False)
    with torch.no_grad():
        for ours, theirs in zip(
            (task.class_token, task.memory, *task.norm.parameters(), *task.head.parameters()),
            (adapter.memory_cls_token, adapter.memories_per_layer, *adapter.mlp_head.parameters()),
            strict=True,
        ):
            ours.copy_(theirs)
    torch.testing.assert_close(model(images).tasks["a"], adapter(images), rtol=1e-10, atol=1e-12)


# --- nothing changes the ViT, no task another one ----------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("accelerated", [False, True], ids=["original", "accelerated"])
def test_the_vit_is_the_same_to_the_bit_with_any_tasks(kind: str, accelerated: bool, images: Tensor) -> None:
    vit = a_vit(kind)
    if accelerated:
        vitkernels.accelerate(vit)
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    with torch.no_grad():
        by_itself = tensor_of(vit(images))
        # Alone an accelerated ViT may leave out tokens that nobody reads, which rounds another way; what it is here is the same with any tasks.
        expected = tensor_of(with_tasks(vit, ())(images).base) if accelerated else by_itself
        torch.testing.assert_close(expected, by_itself, rtol=1e-4, atol=1e-5)
        for count in (0, 1, 5):
            output = with_tasks(vit, SIZES[:count])(images)
            assert torch.equal(tensor_of(output.base), expected) and len(output.tasks) == count
    model = with_tasks(vit).train()
    output = model(images)
    # With gradients the layers of an accelerated ViT run one by one.
    assert torch.equal(tensor_of(output.base), tensor_of(with_tasks(vit, ()).train()(images).base) if accelerated else expected)
    sum(logits.square().sum() for logits in output.tasks.values()).backward()
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())
    with torch.no_grad():
        assert torch.equal(tensor_of(vit(images)), by_itself), "a hook stayed behind"
    assert not any(module._forward_hooks for module in vit.modules())


@EACH
def test_tasks_do_not_see_each_other(kind: str, images: Tensor) -> None:
    vit, images = a_vit(kind).double(), images.double()
    together = with_tasks(vit)
    with torch.no_grad():
        expected = together(images).tasks
        for name in together.tasks:
            alone = MemoryViT(vit)
            alone.attach(name, together.tasks[name])
            torch.testing.assert_close(alone(images).tasks[name], expected[name], rtol=1e-10, atol=1e-12)
            wrong = copy.deepcopy(together)
            wrong.tasks[name].memory.add_(1.0)
            wrong.tasks[name].class_token.add_(torch.randn_like(wrong.tasks[name].class_token))
            for other, logits in wrong(images).tasks.items():
                assert torch.equal(logits, expected[other]) == (other != name)


@EACH
def test_tasks_apart_are_the_same_to_the_bit(kind: str, images: Tensor) -> None:
    vit = a_vit(kind)
    together = with_tasks(vit, apart=True)
    with torch.no_grad():
        expected = together(images).tasks
        for name in together.tasks:
            alone = MemoryViT(vit, apart=True).eval()
            alone.attach(name, together.tasks[name])
            assert torch.equal(alone(images).tasks[name], expected[name])


# --- training ----------------------------------------------------------------------------------------------------------------------


def test_the_vit_is_frozen_and_stays_in_evaluation(images: Tensor) -> None:
    vit = timm_vit(drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    model = with_tasks(vit).train()
    assert model.tasks.training and not any(module.training for module in vit.modules())
    first, second = (model(images) for _ in range(2))
    assert torch.equal(first.base, second.base) and not first.base.requires_grad
    sum(logits.square().sum() for logits in first.tasks.values()).backward()
    assert all(p.grad is not None for p in model.tasks.parameters() if p.numel())
    assert all(p.grad is None and not p.requires_grad for p in vit.parameters())


def test_backward_passes_through_the_rows_of_tasks_alone(images: Tensor) -> None:
    class Logits(nn.Module):
        def __init__(self, model: MemoryViT) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).tasks["0"]

    frozen, free = (zoo.saved_bytes(Logits(with_tasks(a_vit("timm"), (4,), freeze=freeze)), images) for freeze in (True, False))
    keys_and_values = 3 * 2 * 48 * 4 * 17 * len(images)  # of three layers: what class tokens attend to is all that is kept of the other tokens
    assert frozen < keys_and_values * 2 < free


def test_a_vit_that_is_not_frozen_gets_gradients_from_its_tasks(images: Tensor) -> None:
    vit = a_vit("timm").double()
    model = with_tasks(vit, (4,), freeze=False)
    logits = model(images.double()).tasks["0"]
    weight = vit.blocks[0].mlp.fc1.weight  # of the tokens that the class token sees from the second layer on
    (got,) = torch.autograd.grad(logits.square().sum(), weight)
    direction = torch.randn_like(weight)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            weight.add_(direction, alpha=step)
            values.append(model(images.double()).tasks["0"].square().sum())
    torch.testing.assert_close((got * direction).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_an_input_may_want_a_gradient(images: Tensor) -> None:
    model = with_tasks(a_vit("timm"))
    images.requires_grad_()
    model(images).tasks["0"].sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


# --- what is kept ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["memory", "vit", "data", "option"])
def test_what_is_kept_of_the_memory_follows_the_weights(change: str, images: Tensor) -> None:
    model = with_tasks(a_vit("timm"))
    with torch.no_grad():
        before = model(images).tasks
        assert all(torch.equal(value, before[name]) for name, value in model(images).tasks.items())
        if change == "memory":
            model.tasks["0"].memory.mul_(2)
        elif change == "vit":
            model.vit.blocks[1].attn.qkv.weight.mul_(1.5)
        elif change == "data":
            model.tasks["0"].memory.data = torch.randn_like(model.tasks["0"].memory)
        else:
            model.tasks["0"].norm_memory = False
        after = model(images).tasks["0"]
        assert not torch.equal(after, before["0"])
        torch.testing.assert_close(after, copy.deepcopy(model)(images).tasks["0"], rtol=0, atol=0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.skipif(backends.why_not("inverted_bottleneck", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels")
def test_plain_layers_are_passes_in_evaluation(kind: str, dtype: torch.dtype, images: Tensor) -> None:
    """By the rule against float64, beside the modules' own calls, which a gradient wanted asks for; a hook inside and a weight's change are seen."""
    model, images = with_tasks(a_vit(kind)).to(dtype), images.to(dtype)
    exact = copy.deepcopy(model).double()(images.double()).tasks
    one = torch.randn(2, 5, 48, dtype=dtype)

    def packed() -> list[bool]:
        with torch.no_grad():
            return [layer.passes(one) is not None for layer in frame_of(model.vit).layers]

    scaled = "scaled" in kind and dtype in (torch.bfloat16, torch.float16)
    assert set(packed()) == {left_to_pytorch(dtype) is None and not scaled} and frame_of(model.vit).layers[0].passes(one) is None
    called = model(images).tasks
    with torch.no_grad():
        passed = model(images).tasks
    for name, truth in exact.items():
        verdict = compare_tensors(name, passed[name], called[name], truth)
        assert verdict.holds, verdict
    norm, seen = next(m for m in _layers(model.vit)[1].modules() if isinstance(m, nn.LayerNorm)), []
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with torch.no_grad():
        again = model(images).tasks
    hook.remove()
    assert len(SIZES) in seen
    for name, truth in exact.items():
        assert compare_tensors(name, again[name], called[name], truth).holds
    with torch.no_grad():
        norm.weight.mul_(2)
        assert not torch.equal(model(images).tasks["0"], passed["0"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["timm", "transformers", "transformers, no head", "vit_pytorch"])
@pytest.mark.skipif(backends.why_not("inverted_bottleneck", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels")
def test_tasks_go_along_in_the_one_call_of_an_accelerated_vit(kind: str, dtype: torch.dtype, images: Tensor) -> None:
    if left_to_pytorch(dtype) is not None:
        pytest.skip("PyTorch's own has products in 16 bits, and the kernels have not")
    original = with_tasks(a_vit(kind)).to(dtype)
    model, images = copy.deepcopy(original), images.to(dtype)
    vitkernels.accelerate(model.vit)

    def calls(model: MemoryViT) -> dict[str, int]:
        with torch.no_grad(), torch.profiler.profile() as profile:
            model(images)
        counts = {event.key: event.count for event in profile.key_averages()}
        return {name: counts.get(f"vitkernels::{name}", 0) for name in ("transformer_blocks", "memory_attention")}

    exact = copy.deepcopy(original).double()(images.double()).tasks
    with torch.no_grad():
        found = model(images)
        eager = {name: logits.detach() for name, logits in original(images).tasks.items()}
    assert calls(model) == {"transformer_blocks": 1, "memory_attention": 0} and len(found.tasks) == len(SIZES)
    for name, truth in exact.items():
        verdict = compare_tensors(name, found.tasks[name], eager[name], truth)
        assert verdict.holds, verdict
    assert calls(with_tasks(model.vit, apart=True).to(dtype))["memory_attention"] == 3 * len(SIZES)
    norm = next(m for m in _layers(model.vit)[1].modules() if isinstance(m, nn.LayerNorm))
    hook = norm.register_forward_hook(lambda *_: None)
    assert calls(model) == {"transformer_blocks": 0, "memory_attention": 3}
    hook.remove()
    with torch.no_grad():
        model.tasks["0"].memory.add_(torch.randn_like(model.tasks["0"].memory))
        assert not torch.equal(model(images).tasks["0"], found.tasks["0"])
        assert torch.equal(tensor_of(model(images).base), tensor_of(found.base))


@EACH
def test_autocast_and_low_precision(kind: str, images: Tensor) -> None:
    model = with_tasks(a_vit(kind))
    with torch.no_grad():
        expected = model(images).tasks
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images).tasks
        halved = model.bfloat16()(images.bfloat16()).tasks
    for name, logits in expected.items():
        for other in (found, halved):
            torch.testing.assert_close(other[name].float(), logits, rtol=0.1, atol=0.1)


def test_copies_and_pickles(images: Tensor) -> None:
    model = with_tasks(a_vit("timm"))
    with torch.no_grad():
        expected = model(images).tasks
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(value, expected[name]) for name, value in twin(images).tasks.items())


# --- files -------------------------------------------------------------------------------------------------------------------------


def test_a_task_goes_through_a_file(tmp_path: Path, images: Tensor) -> None:
    vit = a_vit("timm")
    model = with_tasks(vit, apart=True)
    for name in model.tasks:
        model.save_task(name, tmp_path / name)
    weights = sum(p.numel() * 4 for p in model.tasks["0"].parameters())
    assert (tmp_path / "0").stat().st_size < weights + 4096, "more than the task is in the file"
    again = MemoryViT(vit, apart=True).eval()
    for name in reversed(list(model.tasks)):
        again.load_task(tmp_path / name, name=f"task {name}")
    with torch.no_grad():
        expected, found = model(images).tasks, again(images).tasks
    assert list(found) == [f"task {name}" for name in reversed(list(expected))]
    assert all(torch.equal(found[f"task {name}"], logits) for name, logits in expected.items())


def test_a_file_is_for_the_vit_it_was_trained_on(tmp_path: Path) -> None:
    vit = a_vit("timm")
    with_tasks(vit, (4,)).save_task("0", tmp_path / "task")
    with torch.no_grad():
        vit.blocks[2].mlp.fc2.bias[0] += 1e-3
    other = MemoryViT(vit)
    with pytest.raises(ValueError, match="trained on other weights"):
        other.load_task(tmp_path / "task")
    other.load_task(tmp_path / "task", check_vit=False)
    assert list(other.tasks) == ["0"]


# --- refusals ----------------------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    model = MemoryViT(a_vit("timm"))
    model.add_task("a", 3)
    with pytest.raises(ValueError, match="'a', which is a task already"):
        model.add_task("a", 3)
    with pytest.raises(ValueError, match="num_classes is 0; it must be an integer, at least 1"):
        model.add_task("b", 0)
    with pytest.raises(ValueError, match=r"memory \[4, 10, 48\]; it must be \[3, m, 48\]"):
        model.attach("b", MemoryTask(4, 48, 2))
    with pytest.raises(TypeError, match="task is a Linear"):
        model.attach("b", nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'b'; it must be one of the tasks, 'a'"):
        model.save_task("b", tmp_path / "b")
    torch.save({"state": {}}, tmp_path / "b")
    with pytest.raises(ValueError, match="is not a task"):
        model.load_task(tmp_path / "b")
    with pytest.raises(TypeError, match=r"vit is a torch\.nn\.modules\.linear\.Linear"):
        MemoryViT(nn.Linear(2, 2))


def test_layers_of_another_kind_are_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(TypeError, match=r"ParallelScalingBlock; it must be a timm\.models\.vision_transformer\.Block"):
        MemoryViT(timm_vit(block_fn=ParallelScalingBlock))


def test_a_layer_that_does_not_run_is_noticed(images: Tensor) -> None:
    model = with_tasks(a_vit("timm"))
    with pytest.raises(RuntimeError, match="ran 2 of its 3 layers"):
        model.vit.forward = lambda x: model.vit.blocks[:2](model.vit.patch_embed(x))
        model(images)


# --- the example -------------------------------------------------------------------------------------------------------------------


def test_the_example_learns_two_tasks_and_loses_none(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = root / "examples" / "memory" / "learn_two_tasks.py"
    if not script.is_file():
        pytest.skip("the examples are not part of this copy")
    options = ["--epochs", "6", "--task-epochs", "8", "--memories", "4", "--files", str(tmp_path)]
    # By way of conftest, which lets a torchvision for GPUs be imported.
    run = f"import tests.conftest, runpy, sys; sys.argv = {[str(script), *options]!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracies = [float(value) for value in re.findall(r"([\d.]+)%", done.stdout)]
    assert len(accuracies) == 5 and accuracies[1:3] == accuracies[3:], done.stdout
    assert accuracies[1] > 35 and accuracies[2] > 60, f"no better than guessing: {done.stdout}"
    assert done.stdout.count("the same to the bit: True") == 2, done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["high.pt", "parity.pt"]
