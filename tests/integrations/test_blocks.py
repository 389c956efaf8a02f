"""Transformer blocks in evaluation as one native call, and the original as soon as anything else is wanted."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import vitkernels
from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.integrations.folded import left_to_pytorch
from vitkernels.nn._folded import onednn

from .. import zoo
from ..zoo import assert_follows, assert_right, infer, reasons

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not("inverted_bottleneck", "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]
DIM = 40


def layer(name: str) -> Any:
    return getattr(importlib.import_module("timm.layers"), name)


def timm_block(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import Block

    return Block(DIM, 5, mlp_ratio=2.5, **options)


def vit_pytorch(kind: str, **options: Any) -> nn.Module:
    module = importlib.import_module(f"vit_pytorch.{kind}")
    return module.Transformer(**{"dim": DIM, "depth": 2, "heads": 3, "dim_head": 12, "mlp_dim": 50, **options})


def transformers(name: str, **options: Any) -> nn.Module:
    import transformers as package

    config = getattr(package, f"{name}Config")(
        **{"hidden_size": DIM, "num_attention_heads": 5, "intermediate_size": 50, "num_hidden_layers": 1, **options}
    )
    config._attn_implementation = "sdpa"
    module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    return getattr(module, f"{name}Layer")(config)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm_block(qkv_bias=True),
    "timm, all options": lambda: timm_block(qk_norm=True, scale_attn_norm=True, proj_bias=False, init_values=0.3, drop_path=0.2, attn_drop=0.1),
    "timm, CLIP's GELU": lambda: timm_block(act_layer=layer("QuickGELU")),
    "timm, GELU by tanh": lambda: timm_block(act_layer=functools.partial(nn.GELU, approximate="tanh")),
    "vit": lambda: vit_pytorch("vit", dropout=0.1),
    "simple_vit": lambda: vit_pytorch("simple_vit"),
    "deepvit": lambda: vit_pytorch("deepvit"),
    "ViT": lambda: transformers("ViT"),
    "DeiT": lambda: transformers("DeiT", qkv_bias=False),
    "Dinov2": lambda: transformers("Dinov2", drop_path_rate=0.2, layerscale_value=0.3),
}


TRANSFORMERS = ("ViT", "DeiT", "Dinov2")


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    torch.manual_seed(0)
    original, accelerated, handle = zoo.pair(make(), torch.randn(2, 5, DIM))
    return original.eval(), accelerated.eval(), handle


def calls_of(model: nn.Module, x: Tensor) -> list[str]:
    """Every operation of a call that is no view."""
    with torch.profiler.profile() as profile:
        infer(model, x)
    views = ("view", "reshape", "transpose", "unsqueeze", "squeeze", "unbind", "select", "flatten", "mT", "as_strided", "permute", "expand", "empty")
    names = [event.key.partition("::")[2] for event in profile.key_averages() for _ in range(event.count)]
    return sorted(name for name in names if name and not name.startswith(("_", *views)))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str) -> None:
    """Batches of any size, tokens in any arrangement; what comes out is contiguous."""
    original, accelerated, handle = pair(BLOCKS[kind])
    assert handle.replaced[0].path == "" and handle.replaced[0].op == "transformer_blocks" and not handle.skipped
    inputs = [torch.randn(*shape, DIM) for shape in ((1, 1), (3, 17), (2, 70))]
    inputs += [torch.randn(2, DIM, 9).mT, torch.randn(2, 9, 2 * DIM)[..., ::2], torch.randn(9, DIM).expand(3, 9, DIM)]
    if kind not in TRANSFORMERS:  # whose views of no image fail
        inputs.append(torch.randn(0, 5, DIM))
    for x in inputs:
        before = x.clone()
        assert_right(accelerated, original, x)
        assert infer(accelerated, x).is_contiguous() and torch.equal(x, before)
    assert not handle.fallbacks
    for model in (original, accelerated):
        with pytest.raises(RuntimeError, match=r"mat1 and mat2|normalized_shape"):
            infer(model, torch.randn(2, 5, DIM + 1))


def test_one_call_and_no_copy() -> None:
    _, accelerated, _ = pair(BLOCKS["timm"])
    x = torch.randn(2, 17, DIM)
    infer(accelerated, x)
    assert calls_of(accelerated, x) == ["transformer_blocks"]


@pytest.mark.parametrize("kind", ["timm", "timm, all options", "deepvit", "Dinov2"])
def test_blocks_follow_their_weights(kind: str) -> None:
    """A step of training, writes in place, settings, load_state_dict, a change of dtype and back, a copy, and remove()."""
    x = torch.randn(2, 9, DIM)
    original, accelerated, handle = pair(BLOCKS[kind])
    first = {name: tensor.clone() for name, tensor in original.state_dict().items()}

    def changed(change: Callable[[nn.Module], object]) -> None:
        assert_follows(change, accelerated, original, x)

    def step(model: nn.Module) -> None:
        torch.manual_seed(1)
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the fused attention draws other masks
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(x).square().mean().backward()
        optimizer.step()
        model.eval()

    assert_right(accelerated, original, x)
    changed(step)
    for name, tensor in original.state_dict().items():
        if name.endswith(("gamma", "lambda1", "norm2.weight", "q_norm.bias", "reattn_weights", "qkv.weight", "o_proj.bias")):
            assert tensor.is_floating_point()
            changed(lambda model, name=name: model.state_dict()[name].add_(0.1))
    changed(lambda model: model.load_state_dict(first))
    attention = next(name for name, module in original.named_modules() if "scale" in module.__dict__ or "scaling" in module.__dict__)
    if getattr(original.get_submodule(attention), "fused_attn", None) is None:  # timm's SDPA does not read it
        setting = "scaling" if kind == "Dinov2" else "scale"
        changed(lambda model: setattr(model.get_submodule(attention), setting, 0.9))
    assert_right(copy.deepcopy(accelerated), original, x)
    assert_right(accelerated.bfloat16().float(), original.bfloat16().float(), x)
    assert not handle.fallbacks
    handle.remove()
    assert type(accelerated) is type(original) and torch.equal(infer(accelerated, x), infer(original, x))


def test_a_sequence_of_blocks_is_one_call() -> None:
    """Until somebody's hook waits inside: then each block is by itself, and what the hook is on its original."""
    original, accelerated, handle = pair(lambda: nn.Sequential(*(timm_block(qkv_bias=True) for _ in range(3))))
    x, seen = torch.randn(2, 9, DIM), []
    assert_right(accelerated, original, x)
    assert [record.path for record in handle.replaced if record.op == "transformer_blocks"] == ["", "0", "1", "2"]
    assert calls_of(accelerated, x) == ["transformer_blocks"]
    hook = accelerated[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_right(accelerated, original, x)
    assert seen == [x.shape] and calls_of(accelerated, x) == ["transformer_blocks"] * 3
    hook.remove()
    assert_follows(lambda model: model.state_dict()["2.attn.proj.weight"].mul_(2), accelerated, original, x)
    assert calls_of(accelerated, x) == ["transformer_blocks"] and not handle.fallbacks
    for model in (original, accelerated):
        model[1].forward = lambda x: 2 * x
    assert_right(accelerated, original, x)
    for model in (original, accelerated):
        del model[1].forward
        model.append(nn.Linear(DIM, DIM).requires_grad_(False))
        nn.init.eye_(model[3].weight)
        nn.init.zeros_(model[3].bias)
    assert_right(accelerated, original, x)
    for model in (original, accelerated):
        del model[3]
    assert torch.equal(infer(accelerated[:0], x), x)
    assert_right(accelerated, original, x)
    assert calls_of(accelerated, x) == ["transformer_blocks"]
    partly = vitkernels.accelerate(copy.deepcopy(original), skip="1")
    assert zoo.reasons(partly)[""] == "its 1 is not replaced"
    handle.remove()
    assert type(accelerated) is nn.Sequential and torch.equal(infer(accelerated, x), infer(original, x))


@pytest.mark.parametrize("kind", ["timm, all options", "vit", "ViT", "DeiT", "Dinov2"])
def test_training_and_gradients_are_the_originals(kind: str) -> None:
    """Through the replaced attention inside."""
    original, accelerated, handle = pair(BLOCKS[kind])
    x = torch.randn(2, 9, DIM)
    zoo.assert_same(original, accelerated, x, training=False)
    assert not handle.fallbacks and any(record.op == "attention" for record in handle.replaced)


def test_a_copy_of_a_model_in_evaluation_runs_folded() -> None:
    """Einops makes its layers anew in a copy, in training mode, which changes nothing of what they do."""
    model = copy.deepcopy(BLOCKS["deepvit"]().eval())
    assert any(module.training for module in model.modules())
    handle = vitkernels.accelerate(model)
    infer(model, torch.randn(1, 7, DIM))
    assert "ran the original" not in str(handle), str(handle)


@pytest.mark.parametrize("kind", ["timm", "deepvit", "ViT"])
def test_a_hook_inside_is_called(kind: str) -> None:
    original, accelerated, handle = pair(BLOCKS[kind])
    x, seen = torch.randn(2, 9, DIM), []
    infer(accelerated, x)
    norm = next(module for module in accelerated.modules() if isinstance(module, nn.LayerNorm))
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_right(accelerated, original, x)
    assert len(seen) == 1 and "hook" in handle.fallbacks[""]
    hook.remove()
    before = len(seen)
    assert_right(accelerated, original, x)
    assert len(seen) == before


def test_masks_are_the_originals() -> None:
    original, accelerated, _ = pair(BLOCKS["timm"])
    x, mask = torch.randn(2, 9, DIM), torch.rand(9, 9) > 0.3
    mask.fill_diagonal_(True)
    assert not torch.allclose(infer(accelerated, x), infer(accelerated, x, attn_mask=mask))
    for given in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": None, "is_causal": False}):
        torch.testing.assert_close(infer(accelerated, x, **given), infer(original, x, **given))


def test_autocast_is_the_originals() -> None:
    original, accelerated, _ = pair(BLOCKS["vit"])
    x = torch.randn(2, 9, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = infer(accelerated, x), infer(original, x)
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


LEFT = [dtype for dtype in (torch.bfloat16, torch.float16, torch.float64) if left_to_pytorch(dtype) is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    if dtype in LEFT:
        pytest.skip("PyTorch's own has products in 16 bits, and the kernels have not")
    original, accelerated, handle = pair(BLOCKS[kind])
    x = torch.randn(2, 9, DIM, dtype=dtype)
    scaled = dtype is torch.bfloat16 and onednn(dtype) and kind in ("timm, all options", "Dinov2")
    exact = infer(copy.deepcopy(original).double(), x.double())
    found = compare_tensors("tokens", infer(accelerated.to(dtype), x), infer(original.to(dtype), x), exact)
    assert found.holds, found
    assert ("LayerScale" in handle.fallbacks.get("", "")) is scaled and (scaled or not handle.fallbacks)


@pytest.mark.parametrize("dtype", LEFT, ids=str)
def test_other_dtypes_keep_the_original(dtype: torch.dtype) -> None:
    original, accelerated, handle = pair(BLOCKS["timm"])
    x = torch.randn(2, 9, DIM, dtype=dtype)
    found = compare_tensors(
        "tokens", infer(accelerated.to(dtype), x), infer(original.to(dtype), x), infer(copy.deepcopy(original).double(), x.double())
    )
    assert found.holds and str(dtype) in handle.fallbacks[""]
    assert str(dtype) in zoo.reasons(vitkernels.accelerate(copy.deepcopy(original)))[""]


def other_blocks() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    return {
        "activation": (lambda: timm_block(act_layer=nn.Mish), "its activation is a Mish"),
        "mlp": (lambda: timm_block(mlp_layer=layer("GluMlp")), "its MLP is a GluMlp"),
        "norm": (lambda: timm_block(norm_layer=layer("RmsNorm")), "its norm is a RmsNorm"),
        "swiglu": (lambda: transformers("Dinov2", use_swiglu_ffn=True), "its MLP is a Dinov2SwiGLUFFN"),
        "no projection": (lambda: vit_pytorch("vit", heads=1, dim_head=DIM), "a Identity stands where a plain Linear should"),
    }


@pytest.mark.parametrize("kind", ["activation", "mlp", "norm", "swiglu", "no projection"])
def test_another_block_is_left_alone(kind: str) -> None:
    make, words = other_blocks()[kind]
    original, accelerated, handle = pair(make)
    assert zoo.reasons(handle)[""] == words
    assert_right(accelerated, original, torch.randn(2, 9, DIM))


def test_compile_and_export_see_the_original() -> None:
    original, accelerated, _ = pair(BLOCKS["timm"])
    x = torch.randn(2, 9, DIM)
    exported = torch.export.export(accelerated, (x,))
    assert not any("vitkernels" in str(node.target) for node in exported.graph.nodes)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(accelerated, fullgraph=True, backend="aot_eager")(x), original(x))


def test_outputs_that_transformers_records() -> None:
    """Hidden states come from hooks on the layers; attention maps from hooks inside, which have their say, and which SDPA does not give."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    small = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 50, "image_size": 32, "patch_size": 8}
    original, accelerated, handle = zoo.pair(ViTModel(ViTConfig(**small)), zoo.photos(32))
    original.eval(), accelerated.eval()
    images = zoo.photos(32)
    with torch.no_grad():
        ours, theirs = (model(images, output_hidden_states=True).hidden_states for model in (accelerated, original))
        exact = copy.deepcopy(original).double()(images.double(), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3 and not handle.fallbacks
    for mine, eager, truth in zip(ours, theirs, exact, strict=True):
        assert compare_tensors("hidden states", mine, eager, truth).holds


_SMALL = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 50}
_TOWER = {**_SMALL, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(("name", "act"), [("CLIP", "quick_gelu"), ("Siglip", "gelu_pytorch_tanh"), ("Siglip", "gelu_python_tanh")])
def test_vision_towers(name: str, act: str) -> None:
    """CLIP's and SigLIP's: all layers a call in evaluation, the attention in training, the original activation where it is none of PyTorch's."""
    import transformers as package

    torch.manual_seed(0)
    model = getattr(package, f"{name}VisionModel")(getattr(package, f"{name}VisionConfig")(**_TOWER, hidden_act=act))
    images = zoo.photos(32)
    original, accelerated, handle = zoo.pair(model, images)
    replaced = [r.op for r in handle.replaced if "layers" in r.path]
    assert replaced.count("attention") == 2 and replaced.count("transformer_blocks") == (0 if "python" in act else 2)
    assert ("its layer 0 is not replaced" in reasons(handle).values()) == ("python" in act)
    original.eval(), accelerated.eval()

    def tokens(model: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images).last_hidden_state

    exact = tokens(copy.deepcopy(original).double(), images.double())
    assert compare_tensors("tokens", tokens(accelerated, images), tokens(original, images), exact).holds and not handle.fallbacks
    measure = functools.partial(zoo.results, call=lambda model, x: model(x).last_hidden_state)
    zoo.assert_same(original, accelerated, images, training=True, measure=measure)


TOWERS = {"CLIP": "CLIPVision", "Siglip": "SiglipVision", "Dinov2": "Dinov2", "ViT": "ViT", "DeiT": "DeiT"}


@pytest.mark.parametrize("name", TOWERS)
def test_all_layers_of_a_tower_are_one_call(name: str) -> None:
    """Unless a call wants more than the result, or a layer is another; and what it returns is what the original returns."""
    import transformers as package

    torch.manual_seed(0)
    kind = TOWERS[name]
    model = getattr(package, f"{kind}Model")(getattr(package, f"{kind}Config")(**_TOWER, hidden_act="gelu"))
    images = zoo.photos(32)
    original, accelerated, handle = zoo.pair(model, images)
    original.eval(), accelerated.eval()
    exact = copy.deepcopy(original).double()

    def same(calls: int, **options: Any) -> None:
        with torch.profiler.profile() as profile, torch.inference_mode():
            found = accelerated(images, **options)
        with torch.inference_mode():
            eager, truth = original(images, **options), exact(images.double(), **options)
        assert type(found) is type(eager)
        for mine, theirs, right in zip(pytree.tree_leaves(found), pytree.tree_leaves(eager), pytree.tree_leaves(truth), strict=True):
            assert compare_tensors("tensor", mine, theirs, right).holds
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts.get("vitkernels::transformer_blocks", 0) == calls and counts["vitkernels::patch_embedding"] == 1

    same(1)
    same(1, output_hidden_states=False)
    if name in ("ViT", "DeiT"):
        same(2, return_dict=False)
        same(1, return_dict=True)
        same(1, bool_masked_pos=None)
    assert not handle.fallbacks
    same(0, output_hidden_states=True)
    same(0)  # the hooks that collect what is to be recorded, attention maps, too, stay
    handle.remove()
    assert [type(m) for m in accelerated.modules()] == [type(m) for m in original.modules()]


def test_layers_that_are_left_alone_leave_the_encoder_alone() -> None:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**_TOWER))
    handle = vitkernels.accelerate(model, skip="layers.1", dry_run=True)
    assert reasons(handle)[""] == "its layer 1 is not replaced"


def test_a_text_tower_is_causal_still() -> None:
    """CLIP's text goes through layers of the same class, with a mask: texts of several lengths, and of one, which needs no mask of padding."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {**_SMALL, "vocab_size": 30, "max_position_embeddings": 12, "eos_token_id": 29, "bos_token_id": 28, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=_TOWER, projection_dim=16)).eval()
    ids = torch.randint(1, 28, (3, 12))
    ids[:, -1] = 29
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, 7:] = 0
    accelerated = copy.deepcopy(model)
    vitkernels.accelerate(accelerated)
    exact = copy.deepcopy(model).double()
    for mask in (None, whole, padded):
        with torch.no_grad():
            found, eager, truth = (m.text_model(input_ids=ids, attention_mask=mask).last_hidden_state for m in (accelerated, model, exact))
        seen = slice(None) if mask is None else mask.bool()  # what stands in padding nobody reads
        assert compare_tensors("tokens", found[seen], eager[seen], truth[seen]).holds
