"""Models by name, and photos to feed them: set-up for ``accelerate`` and ``demo`` only.

Nothing is downloaded; weights are random with a fixed seed.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitkernels.bench import first_line
from vitkernels.cli._common import CliError

SOURCES = ("timm", "hf", "vit_pytorch")
_PACKAGES = {"timm": "timm", "hf": "transformers", "vit_pytorch": "vit_pytorch"}
# By package, where in it, and their names.
_PHOTOS = (
    (
        "skimage",
        "data",
        (
            "astronaut.png",
            "coffee.png",
            "chelsea.png",
            "rocket.jpg",
            "motorcycle_left.png",
            "retina.jpg",
            "ihc.png",
            "hubble_deep_field.jpg",
        ),
    ),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What a vit_pytorch class asks for and has no default: the size of its own README's examples, scaled to ViT-S.
_VIT_PYTORCH_ARGUMENTS: dict[str, Any] = {
    "image_size": 256,
    "patch_size": 32,
    "num_classes": 1000,
    "dim": 384,
    "depth": 6,
    "heads": 6,
    "mlp_dim": 768,
}
# vit_pytorch.mobile_vit.MobileViT is a whole family: these are its paper's (S) dimensions. A NaViT's image_size is that of its position tables.
# DeepViT is its paper's of 16 blocks.
_VIT_PYTORCH_SPECIAL: dict[str, dict[str, Any]] = {
    "NaViT": {"image_size": 384, "patch_size": 16},
    "DeepViT": {"image_size": 224, "patch_size": 16, "depth": 16, "heads": 12, "dim_head": 32, "mlp_dim": 1152},
    "MobileViT": {"image_size": (256, 256), "dims": [144, 192, 240], "channels": [16, 32, 64, 64, 96, 96, 128, 128, 160, 160, 640]},
}


# Detectors of transformers, which are built on a ResNet-50 of its own: by default it would be another zoo's, downloaded.
_DETECTORS = ("conditional_detr", "detr", "table-transformer")


@dataclass(frozen=True)
class ZooModel:
    """A model as its zoo builds it, in eval mode, with random weights and BatchNorm statistics of the photos.

    Attributes:
        name, source: the zoo's name for it, and the zoo.
        module: gives logits (or an output that holds them) for images [B, 3, size, size].
        size: side of its images.
        mean, std: its normalisation.
        patch: for a model that takes a list of images of any sizes, what divides their sides; ``size`` is then the longest side.
        options: what the module is called with beside the images.
    """

    name: str
    source: str
    module: nn.Module
    size: int
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    patch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


Pixels = Tensor | list[Tensor]
"""A batch: [B, 3, size, size], or images of any sizes [3, H, W]."""

_schemas: torch.library.Library | None = None


def _prepare_torchvision() -> None:
    """Let torchvision's CUDA wheel be imported beside a CPU-only torch.

    torchvision registers fake kernels for two ops whose schemas live in a C++ library that such a torch cannot load; declaring the schemas first is
    enough, since nothing here calls the ops.
    """
    global _schemas
    if _schemas is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _schemas = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            _schemas.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def _installed(source: str) -> bool:
    return importlib.util.find_spec(_PACKAGES[source]) is not None


def _package(source: str) -> Any:
    """Import a zoo.

    Raises:
        CliError: it is not installed, or does not import.
    """
    name = _PACKAGES[source]
    if not _installed(source):
        raise CliError(f"{name} is not installed: `pip install vitkernels[models]` brings the model zoos")
    try:
        _prepare_torchvision()
        # A zoo's import-time notes on optional packages are no answer to the user's command.
        with contextlib.redirect_stderr(io.StringIO()):
            package = importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise CliError(f"{name} is installed and does not import: {first_line(error)}") from error
    if source == "hf":
        logging.getLogger("transformers").setLevel(logging.ERROR)
    return package


def _timm_names() -> list[str]:
    return list(_package("timm").list_models())


def _hf_names() -> list[str]:
    _package("hf")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return sorted((*auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *_DETECTORS))


def _vit_pytorch_classes() -> dict[str, str]:
    """Class name -> module, for the class each module of vit_pytorch is named after (``mobile_vit`` holds ``MobileViT``). Read, not imported."""
    folder = Path(_package("vit_pytorch").__file__).parent
    found = {}
    for path in sorted(folder.glob("*.py")):
        for name in re.findall(r"^class (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            if name.lower() == path.stem.replace("_", ""):
                found[name] = f"vit_pytorch.{path.stem}"
    return found


_NAMES: dict[str, Callable[[], Iterable[str]]] = {"timm": _timm_names, "hf": _hf_names, "vit_pytorch": _vit_pytorch_classes}


def _build_timm(name: str, size: int | None) -> ZooModel:
    timm = _package("timm")
    module = timm.create_model(name, pretrained=False)
    config = module.pretrained_cfg
    if size is not None and config.get("fixed_input_size") and size != config["input_size"][-1]:
        module = timm.create_model(name, pretrained=False, img_size=size)
    return ZooModel(name, "timm", module, size or config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))


def _build_hf(name: str, size: int | None) -> ZooModel:
    transformers = _package("hf")
    if name in _DETECTORS:
        backbone = transformers.ResNetConfig(out_features=["stage4"])
        config = transformers.AutoConfig.for_model(name, num_labels=91, use_timm_backbone=False, backbone=None, backbone_config=backbone)
        return ZooModel(name, "hf", transformers.AutoModelForObjectDetection.from_config(config), size or 480)
    options: dict[str, Any] = {"num_labels": 1000}
    if size is not None:
        options["image_size"] = size
    config = transformers.AutoConfig.for_model(name, **options)
    module = transformers.AutoModelForImageClassification.from_config(config)
    side = size or getattr(config, "image_size", None) or 224
    return ZooModel(name, "hf", module, side if isinstance(side, int) else max(side))


def _build_vit_pytorch(name: str, size: int | None) -> ZooModel:
    cls = getattr(importlib.import_module(_vit_pytorch_classes()[name]), name)
    special = _VIT_PYTORCH_SPECIAL.get(name, {})
    known = _VIT_PYTORCH_ARGUMENTS | special
    if size is not None:
        known["image_size"] = (size, size) if isinstance(known["image_size"], tuple) else size
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in parameters if p.default is p.empty]
    if missing := [argument for argument in required if argument not in known]:
        words = ", ".join(missing)
        raise CliError(f"vit_pytorch's {name} needs {words}, which have no usual value: build it in Python and call vitkernels.accelerate on it")
    side = known["image_size"]
    module, longest = cls(**{k: known[k] for k in {*required, *special}}), side if isinstance(side, int) else side[0]
    if name == "NaViT":
        return ZooModel(name, "vit_pytorch", module, longest, patch=known["patch_size"], options={"group_images": True})
    return ZooModel(name, "vit_pytorch", module, longest)


_BUILD = {"timm": _build_timm, "hf": _build_hf, "vit_pytorch": _build_vit_pytorch}


def load(name: str, source: str = "auto", size: int | None = None, seed: int = 0) -> ZooModel:
    """Build a model by its zoo's name.

    Args:
        name: ``mobilevitv2_050`` (timm), ``mobilevitv2`` (a transformers config), ``MobileViT`` (a vit_pytorch class). A prefix ``timm:``, ``hf:`` or
            ``vit_pytorch:`` says which zoo.
        source: the zoo, or ``auto`` for the first that has the name.
        size: side of the images; the model's own if ``None``.
        seed: of the weights.

    Raises:
        CliError: no such model (with near matches), no such zoo installed, or the zoo refuses the size.
    """
    prefix, _, rest = name.partition(":")
    if rest and prefix in SOURCES:
        if source not in ("auto", prefix):
            raise CliError(f"{name!r} names the zoo {prefix}, and --source says {source}")
        name, source = rest, prefix
    wanted = SOURCES if source == "auto" else (source,)
    if source == "auto" and not any(map(_installed, SOURCES)):
        raise CliError("none of timm, transformers and vit_pytorch is installed: `pip install vitkernels[models]` brings them")
    known: dict[str, Iterable[str]] = {}
    for candidate in wanted:
        if source == "auto" and not _installed(candidate):
            continue
        known[candidate] = _NAMES[candidate]()
        if name in known[candidate]:
            torch.manual_seed(seed)
            try:
                model = _BUILD[candidate](name, size)
                model.module.eval()
                _settle(model)
            except (RuntimeError, ValueError, AssertionError, TypeError) as error:
                raise CliError(f"{_PACKAGES[candidate]} does not build {name}{f' at size {size}' if size else ''}: {first_line(error)}") from error
            return model
    spelled = {f"{zoo}:{n}" if zoo != "timm" else n: n for zoo, names in known.items() for n in names}
    close = difflib.get_close_matches(name.lower(), {n.lower() for n in spelled.values()}, n=5, cutoff=0.5)
    near = [label for match in close for label, n in spelled.items() if n.lower() == match]
    absent = [_PACKAGES[s] for s in wanted if s not in known]
    hint = f"; near it: {', '.join(near)}" if near else "; nothing is near it"
    note = f" ({', '.join(absent)} not installed: `pip install vitkernels[models]`)" if absent else ""
    raise CliError(f"no model named {name!r} in {', '.join(_PACKAGES[s] for s in known)}{hint}{note}")


def _settle(model: ZooModel) -> None:
    """Give every BatchNorm the statistics of the photos, as training would have, and a weight other than zero.

    A zoo may start the last norm of a residual branch at weight zero (EfficientViT's after the attention's projection, for one): nothing that the
    branch computes would reach the logits. Those weights are drawn from [0.5, 1.5).

    With the statistics a zoo starts from (mean 0, variance 1) random weights shrink the signal layer by layer: transformers' MobileViTV2 ends in
    logits below the smallest float32, and there is nothing left to compare.
    """
    norms = [m for m in model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    for norm in norms:
        if norm.weight is not None and not norm.weight.any():
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the running statistics become those of what comes
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        model.module(images(model, 8)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def logits(output: Any) -> Tensor:
    """The logits of any zoo's output."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _photo_paths() -> list[Path]:
    found = []
    for package, folder, names in _PHOTOS:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            found += [path for name in names if (path := Path(spec.origin).parent / folder / name).is_file()]
    return found


def _size_of(model: ZooModel, width: int, height: int) -> tuple[int, int]:
    """Width and height that an image is brought to: the model's; for one that takes any, half of its own, at most the model's, in whole patches."""
    if model.patch is None:
        return model.size, model.size
    scale = min(0.5, model.size / max(width, height))
    return max(1, int(width * scale) // model.patch) * model.patch, max(1, int(height * scale) // model.patch) * model.patch


def _read(path: Path, model: ZooModel) -> Tensor:
    """One image, resized to cover its new size, the centre cut out, normalised: [3, H, W]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            photo = ImageOps.exif_transpose(file).convert("RGB")
            image = ImageOps.fit(photo, _size_of(model, *photo.size), Image.Resampling.BICUBIC)
    except FileNotFoundError as error:
        raise CliError(f"no image at {path}") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CliError(f"{path} is not an image that Pillow can read: {first_line(error)}") from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(model.mean)[:, None, None]) / torch.tensor(model.std)[:, None, None]


def check_image(path: Path | None) -> None:
    """Say that an image is missing before a model is built for it.

    Raises:
        CliError: there is no such file.
    """
    if path is not None and not path.is_file():
        raise CliError(f"no image at {path}")


def to(pixels: Pixels, *args: Any, **kwargs: Any) -> Pixels:
    """``Tensor.to`` of a batch of either form."""
    return pytree.tree_map(lambda image: image.to(*args, **kwargs), pixels)


def images(model: ZooModel, batch: int, path: Path | None = None) -> tuple[Pixels, str]:
    """A float32 batch and what it shows: the image given, else the photos of scikit-image and scikit-learn, else seeded noise.

    Raises:
        CliError: the image is missing or unreadable.
    """
    paths = [path] if path is not None else _photo_paths()[:batch]
    if not paths:
        generator = torch.Generator().manual_seed(0)
        sizes = [_size_of(model, 640 - 128 * (i % 4), 384) for i in range(batch)]
        noise = [torch.randn(3, height, width, generator=generator) for width, height in sizes]
        return noise if model.patch else torch.stack(
            noise
        ), "seeded noise (scikit-image, which has photos, is not installed; --image takes one of yours)"
    read = [_read(p, model) for p in paths]
    shown = ", ".join(p.name for p in paths) + (" repeated" if batch > len(paths) else "")
    photos = [read[i % len(read)] for i in range(batch)]
    return photos if model.patch else torch.stack(photos), shown
