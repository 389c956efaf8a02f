"""`accelerate` and `demo`: real models at small sizes, and every way a user can get it wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from click.testing import Result
from PIL import Image

import vitkernels as package
from vitkernels import timing
from vitkernels.cli import _compare, _zoo, demo

SMALL = ("--size", 64, "--repeats", 2, "--threads", 1, "--no-peers", "--no-compile")
MODEL = ("accelerate", "mobilevitv2_050", *SMALL)


@pytest.mark.parametrize("words", [(), ("--dtype", "bfloat16", "--batch", 3), ("--train", "--batch", 2)], ids=["plain", "bfloat16", "train"])
def test_a_timm_model(report: Callable[..., Any], words: tuple[object, ...]) -> None:
    found = report(*MODEL, *words)
    assert found["source"] == "timm"
    classes = {record["original_class"].rpartition(".")[2] for record in found["replaced"]}
    assert "LinearSelfAttention" in classes | {"LinearSelfAttention" for c in classes if c == "MobileVitV2Block"}
    assert len(found["replaced"]) >= 9
    assert found["accuracy_rule_holds"]
    assert found["error_logits_original"] > 0
    assert found["original_p20_ms"] <= found["original_p50_ms"] <= found["original_p80_ms"]
    assert found["speedup_p50"] > 0
    assert found["rounds_kept"] == 2
    assert ("error_gradients_accelerated" in found) is ("--train" in words)
    assert found["machine"]["torch"] == torch.__version__


def test_a_transformers_model(report: Callable[..., Any]) -> None:
    found = report("accelerate", "hf:mobilevitv2", *SMALL)
    assert found["source"] == "hf"
    assert any("MobileViTV2" in record["original_class"] for record in found["replaced"])
    assert found["accuracy_rule_holds"]


def test_a_detector(report: Callable[..., Any]) -> None:
    found = report("accelerate", "detr", "--size", 64, "--repeats", 1, "--no-peers", "--no-compile", "--train")
    assert {r["op"] for r in found["replaced"]} == {"attention", "detection_set_loss"} and len(found["replaced"]) == 1 + 2 + 6 + 2 * 6
    assert found["accuracy_rule_holds"]


def test_a_vit_pytorch_model_by_its_class(report: Callable[..., Any]) -> None:
    found = report("accelerate", "MobileViT", "--source", "vit_pytorch", *SMALL)
    assert found["source"] == "vit_pytorch"


def test_tables_plot_and_the_users_image(vitkernels: Callable[..., Result], tmp_path: Path) -> None:
    Image.new("L", (90, 50), 120).save(tmp_path / "grey.png")
    plot = tmp_path / "plots" / "speed.png"
    result = vitkernels(*MODEL, "--image", tmp_path / "grey.png", "--batch", 2, "--save-plot", plot)
    assert result.exit_code == 0, result.output
    assert "grey.png repeated" in result.stdout
    assert "p80 ms" in result.stdout
    assert "stages.2.1" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_model_with_nothing_to_replace_says_so(vitkernels: Callable[..., Result], report: Callable[..., Any]) -> None:
    result = vitkernels("accelerate", "test_resnet", *SMALL)
    assert result.exit_code == 0
    assert "Nothing to replace" in result.stdout
    found = report("accelerate", "test_resnet", *SMALL)
    assert found["replaced"] == []
    assert "speedup_p50" not in found


def test_a_wrong_accelerated_model_is_exit_code_1(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def scale_the_head(model: torch.nn.Module) -> Any:
        handle = original(model)
        with torch.no_grad():
            model.get_classifier().weight.mul_(1.001)
        return handle

    original = package.accelerate
    monkeypatch.setattr(package, "accelerate", scale_the_head)
    result = vitkernels(*MODEL, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["accuracy_rule_holds"] is False


def test_an_ignored_parameter_in_training_is_exit_code_1(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze_the_stem(model: torch.nn.Module) -> Any:
        handle = original(model)
        for parameter in model.stem.parameters():
            parameter.register_hook(torch.zeros_like)
        return handle

    original = package.accelerate
    monkeypatch.setattr(package, "accelerate", freeze_the_stem)
    result = vitkernels(*MODEL, "--train", "--batch", 2, "--json")
    assert result.exit_code == 1


def test_unknown_name_lists_near_matches(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str]) -> None:
    message = one_line_error(vitkernels("accelerate", "mobilevit_v2_050"))
    assert "no model named 'mobilevit_v2_050'" in message
    assert "mobilevitv2_050" in message
    assert "hf:mobilevitv2" in one_line_error(vitkernels("accelerate", "mobilevit_v2"))
    assert "vit_pytorch:MobileViT" in one_line_error(vitkernels("accelerate", "--source", "vit_pytorch", "MobilViT"))
    assert "nothing is near it" in one_line_error(vitkernels("accelerate", "--source", "hf", "zzzzzzzz"))


def test_two_zoos_named_at_once(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str]) -> None:
    assert "--source says timm" in one_line_error(vitkernels("accelerate", "hf:mobilevitv2", "--source", "timm"))


@pytest.mark.parametrize("source", ["auto", "timm", "hf", "vit_pytorch"])
def test_missing_zoo_names_the_extra(
    vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(_zoo, "_installed", lambda name: False)
    assert "pip install vitkernels[models]" in one_line_error(vitkernels("accelerate", "mobilevitv2_050", "--source", source))


def test_missing_and_unreadable_images(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], tmp_path: Path) -> None:
    assert one_line_error(vitkernels(*MODEL, "--image", tmp_path / "none.png")) == f"no image at {tmp_path / 'none.png'}"
    (tmp_path / "text.png").write_text("no picture")
    assert "is not an image" in one_line_error(vitkernels(*MODEL, "--image", tmp_path / "text.png"))


def test_unwritable_plot(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], unwritable: Path) -> None:
    assert "cannot write to the results folder" in one_line_error(vitkernels(*MODEL, "--save-plot", unwritable / "a.png"))


def test_a_size_the_model_refuses(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str]) -> None:
    assert "at size 50" in one_line_error(vitkernels("accelerate", "vit_pytorch:ViT", "--size", 50))


def test_interrupt(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "interleave", interrupt)
    result = vitkernels(*MODEL)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"


def test_the_same_name_gives_the_same_weights_and_photos() -> None:
    first, second = (_zoo.load("mobilevitv2_050", size=64) for _ in range(2))
    for (name, one), other in zip(first.module.state_dict().items(), second.module.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(_zoo.images(first, 3)[0], _zoo.images(second, 3)[0])


def test_photos_are_photos_and_noise_says_that_it_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _zoo.load("mobilevitv2_050", size=64)
    pixels, shown = _zoo.images(model, 12)
    assert pixels.shape == (12, 3, 64, 64)
    assert "astronaut.png" in shown
    assert "repeated" in shown
    assert not torch.equal(pixels[0], pixels[1])
    monkeypatch.setattr(_zoo, "_photo_paths", list)
    noise, shown = _zoo.images(model, 2)
    assert shown.startswith("seeded noise")
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_photos_of_a_navit_keep_their_shapes(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = _zoo.load("vit_pytorch:NaViT")
    photos, _ = _zoo.images(model, 10)
    sizes = [tuple(photo.shape) for photo in photos]
    assert len(set(sizes)) == 7 and all(c == 3 and height % 16 == 0 and width % 16 == 0 and max(height, width) <= 384 for c, height, width in sizes)
    monkeypatch.setattr(_zoo, "_photo_paths", list)
    assert len({noise.shape for noise in _zoo.images(model, 4)[0]}) > 1
    found = report("accelerate", "vit_pytorch:NaViT", "--size", 64, "--batch", 3, "--train", "--repeats", 2, "--threads", 1, "--no-compile")
    assert found["accuracy_rule_holds"] and len(found["replaced"]) == 8


def test_the_deepvit_is_the_papers_of_16_blocks(report: Callable[..., Any]) -> None:
    model = _zoo.load("vit_pytorch:DeepViT")
    layers = model.module.transformer.layers
    attention, feed_forward = layers[0]
    assert model.size == 224 and len(layers) == 16 and attention.heads == 12 and model.module.pos_embedding.shape == (1, 197, 384)
    assert attention.to_qkv.weight.shape == (3 * 12 * 32, 384) and feed_forward.net[1].out_features == 1152
    found = report("accelerate", "vit_pytorch:DeepViT", "--size", 64, "--batch", 2, "--train", "--repeats", 2, "--threads", 1, "--no-compile")
    assert found["accuracy_rule_holds"]
    paths = [record["path"] for record in found["replaced"] if record["op"] == "re_attention"]
    assert paths == [f"transformer.layers.{i}.0" for i in range(16)]


def test_an_image_is_cut_and_normalised_as_the_model_wants(tmp_path: Path) -> None:
    Image.new("RGB", (40, 90), (255, 0, 51)).save(tmp_path / "flat.png")
    model = _zoo.ZooModel("m", "timm", torch.nn.Identity(), 16, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 0.1))
    pixels, _ = _zoo.images(model, 1, tmp_path / "flat.png")
    assert pixels.shape == (1, 3, 16, 16)
    torch.testing.assert_close(pixels.amax((0, 2, 3)), torch.tensor([1.0, -0.5, 2.0]))
    torch.testing.assert_close(pixels.amin((0, 2, 3)), torch.tensor([1.0, -0.5, 2.0]))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile_takes_part_with_its_weights_frozen() -> None:
    module, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(), torch.randn(4, 8)
    program = _compare.compiled_for_inference(module, x)
    with torch.no_grad():
        torch.testing.assert_close(program(x), module(x))
        program._orig_mod[0].weight.zero_()
        torch.testing.assert_close(program(x), module(x))


def test_torch_compile_that_fails_is_a_note(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    found = report(*MODEL, "--compile")
    assert found["notes"] == ["torch.compile: No working C++ compiler found"]
    assert "torch.compile_p50_ms" not in found


def test_demo_writes_its_report(vitkernels: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {name for name, *_ in demo.runs()} == {
        *("mobilevitv2_050", "mobilevitv2_100", "hf:mobilevitv2", "efficientvit_m0", "efficientvit_m4"),
        *("vit_pytorch:NaViT", "vit_pytorch:DeepViT", "vit_pytorch:SimpleViT", "vit_small_patch16_224", "mobilevit_s", "hf:mobilevit"),
    }
    assert {batch for name, batch, *_ in demo.runs() if name.startswith("efficientvit")} == {1, 16}
    assert {name for name, *_, training in demo.runs() if training} == {"mobilevitv2_050", "efficientvit_m0", "vit_pytorch:NaViT"}
    monkeypatch.setattr(demo, "_MODELS", {"mobilevitv2_050": (64, 2), "efficientvit_m0": (224, 2)})
    short = [("mobilevitv2_100", 1, False), ("mobilevitv2_050", 1, False), ("mobilevitv2_050", 2, True), ("efficientvit_m0", 2, False)]
    monkeypatch.setattr(demo, "runs", lambda: [(name, batch, torch.float32, training) for name, batch, training in short])
    only = ("--model", "mobilevitv2_050", "--model", "efficientvit_m0")
    result = vitkernels("demo", "--out", tmp_path / "demo", "--rounds", 1, "--threads", 1, "--no-peers", *only)
    assert result.exit_code == 0, result.output
    assert "[2/3] mobilevitv2_050" in result.stderr
    frame = pandas.read_csv(tmp_path / "demo" / "demo.csv")
    assert list(frame["mode"]) == ["inference", "training step", "inference"]
    assert frame.accuracy_rule_holds.all()
    assert (frame.error_logits_original > 0).all()
    assert frame.error_gradients_accelerated.notna().tolist() == [False, True, False]
    assert set(frame.torch) == {torch.__version__}
    blocks = pandas.read_csv(tmp_path / "demo" / "blocks.csv")
    assert set(blocks.model) == {"efficientvit_m0"}
    assert set(blocks["mode"]) == {"forward", "forward+backward", "training"}
    assert blocks.accuracy_rule_holds.all()
    text = (tmp_path / "demo" / "report.md").read_text()
    assert "astronaut.png" in text
    assert "have random weights" in text
    assert "stages.0.blocks.0.mixer.m, 64x14x14" in text
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_into_an_unwritable_folder(vitkernels: Callable[..., Result], one_line_error: Callable[[Result], str], unwritable: Path) -> None:
    assert "cannot write to the results folder" in one_line_error(vitkernels("demo", "--out", unwritable))


def test_dropout_is_off_in_a_training_comparison() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4))
    trained = _compare._without_dropout(module)
    x = torch.randn(8, 4)
    assert trained.training
    assert torch.equal(trained[0](x), x)


def test_a_signal_reaches_the_logits_of_every_zoo() -> None:
    for name, size in (("mobilevitv2_050", 64), ("hf:mobilevitv2", 64), ("vit_pytorch:MobileViT", 64), ("efficientvit_m0", None)):
        model = _zoo.load(name, size=size)
        x, _ = _zoo.images(model, 2)
        with torch.no_grad():
            single = _zoo.logits(model.module(x))
            double = _zoo.logits(model.module.double()(x.double()))
        assert not model.module.training
        assert double.abs().max() > 1e-3, name
        assert (single - double).abs().max() < 1e-3 * double.abs().max(), name


def test_an_original_that_is_all_error_proves_nothing() -> None:
    assert _compare.Error("logits", original=1e-6, accelerated=2e-6, within_twice=True).holds
    assert not _compare.Error("logits", original=1.0, accelerated=1.0, within_twice=True).holds
    assert not _compare.Error("logits", original=1e-6, accelerated=9e-6, within_twice=False).holds
