"""``vitkernels inspect MODEL``: how alike the attention maps of a model's layers are, by depth."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from vitkernels import inspection, report
from vitkernels.bench import first_line
from vitkernels.cli import _zoo
from vitkernels.cli._common import CliError, device_of, device_option, json_option, out, print_json, set_threads, steps, table, threads_option
from vitkernels.inspection import LayerSimilarity, Similarities

_VECTORS = {"columns": -2, "rows": -1}
_HEADERS = ("layer", "module", "heads", "tokens", "head dim", "with the layer before", "least - most", "across heads", "note")


@click.command("inspect")
@click.argument("model")
@click.option("--source", type=click.Choice(["auto", *_zoo.SOURCES]), default="auto", show_default=True, help="The zoo that MODEL is a name of.")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="A state_dict saved by torch.save; random weights if not given.")
@click.option("--images", "count", type=click.IntRange(min=1), default=8, show_default=True, help="How many photos to average over.")
@click.option("--image", type=click.Path(path_type=Path), default=None, help="An image to run on; default scikit-image's photos.")
@click.option("--size", type=click.IntRange(min=8), default=None, help="Side of the images; default the model's own.")
@click.option(
    "--vectors",
    type=click.Choice(list(_VECTORS)),
    default="columns",
    show_default=True,
    help="Of the maps: columns, how much a token gives to the others (the paper's); rows, what it looks at.",
)
@click.option("--out", "folder", type=click.Path(path_type=Path), default=Path("inspect-report"), show_default=True, help="Where CSV and plot go.")
@device_option
@threads_option
@json_option
def command(
    model: str,
    source: str,
    checkpoint: Path | None,
    count: int,
    image: Path | None,
    size: int | None,
    vectors: str,
    folder: Path,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Show how alike the attention maps of MODEL's layers are, by depth: its attention collapse (DeepViT, section 3).

    MODEL is a name of timm (vit_tiny_patch16_224), a transformers config (hf:vit) or a vit_pytorch class (vit_pytorch:DeepViT). Real photos run
    through it; of every self-attention layer it takes the cosine similarity of its maps with those of the layer before, and across its heads. Prints
    a table and writes a CSV and a plot. Nothing is downloaded.
    """
    target = device_of(device)
    set_threads(threads)
    _zoo.check_image(image)
    if checkpoint is not None and not checkpoint.is_file():
        raise CliError(f"no checkpoint at {checkpoint}")
    folder = report.results_folder(folder)
    with steps(1) as progress:
        progress.start(f"{model}, {count} images")
        zoo_model = _zoo.load(model, source, size)
        if checkpoint is not None:
            load_checkpoint(zoo_model.module, checkpoint)
        pixels, shown = _zoo.images(zoo_model, count, image)
        module = zoo_model.module.to(target)
        try:
            found = inspection.layer_similarities(module, _zoo.to(pixels, target), dim=_VECTORS[vectors], **zoo_model.options)
        except ValueError as error:
            raise CliError(str(error)) from error
        progress.advance()
    weights = "random weights" if checkpoint is None else checkpoint.name
    about = {"source": zoo_model.source, "weights": weights, "images": len(pixels), "vectors": vectors}
    csv, png = inspection.write(folder, {zoo_model.name: found}, origin=about | report.provenance(target))
    if as_json:
        print_json({"model": zoo_model.name, **about, "shown": shown, **as_data(found), "machine": report.provenance(target)})
        return
    out.print(f"[bold]{zoo_model.name}[/bold] ({zoo_model.source}), {weights}; {len(pixels)} images: {shown}", highlight=False)
    title = f"Mean cosine similarity of attention maps, {vectors}; 1 is the same map"
    out.print(table(title, _HEADERS, (_cells(i, layer) for i, layer in enumerate(found.layers, 1)), right=(_HEADERS[0], *_HEADERS[2:8])))
    for path, reason in found.skipped:
        out.print(f"Not measured: {path}: {reason}", highlight=False, markup=False)
    if checkpoint is None:
        out.print("These are random weights, whose maps are near uniform and so alike by themselves: --checkpoint loads trained ones.")
    out.print(f"Plot: {png}; every head: {csv}", highlight=False, markup=False)


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load a state_dict, or one inside of ``state_dict`` or ``model``, as training scripts save it.

    Raises:
        CliError: the file is none, or is of another model.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CliError(f"{path} is not a file of weights that torch.load reads safely: {first_line(error)}") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict):
        raise CliError(f"{path} holds a {type(state).__name__}; it must hold a state_dict")
    own = module.state_dict()
    wrong = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [key for key, value in own.items() if key in state and getattr(state[key], "shape", None) != value.shape],
    }
    if any(wrong.values()):
        words = "; ".join(f"{len(keys)} {what} ({', '.join(map(str, keys[:3]))}{', ...' * (len(keys) > 3)})" for what, keys in wrong.items() if keys)
        raise CliError(f"{path} holds the weights of another model: {words}")
    module.load_state_dict(state)


def as_data(found: Similarities) -> dict[str, Any]:
    """What was found as plain data: a layer's heads in lists."""
    layers = [
        {
            "path": layer.path,
            "heads": layer.heads,
            "tokens": layer.tokens,
            "head_dim": layer.head_dim,
            "adjacent": None if layer.adjacent is None else layer.adjacent.tolist(),
            "across_heads": layer.across_heads.tolist(),
            "note": layer.note,
        }
        for layer in found.layers
    ]
    return {"layers": layers, "skipped": [{"path": path, "reason": reason} for path, reason in found.skipped]}


def _cells(number: int, layer: LayerSimilarity) -> tuple[str, ...]:
    adjacent = layer.adjacent
    mean, spread = ("-", "-") if adjacent is None else (f"{adjacent.mean():.3f}", f"{adjacent.min():.3f} - {adjacent.max():.3f}")
    across = f"{layer.with_others.mean():.3f}" if layer.heads > 1 else "-"
    return str(number), layer.path, str(layer.heads), str(layer.tokens), str(layer.head_dim), mean, spread, across, layer.note
