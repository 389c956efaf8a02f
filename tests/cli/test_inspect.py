"""`inspect`, and `vitkernels.inspection` beneath it: the figures against maps that are formed, in models of each zoo."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import torch.nn.functional as F
from click.testing import Result
from torch import Tensor, nn

import vitkernels as package
from vitkernels import inspection, report
from vitkernels import nn as ours
from vitkernels.cli import _zoo

from .. import zoo

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 48, "heads": 3, "mlp_dim": 64}


def vit_pytorch_model(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    names = {"deepvit": "DeepViT", "vit": "ViT", "simple_vit": "SimpleViT"}
    return getattr(importlib.import_module(f"vit_pytorch.{kind}"), names[kind])(**{**SMALL, "depth": 4, "dim_head": 20, **options})


def timm_vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10, **options})


def transformers_vit(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(**{**small, "attn_implementation": "eager", **options}))


class AuthorsReAttention(nn.Module):
    """Stands in for the authors' class: its attributes and its maths. ``maps`` holds what its softmax gave."""

    def __init__(self, dim: int, num_heads: int, apply_transform: bool, scale: float) -> None:
        super().__init__()
        self.num_heads, self.scale, self.apply_transform = num_heads, scale, apply_transform
        if apply_transform:
            self.reatten_matrix = nn.Conv2d(num_heads, num_heads, 1)
            self.var_norm = nn.BatchNorm2d(num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop, self.proj = nn.Dropout(0.0), nn.Linear(dim, dim)

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        if self.apply_transform:
            attn = self.var_norm(self.reatten_matrix(attn))
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)), attn


class AuthorsModel(nn.Module):
    """Threads the map of each layer into the next, as the authors' blocks do. The layers differ in scale; the first has no mix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 48, 8, stride=8)
        self.blocks = nn.ModuleList(AuthorsReAttention(48, 3, i > 0, 0.25 + 0.25 * i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, atten = self.stem(x).flatten(2).transpose(1, 2), None
        for block in self.blocks:
            new, atten = block(x, atten)
            x = x + new
        return x


class OursModel(AuthorsModel):
    """Of ``vitkernels.nn.ReAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ours.ReAttention(48, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit_pytorch DeepViT": lambda: vit_pytorch_model("deepvit"),
    "vit_pytorch ViT": lambda: vit_pytorch_model("vit"),
    "vit_pytorch SimpleViT": lambda: vit_pytorch_model("simple_vit"),
    "timm": timm_vit,
    "timm, q and k normalised": lambda: timm_vit(qk_norm=True),
    "timm, unfused": lambda: unfused(timm_vit()),
    "transformers": transformers_vit,
    "the authors'": AuthorsModel,
    "ours": OursModel,
}


def unfused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def spread(model: nn.Module) -> nn.Module:
    """Weights larger than a zoo draws them: maps of random models are uniform, and whatever is compared is alike."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * parameter[0].numel() ** -0.5)
    return model.eval()


class Softmaxes:
    """Every attention map a model forms, of the logits of its softmax or of the q and k of its fused attention, whatever it rounds them to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.maps: list[Tensor] = []
        softmax, attention, re_attention = Tensor.softmax, F.scaled_dot_product_attention, package.ops.re_attention

        def of(q: Tensor, k: Tensor, scale: float) -> None:
            self.maps.append(softmax(q @ k.transpose(-2, -1) * scale, -1))

        def from_logits(x: Tensor, dim: int, **kwargs: Any) -> Tensor:
            self.maps.append(softmax(x, dim))
            return softmax(x, dim, dtype=kwargs.get("dtype"))

        def from_attention(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            of(q, k, q.shape[-1] ** -0.5)
            return attention(q, k, *args, **kwargs)

        def from_re_attention(q: Tensor, k: Tensor, *args: Any, scale: float, **kwargs: Any) -> Any:
            before = len(self.maps)
            out = re_attention(q, k, *args, scale=scale, **kwargs)
            del self.maps[before:]  # of the reference, where that ran
            of(q, k, scale)
            return out

        patch.setattr(Tensor, "softmax", from_logits)
        patch.setattr(F, "softmax", from_logits)
        patch.setattr(F, "scaled_dot_product_attention", from_attention)
        patch.setattr(package.ops, "re_attention", from_re_attention)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module, Tensor], list[Tensor]]]:
    """Run a model and return the maps it formed."""

    def run(model: nn.Module, images: Tensor) -> list[Tensor]:
        with monkeypatch.context() as patch, torch.no_grad():
            seen = Softmaxes(patch)
            model.eval()(images)
        return seen.maps

    yield run


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_the_maps_the_model_forms(name: str, dim: int, formed: Callable[..., list[Tensor]]) -> None:
    """In float64, where whatever is left between them is rounding."""
    model, images = spread(MODELS[name]()).double(), zoo.photos(32, 3).double()
    found = inspection.layer_similarities(model, images, dim=dim)
    maps = formed(model, images)
    assert len(found.layers) == len(maps) >= 3 and not found.skipped
    for i, (layer, now) in enumerate(zip(found.layers, maps, strict=True)):
        assert (layer.heads, layer.tokens) == (now.shape[1], now.shape[2]) and layer.head_dim in (16, 20)
        across = F.cosine_similarity(now[:, :, None], now[:, None], dim=dim).mean((0, 3))
        torch.testing.assert_close(layer.across_heads, across, rtol=1e-10, atol=0)
        off_diagonal = (across.sum(1) - across.diagonal()) / (layer.heads - 1)
        torch.testing.assert_close(layer.with_others, off_diagonal, rtol=1e-10, atol=0)
        if i == 0:
            assert layer.adjacent is None and layer.note == "the first layer"
        else:
            assert layer.adjacent is not None and layer.note == ""
            adjacent = F.cosine_similarity(maps[i - 1], now, dim=dim).mean((0, 2))
            torch.testing.assert_close(layer.adjacent, adjacent, rtol=1e-10, atol=0)
            assert adjacent.max() < 0.999, "all maps are alike: nothing was tested"


def test_the_model_is_left_as_it_was() -> None:
    model, images = vit_pytorch_model("deepvit"), zoo.photos(32)
    model.train().transformer.layers[1].eval()
    modes = [module.training for module in model.modules()]
    inspection.layer_similarities(model, images)
    with pytest.raises(RuntimeError):
        inspection.layer_similarities(model, images[:, :2])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


def test_dropout_does_not_count() -> None:
    """It runs in eval mode, whatever mode it is given in."""
    model = spread(vit_pytorch_model("deepvit", dropout=0.5, emb_dropout=0.5))
    first = inspection.layer_similarities(model, zoo.photos(32)).rows()
    assert inspection.layer_similarities(model.train(), zoo.photos(32)).rows() == first


def test_an_accelerated_deepvit() -> None:
    model, images = spread(vit_pytorch_model("deepvit")).double(), zoo.photos(32).double()
    original = inspection.layer_similarities(model, images)
    handle = package.accelerate(accelerated := copy.deepcopy(model))
    assert len(handle.replaced) == 4
    fused = inspection.layer_similarities(accelerated, images)
    assert [layer.path for layer in fused.layers] == [layer.path for layer in original.layers]
    for one, other in zip(original.layers[1:], fused.layers[1:], strict=True):
        assert one.adjacent is not None and other.adjacent is not None
        torch.testing.assert_close(other.adjacent, one.adjacent, rtol=1e-9, atol=0)


def test_only_the_layer_before_is_kept() -> None:
    """When a layer's projection has run, its memory and that of the layer before are held, and no other's."""
    alive: list[int] = []
    seen: list[Any] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(weakref.ref(output.untyped_storage()))
        alive.append(sum(reference() is not None for reference in seen))

    model = vit_pytorch_model("deepvit", depth=6)
    for layer in model.transformer.layers:
        layer[0].to_qkv.register_forward_hook(count)
    inspection.layer_similarities(model, zoo.photos(32))
    assert alive == [1, 2, 2, 2, 2, 2]


class Pyramid(nn.Module):
    """Attention over 16 tokens twice, then over 4, and a head count that differs: pairs that have no cosine."""

    def __init__(self) -> None:
        super().__init__()
        from vit_pytorch.vit import Attention

        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 48, 8, stride=8)
        self.wide, self.narrow, self.more = Attention(48, 3, 16), Attention(48, 3, 16), Attention(48, 4, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.wide(self.wide(x))[:, ::4]
        return self.more(self.narrow(x))


def test_pairs_that_differ_say_why_and_a_layer_that_runs_twice_is_two() -> None:
    layers = inspection.layer_similarities(Pyramid(), zoo.photos(32)).layers
    assert [layer.path for layer in layers] == ["wide", "wide (call 2)", "narrow", "more"]
    assert [layer.note for layer in layers] == ["the first layer", "", "4 tokens, the layer before has 16", "4 heads, the layer before has 3"]
    assert [layer.adjacent is None for layer in layers] == [True, False, True, True]


def test_a_mask_is_not_overlooked() -> None:
    """NaFlexVit hands every layer a mask of its padding, so its maps are not those of q and k."""
    model = zoo.naflex()
    patches, places, valid = zoo.padded_patches([(2, 3), (4, 2)], 8)
    with pytest.raises(ValueError, match="it was called with attn_mask, so its maps are not those of q and k alone"):
        inspection.layer_similarities(model, {"patches": patches, "patch_coord": places, "patch_valid": valid})


def test_a_layer_whose_projection_is_passed_by_is_named() -> None:
    model = vit_pytorch_model("vit")
    second = model.transformer.layers[1][0]
    second.forward = lambda x: F.linear(second.norm(x), second.to_qkv.weight)[..., :48]
    found = inspection.layer_similarities(model, zoo.photos(32))
    assert [path for path, _ in found.skipped] == ["transformer.layers.1.0"] and "a fused forward passes it by" in found.skipped[0][1]
    assert len(found.layers) == 3


def test_attention_of_other_kinds_is_named_and_not_guessed_at() -> None:
    from timm.models.swin_transformer import SwinTransformer

    swin = SwinTransformer(img_size=32, patch_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=3)
    with pytest.raises(ValueError, match=r"swin_transformer\.WindowAttention makes its maps is not known") as caught:
        inspection.layer_similarities(swin, zoo.photos(32))
    assert "layers.0.blocks.0.attn" in str(caught.value)
    both = nn.Sequential(AuthorsModel(), nn.TransformerEncoderLayer(48, 2, 64, batch_first=True))
    found = inspection.layer_similarities(both, zoo.photos(32))
    assert len(found.layers) == 3 and [path for path, _ in found.skipped] == ["1.self_attn"]
    with pytest.raises(ValueError, match="no module that looks like attention"):
        inspection.layer_similarities(nn.Linear(2, 2), torch.ones(2))


# --- the command ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("vit_pytorch:DeepViT", 64), ("vit_pytorch:ViT", 64), ("vit_tiny_patch16_224", 32)])
def test_the_command_writes_what_it_prints(vitkernels: Callable[..., Result], tmp_path: Path, name: str, size: int) -> None:
    attention = [module for module in _zoo.load(name, size=size).module.modules() if hasattr(module, "to_qkv") or hasattr(module, "qkv")]
    layers, heads = len(attention), getattr(attention[0], "heads", None) or attention[0].num_heads
    result = vitkernels("inspect", name, "--size", size, "--images", 2, "--out", tmp_path / "new" / "folder", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "astronaut.png" in result.stdout and "random weights" in result.stdout and "the first layer" in result.stdout
    frame = pandas.read_csv(tmp_path / "new" / "folder" / "inspect.csv")
    assert tuple(frame.columns[: 1 + len(inspection.COLUMNS)]) == ("model", *inspection.COLUMNS)
    assert set(report.provenance()) | {"weights", "images", "vectors", "source"} <= set(frame.columns)
    assert len(frame) == layers * heads and set(frame["layer"]) == set(range(1, layers + 1)) and set(frame["head"]) == set(range(heads))
    assert frame.adjacent.isna().sum() == heads and set(frame.note[frame.adjacent.isna()]) == {"the first layer"}
    assert frame.adjacent.dropna().between(0, 1.000001).all() and frame.across_heads.between(0, 1.000001).all()
    means = frame.groupby("layer").adjacent.mean()
    assert all(f"{means[layer]:.3f}" in result.stdout for layer in range(2, layers + 1))
    assert (tmp_path / "new" / "folder" / "inspect.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_what_is_measured(report: Callable[..., Any], vitkernels: Callable[..., Result], tmp_path: Path) -> None:
    model = _zoo.load("vit_pytorch:DeepViT", size=64)
    torch.set_num_threads(1)  # as the command below, so that the figures are the same to the last bit
    module, (pixels, _) = spread(model.module), _zoo.images(model, 2)
    expected = inspection.layer_similarities(module, pixels, dim=-1)
    words = ("inspect", "vit_pytorch:DeepViT", "--size", 64, "--images", 2, "--out", tmp_path, "--vectors", "rows", "--threads", 1)
    random = report(*words)
    for kind in ("plain", "state_dict", "model"):
        state: dict[str, Any] = module.state_dict()
        torch.save(state if kind == "plain" else {kind: state, "epoch": 3}, tmp_path / "weights.pt")
        found = report(*words, "--checkpoint", tmp_path / "weights.pt")
        assert found["weights"] == "weights.pt" and found["vectors"] == "rows" and found["images"] == 2
        for layer, wanted, other in zip(found["layers"][1:], expected.layers[1:], random["layers"][1:], strict=True):
            assert wanted.adjacent is not None and layer["adjacent"] == wanted.adjacent.tolist() != other["adjacent"]
            assert layer["across_heads"] == wanted.across_heads.tolist()
    assert "--checkpoint loads trained ones" not in vitkernels(*words, "--checkpoint", tmp_path / "weights.pt").stdout


def test_checkpoints_that_do_not_fit(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], tmp_path: Path) -> None:
    words = ("inspect", "vit_pytorch:DeepViT", "--size", 64, "--out", tmp_path)
    path = tmp_path / "weights.pt"
    assert one_line_error(vitkernels(*words, "--checkpoint", path)) == f"no checkpoint at {path}"
    path.write_text("nothing")
    assert "is not a file of weights that torch.load reads safely" in one_line_error(vitkernels(*words, "--checkpoint", path))
    torch.save([1, 2], path)
    assert "holds a list; it must hold a state_dict" in one_line_error(vitkernels(*words, "--checkpoint", path))
    state = _zoo.load("vit_pytorch:DeepViT", size=64).module.state_dict()
    del state["cls_token"]
    state |= {"more": torch.ones(1), "mlp_head.1.bias": torch.ones(7)}
    torch.save(state, path)
    message = one_line_error(vitkernels(*words, "--checkpoint", path))
    assert "weights of another model" in message
    for part in ("1 missing (cls_token)", "1 unknown (more)", "1 of another shape (mlp_head.1.bias)"):
        assert part in message, message


def test_a_model_without_attention_and_an_unknown_name(
    vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], tmp_path: Path
) -> None:
    assert "no attention layer" in one_line_error(vitkernels("inspect", "test_resnet", "--size", 64, "--out", tmp_path))
    assert "is not known" in one_line_error(vitkernels("inspect", "vit_pytorch:NaViT", "--out", tmp_path))
    assert "no model named" in one_line_error(vitkernels("inspect", "vit_tinny", "--out", tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_said_before_anything_runs(
    vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], unwritable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "layer_similarities", lambda *a, **k: pytest.fail("computed before it looked whether it can write"))
    assert "cannot write to the results folder" in one_line_error(vitkernels("inspect", "vit_pytorch:ViT", "--out", unwritable))


def test_several_models_in_one_plot(tmp_path: Path) -> None:
    """What an example does: two models beside each other, one with gaps and one with a single head."""
    single = inspection.layer_similarities(vit_pytorch_model("vit", heads=1), zoo.photos(32))
    found = {"pyramid": inspection.layer_similarities(Pyramid(), zoo.photos(32)), "one head": single}
    csv, png = inspection.write(tmp_path, found, "both", origin={"step": 3})
    assert (csv.name, png.name) == ("both.csv", "both.png") and png.read_bytes().startswith(b"\x89PNG")
    frame = pandas.read_csv(csv)
    assert list(frame.columns) == ["model", *inspection.COLUMNS, "step"]
    assert frame.across_heads[frame.model == "one head"].isna().all()
    assert len(frame) == 3 + 3 + 3 + 4 + 4
    assert json.loads(json.dumps(single.rows()))[0]["across_heads"] is None


def test_the_plot_shows_means_heads_and_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), original(self, *args, **kwargs))[1])
    report.by_depth(tmp_path / "a.png", {"title": {"model": [[], [0.25, 0.75], [0.5]]}}, "label")
    (axes,) = figures[0].axes
    lines = [[None if y != y else y for y in line.get_ydata()] for line in axes.get_lines()]
    assert lines == [[None, 0.25, 0.5], [None, 0.75, None], [None, 0.5, 0.5]]
    assert axes.get_title(loc="left") == "title" and axes.get_ylabel() == "label"


def test_importing_it_brings_no_zoo_and_no_plotting() -> None:
    code = "import sys, vitkernels.inspection; print(sorted({'matplotlib', 'pandas', 'timm', 'transformers', 'vit_pytorch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
