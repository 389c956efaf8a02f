"""The models the integrations are tested on: small, without downloads, from the zoos' own classes; and the rule they are judged by."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels.accuracy import REDRAW_STEP, Comparison, compare_tensors, settled

from . import conftest  # noqa: F401  a process that a test starts needs conftest's torchvision too


def photos(size: int | tuple[int, int], count: int = 2) -> Tensor:
    """Real photographs, [count, 3, H, W], scaled to [-1, 1]."""
    from skimage import data

    images = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() for name in ("astronaut", "chelsea", "coffee")[:count]]
    resized = [F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False) for image in images]
    return torch.cat(resized) / 127.5 - 1


def mixed_photos(sizes: Sequence[tuple[int, int]], channels: int = 3) -> list[Tensor]:
    """Photographs of these heights and widths, [channels, H, W] each."""
    return [photos(size, 3)[i % 3, :channels] for i, size in enumerate(sizes)]


def padded_patches(sizes: Sequence[tuple[int, int]], length: int, patch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Photographs of these many patches up and across as patches [B, length, patch * patch * 3], as naflex models take them, the place of each patch
    [B, length, 2], and which of them are patches, bool [B, length]: the first of each row.
    """
    patches, places = torch.zeros(len(sizes), length, patch * patch * 3), torch.zeros(len(sizes), length, 2, dtype=torch.long)
    for i, (image, (height, width)) in enumerate(zip(mixed_photos([(h * patch, w * patch) for h, w in sizes]), sizes, strict=True)):
        grid = image.unflatten(2, (width, patch)).unflatten(1, (height, patch)).permute(1, 3, 2, 4, 0)  # [h, w, p1, p2, c]
        patches[i, : height * width] = grid.flatten(2).flatten(0, 1)
        places[i, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    counts = torch.tensor([height * width for height, width in sizes])
    return patches, places, torch.arange(length) < counts[:, None]


def navit(kind: str = "na_vit", **options: Any) -> nn.Module:
    """A small NaViT of vit_pytorch, of either module."""
    zoo = importlib.import_module(f"vit_pytorch.{kind}")
    torch.manual_seed(0)
    small = {"image_size": 64, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 64, "dim_head": 16}
    return zoo.NaViT(**{**small, **options})


def naflex(**options: Any) -> nn.Module:
    """A small NaFlexVit of timm."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    torch.manual_seed(0)
    small = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "reg_tokens": 2, "pos_embed_grid_size": (4, 4)}
    return NaFlexVit(NaFlexVitCfg(**{**small, **options}), num_classes=10)


def siglip2(kind: str = "ForImageClassification", **options: Any) -> nn.Module:
    """A small Siglip2 of transformers: ``ForImageClassification`` or ``VisionModel``."""
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "num_patches": 16, "patch_size": 4}
    vision = transformers.Siglip2VisionConfig(**{**small, **options})
    if kind == "VisionModel":
        return transformers.Siglip2VisionModel(vision)
    return transformers.Siglip2ForImageClassification(transformers.Siglip2Config(vision_config=vision.to_dict(), num_labels=10))


def timm_model(name: str = "mobilevitv2_050", **options: Any) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options)


def timm_block(dim: int = 32, depth: int = 2, patch_size: int = 2, **options: Any) -> nn.Module:
    """A ``MobileVitV2Block`` of timm alone."""
    from timm.models.mobilevit import MobileVitV2Block

    torch.manual_seed(0)
    return MobileVitV2Block(dim, transformer_dim=dim, transformer_depth=depth, patch_size=patch_size, **options)


def transformers_model(**options: Any) -> nn.Module:
    from transformers import MobileViTV2Config, MobileViTV2ForImageClassification

    torch.manual_seed(0)
    options = {"width_multiplier": 0.5, "n_attn_blocks": [2, 1, 1], "num_labels": 10, **options}
    return MobileViTV2ForImageClassification(MobileViTV2Config(**options))


class CvnetsConv2d(nn.Conv2d):
    """As in ml-cvnets: a constructor of its own around ``nn.Conv2d``."""

    def __init__(self, channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(channels, out_channels, kernel_size=1, bias=bias)


class ConvLayer2d(nn.Module):
    """As in ml-cvnets: a convolution, optionally with more behind it, in a ``block``."""

    def __init__(self, channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("conv", CvnetsConv2d(channels, out_channels, bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class CvnetsDropout(nn.Dropout):
    """As in ml-cvnets: a constructor of its own around ``nn.Dropout``."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(p, inplace)


class LinearSelfAttention(nn.Module):
    """Stands in for ml-cvnets' class of this name: its attributes and its maths, self- and cross-attention."""

    def __init__(self, embed_dim: int, attn_dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.qkv_proj = ConvLayer2d(embed_dim, 1 + 2 * embed_dim, bias)
        self.attn_dropout = CvnetsDropout(attn_dropout)
        self.out_proj = ConvLayer2d(embed_dim, embed_dim, bias)
        self.embed_dim = embed_dim

    def forward(self, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        dim = self.embed_dim
        if x_prev is None:
            query, key, value = self.qkv_proj(x).split([1, dim, dim], dim=1)
        else:
            conv = self.qkv_proj.block.conv
            query, key = F.conv2d(x_prev, conv.weight[: dim + 1], conv.bias[: dim + 1]).split([1, dim], dim=1)
            value = F.conv2d(x, conv.weight[dim + 1 :], conv.bias[dim + 1 :])
        scores = self.attn_dropout(query.softmax(dim=-1))
        context = (key * scores).sum(dim=-1, keepdim=True)
        return self.out_proj(F.relu(value) * context)


class CvnetsNet(nn.Module):
    """A stack of ml-cvnets' pre-norm attention layers on unfolded maps, with a classifier."""

    def __init__(self, dim: int = 32, depth: int = 2, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 8, stride=8)
        self.norms = nn.ModuleList(nn.GroupNorm(1, dim) for _ in range(depth))
        self.attentions = nn.ModuleList(LinearSelfAttention(dim, **options) for _ in range(depth))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.unfold(x, 2, stride=2).reshape(x.shape[0], x.shape[1], 4, -1)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x.mean((2, 3)))


def cvnets_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return CvnetsNet(**options)


def timm_efficientvit(name: str = "efficientvit_m0", **options: Any) -> nn.Module:
    return awake(timm_model(name, **options))


def small_efficientvit(**options: Any) -> nn.Module:
    """Three stages of one block each, on whose maps (8, 4 and 2 pixels wide at 128) windows of 7 do and do not fit."""
    from timm.models.efficientvit_msra import EfficientVitMsra

    torch.manual_seed(0)
    small = {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 2), "kernels": (7, 5, 3), "num_classes": 10, "img_size": 128}
    return awake(EfficientVitMsra(**{**small, **options}))


def timm_window_attention(
    dim: int = 32, heads: int = 2, resolution: int = 10, window: int = 4, kernels: tuple[int, ...] = (5, 3), key_dim: int = 16
) -> nn.Module:
    """A ``LocalWindowAttention`` of timm alone."""
    from timm.models.efficientvit_msra import LocalWindowAttention

    torch.manual_seed(0)
    return awake(LocalWindowAttention(dim, key_dim, heads, dim / heads / key_dim, resolution, window, kernels))


def awake(model: nn.Module) -> nn.Module:
    """Norms that start at zero, as the last one of every residual branch of EfficientViT does, hide whatever stands before them. They start at 0.2:
    at one, gradients explode through the depth, and nothing but rounding noise is left to compare.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.2)
    return model


class Conv2d_BN(nn.Sequential):
    """As in Cream's EfficientViT: a convolution ``c`` and its norm ``bn``."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(out_channels))


class CascadedGroupAttention(nn.Module):
    """Stands in for Cream's class of this name: its attributes (a persistent index buffer; in evaluation the gathered bias ``ab``; a ``train`` that
    returns nothing) and its maths.
    """

    def __init__(self, dim: int, key_dim: int, num_heads: int, attn_ratio: float, resolution: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.attn_ratio = num_heads, key_dim, attn_ratio
        self.scale = key_dim**-0.5
        self.d = int(attn_ratio * key_dim)
        self.qkvs = nn.ModuleList(Conv2d_BN(dim // num_heads, 2 * key_dim + self.d) for _ in range(num_heads))
        self.dws = nn.ModuleList(Conv2d_BN(key_dim, key_dim, kernels[i], groups=key_dim) for i in range(num_heads))
        self.proj = nn.Sequential(nn.ReLU(), Conv2d_BN(num_heads * self.d, dim))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))
        row, column = torch.arange(resolution**2) // resolution, torch.arange(resolution**2) % resolution
        self.register_buffer("attention_bias_idxs", (row[:, None] - row).abs() * resolution + (column[:, None] - column).abs())

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.attention_biases[:, self.attention_bias_idxs]

    def forward(self, x: Tensor) -> Tensor:
        bias = self.attention_biases[:, self.attention_bias_idxs] if self.training else self.ab
        outputs: list[Tensor] = []
        for i, split in enumerate(x.chunk(self.num_heads, dim=1)):
            q, k, v = self.qkvs[i](split + outputs[-1] if outputs else split).split([self.key_dim, self.key_dim, self.d], dim=1)
            q, k = self.dws[i](q).flatten(2), k.flatten(2)
            weights = (q.transpose(-2, -1) @ k * self.scale + bias[i]).softmax(dim=-1)
            outputs.append((v.flatten(2) @ weights.transpose(-2, -1)).view(v.shape))
        return self.proj(torch.cat(outputs, 1))


class LocalWindowAttention(nn.Module):
    """Stands in for Cream's class of this name, which takes maps of the one size it was made for."""

    def __init__(
        self, dim: int, key_dim: int, num_heads: int, attn_ratio: float, resolution: int, window_resolution: int, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.resolution, self.window_resolution = dim, num_heads, resolution, window_resolution
        self.attn = CascadedGroupAttention(dim, key_dim, num_heads, attn_ratio, min(window_resolution, resolution), kernels)

    def forward(self, x: Tensor) -> Tensor:
        side, window = self.resolution, self.window_resolution
        assert x.shape[2:] == (side, side), f"input feature has wrong size, expect {(side, side)}, got {tuple(x.shape[2:])}"
        if side <= window:
            return self.attn(x)
        batch, channels, count = x.shape[0], x.shape[1], -(-side // window)
        x = F.pad(x, (0, count * window - side) * 2).view(batch, channels, count, window, count, window)
        x = self.attn(x.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, window, window))
        x = x.view(batch, count, count, channels, window, window).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(batch, channels, count * window, count * window)[:, :, :side, :side]


class CreamNet(nn.Module):
    """Two of Cream's attentions on a map that the window divides and one that it does not, with a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.first = LocalWindowAttention(32, 16, 2, 1, 12, 4, (5, 3))
        self.second = LocalWindowAttention(32, 8, 4, 1, 12, 7, (3, 3, 5, 7))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


def cream_model() -> nn.Module:
    torch.manual_seed(0)
    return CreamNet()


class Residual(nn.Module):
    """As in Cream's EfficientViT."""

    def __init__(self, m: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        if self.training and self.drop > 0:
            y = y * (torch.rand(x.shape[0], 1, 1, 1) >= self.drop) / (1 - self.drop)
        return x + y


class FFN(nn.Module):
    """As in Cream's EfficientViT."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1, self.act, self.pw2 = Conv2d_BN(dim, 2 * dim), nn.ReLU(), Conv2d_BN(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class EfficientViTBlock(nn.Module):
    """As in Cream's EfficientViT, with its attention always on."""

    def __init__(self, dim: int, resolution: int) -> None:
        super().__init__()
        self.dw0, self.ffn0 = Residual(Conv2d_BN(dim, dim, 3, dim)), Residual(FFN(dim))
        self.mixer = Residual(LocalWindowAttention(dim, 16, 2, dim / 32, resolution, 4, (5, 3)))
        self.dw1, self.ffn1 = Residual(Conv2d_BN(dim, dim, 3, dim)), Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class PatchMerging(nn.Module):
    """As in Cream's EfficientViT, which takes the squeeze-and-excitation of timm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        from timm.layers import SqueezeExcite

        super().__init__()
        hidden = 4 * dim
        self.conv1, self.act, self.conv2 = Conv2d_BN(dim, hidden), nn.ReLU(), Conv2d_BN(hidden, hidden, 3, hidden, 2)
        self.se, self.conv3 = SqueezeExcite(hidden, 0.25), Conv2d_BN(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class EfficientViT(nn.Module):
    """Stands in for Cream's model of this name, small: the names of its parts, the order in which it calls them, images of one size."""

    def __init__(self, size: int = 128, dims: tuple[int, int, int] = (32, 48, 64)) -> None:
        super().__init__()
        first = dims[0]
        self.patch_embed = nn.Sequential(
            *(Conv2d_BN(3, first // 8, 3, 1, 2), nn.ReLU(), Conv2d_BN(first // 8, first // 4, 3, 1, 2), nn.ReLU()),
            *(Conv2d_BN(first // 4, first // 2, 3, 1, 2), nn.ReLU(), Conv2d_BN(first // 2, first, 3, 1, 2)),
        )

        def around(dim: int) -> nn.Module:
            return nn.Sequential(Residual(Conv2d_BN(dim, dim, 3, dim)), Residual(FFN(dim)))

        def stage(dim: int, out: int, side: int) -> nn.Sequential:
            return nn.Sequential(around(dim), PatchMerging(dim, out), around(out), EfficientViTBlock(out, side))

        self.blocks1 = nn.Sequential(EfficientViTBlock(first, size // 16))
        self.blocks2, self.blocks3 = stage(dims[0], dims[1], size // 32), stage(dims[1], dims[2], size // 64)
        self.head = nn.Sequential(nn.BatchNorm1d(dims[2]), nn.Linear(dims[2], 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks3(self.blocks2(self.blocks1(self.patch_embed(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cream_efficientvit(size: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return EfficientViT(size)


Batch = Any
"""A model's input: a tensor; for a NaViT a list of them; for a naflex model a dictionary."""


def forward(model: nn.Module, batch: Batch) -> Any:
    """Call ``model`` as its zoo does."""
    return model(**batch) if isinstance(batch, dict) and hasattr(model, "config") else model(batch)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """``batch`` with every floating tensor in another dtype."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def settle(model: nn.Module, images: Batch) -> nn.Module:
    """Move every parameter away from its initial value (no norm is an identity then, no bias zero), and let batch norm measure ``images``, so that
    signals and gradients neither die nor explode through the depth.
    """
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(noise * 0.1)
        for norm in norms:
            norm.momentum = 1.0
        forward(model.train(), images)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    return model


def pair(model: nn.Module, images: Batch, **options: object) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    """A settled model, its accelerated copy, and the handle of that."""
    original = settle(model, images)
    accelerated = copy.deepcopy(original)
    return original, accelerated, vitkernels.accelerate(accelerated, **options)


@contextlib.contextmanager
def swapped_and_reverted(model: nn.Module, run: Callable[[Any], Tensor]) -> Iterator[Tensor]:
    """Accelerated inside, with the original's result: nothing but classes changes, copies and pickles keep them, and all of it reverts."""
    classes = {path: type(module) for path, module in model.named_modules()}
    keys, expected = list(model.state_dict()), run(model)
    handle = vitkernels.accelerate(model)
    assert list(model.state_dict()) == keys and isinstance(model, classes[""])
    fast = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(run(twin), fast)
        twin.load_state_dict(model.state_dict(), strict=True)
    assert set(reasons(vitkernels.accelerate(model)).values()) == {"already accelerated"}
    yield expected
    handle.remove()
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert torch.equal(run(model), expected)


def reasons(handle: vitkernels.Handle) -> dict[str, str]:
    """Why each module was left alone, by its path."""
    return {record.path: record.reason for record in handle.skipped}


def under_autocast(model: nn.Module, images: Batch, training: bool) -> dict[str, Tensor]:
    """:func:`results` in bfloat16 autocast; of a float64 batch, the truth, without."""
    exact = any(isinstance(leaf, Tensor) and leaf.dtype is torch.float64 for leaf in pytree.tree_leaves(images))
    with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
        return results(model, images, training=training)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def results(
    model: nn.Module, images: Batch, *, training: bool, seed: int = 0, call: Callable[[nn.Module, Batch], Any] = forward
) -> dict[str, Tensor]:
    """The output of ``model`` and the gradient of every parameter, by name."""
    model.train(training).zero_grad()
    torch.manual_seed(seed)
    output = logits(call(model, images))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output.dtype)
    (output * weights).sum().backward()
    gradients = {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), **{name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}}


def infer(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What a model gives where no gradient is wanted."""
    with torch.no_grad():
        return logits(model(*args, **kwargs))


def assert_right(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    """``model`` infers what ``original`` does, by the rule against ``original`` in float64."""
    found = compare_tensors("output", infer(model, x), infer(original, x), infer(copy.deepcopy(original).double(), x.double()))
    assert found.holds, found


def assert_follows(change: Callable[[nn.Module], object], model: nn.Module, original: nn.Module, x: Tensor) -> None:
    """Both are changed, and it shows."""
    before = infer(model, x)
    for one in (original, model):
        change(one)
    assert_right(model, original, x)
    assert not torch.allclose(infer(model, x), before)


def inference(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
    """The output of ``model`` where no gradient is wanted, which is where folded weights are kept: of the second call."""
    model.train(training)
    with torch.no_grad():
        model(images)
        return {"output": logits(model(images))}


def trained(model: nn.Module, images: Tensor, *, training: bool, steps: int = 3) -> dict[str, Tensor]:
    """Every gradient of the last of some training steps, and every parameter and buffer after them. Small steps: large ones are chaotic."""
    images = images * 1.5 + 0.25  # of other statistics than those that :func:`settle` left in the norms
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        outcome = results(model, images, training=training)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {**outcome, **{name: tensor.detach().clone() for name, tensor in model.state_dict().items()}}


def jitter(model: nn.Module, seed: int, eps: float | None = None) -> nn.Module:
    """A copy of ``model`` with every parameter moved by one rounding step of its dtype (or relatively by ``eps``), up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.dtype) * 2 - 1
            parameter.mul_(1 + signs * (eps or torch.finfo(parameter.dtype).eps))
    return model


Measure = Callable[..., dict[str, Tensor]]
"""``measure(model, images, training=...)``: what of a model is compared."""


def judge(
    original: nn.Module,
    accelerated: nn.Module,
    images: Batch,
    *,
    training: bool,
    jitters: int = 4,
    measure: Measure = results,
    eps: float | None = None,
) -> Iterator[list[Comparison]]:
    """Compare the accelerated model with the original, both against the original in float64: output and every parameter's gradient, or what
    ``measure`` says. Once with each run of eager there is, judged by all of them so far: what holds once holds from then on.

    Through tens of layers the error of one element in one eager run is one draw of the rounding noise, and among hundreds of tensors some are luckily
    small. So errors are root mean squares over a tensor, and eager is run a few times more with weights moved by a rounding step (of their dtype, or
    ``eps``); the largest counts. A tensor that is zero but for rounding, as the gradient of a bias in front of a norm, is noise whose size depends
    on the order of a sum; it is held to the largest noise among the model's tensors.
    """

    def run(model: nn.Module, images: Batch) -> dict[str, Tensor]:
        # A copy: in training, batch norm changes its statistics.
        return measure(copy.deepcopy(model), images, training=training)

    def errors(of: dict[str, Tensor]) -> dict[str, float]:
        return {name: rms(of[name].double() - truth.double()) for name, truth in exact.items()}

    exact = run(copy.deepcopy(original).double(), cast(images, torch.float64))
    fast = run(accelerated, images)
    assert exact.keys() == fast.keys()
    scales, ours, eager_errors = {name: rms(truth.double()) for name, truth in exact.items()}, errors(fast), dict.fromkeys(exact, 0.0)
    for seed in (None, *range(jitters)):
        eager = run(original if seed is None else jitter(original, seed, eps), images)
        eager_errors = {name: max(error, eager_errors[name]) for name, error in errors(eager).items()}
        largest, found = max(eager_errors.values()), []
        for name, scale in scales.items():
            dtype, eager_error = eager[name].dtype, eager_errors[name]
            floor = 2 * (eps or torch.finfo(dtype).eps) * scale if dtype.is_floating_point else 0.0
            found.append(Comparison(name, ours[name], eager_error if eager_error < scale else largest, scale, floor))
        yield found


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.square().mean().sqrt())


def assert_same(original: nn.Module, accelerated: nn.Module, images: Batch, *, training: bool, **options: Any) -> None:
    """Every comparison of :func:`judge` holds: on these images or, where one breaks the rule, in the median on others near them."""

    def draws(images: Batch) -> Iterator[list[Comparison]]:
        return judge(original, accelerated, images, training=training, **options)

    def draw(number: int) -> list[Comparison]:
        *_, last = draws(moved(images, number))
        return last

    for found in draws(images):  # eager is run again only while its runs so far do not settle it
        if all(c.holds for c in found):
            return
    broken = [c for c in settled(found, draw) if not c.holds]
    assert not broken, "\n".join(map(str, broken))


def assert_curves_agree(original: Tensor, ours: Tensor, again: Callable[[int], Tensor]) -> None:
    """The loss curve ``ours`` lies at most twice as far from the original's as the furthest of four more runs ``again(seed)`` of the original, which
    are made only until one is far enough.
    """
    distance, largest = rms(ours - original), 0.0
    for seed in range(4):
        largest = max(largest, rms(again(seed) - original))
        assert 0 < largest < 0.1 * rms(original), "the yardstick itself is out of measure: the runs of the original have nothing in common"
        if distance <= 2 * largest:
            return
    raise AssertionError(f"rms distance {distance:.3g}, between runs of the original at most {largest:.3g}")


def moved(batch: Batch, seed: int) -> Batch:
    """``batch`` with every floating tensor moved by a quarter of a standard normal one."""
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map_only(
        Tensor, lambda t: t + REDRAW_STEP * torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t, batch
    )


def assert_same_in(dtype: torch.dtype, original: nn.Module, accelerated: nn.Module, images: Tensor) -> None:
    """:func:`assert_same` with everything in a dtype, in evaluation and in training."""
    for training in (False, True):
        assert_same(original.to(dtype), accelerated.to(dtype), images.to(dtype), training=training)


def assert_same_under_autocast(original: nn.Module, accelerated: nn.Module, images: Tensor) -> None:
    """:func:`assert_same` under bfloat16 autocast, and every result of the original's dtype."""
    fast, eager = (under_autocast(model, images, training=True) for model in (accelerated, original))
    assert {name: tensor.dtype for name, tensor in fast.items()} == {name: tensor.dtype for name, tensor in eager.items()}
    assert_same(original, accelerated, images, training=True, measure=under_autocast, eps=torch.finfo(torch.bfloat16).eps)


def assert_same_compiled(original: nn.Module, accelerated: nn.Module, images: Tensor, other: Tensor, ours: type) -> None:
    """:func:`assert_same` of the compiled model: without a graph break, forward and backward, and the ``other`` batch without another compilation.

    ``ours``: a class of the accelerated model's alone, which alone is compiled.
    """
    torch.compiler.reset()

    def call(model: nn.Module, images: Tensor) -> Any:
        accelerated = any(isinstance(module, ours) for module in model.modules())
        return torch.compile(model, fullgraph=True, backend="aot_eager")(images) if accelerated else model(images)

    assert_same(original, accelerated, images, training=True, measure=functools.partial(results, call=call))
    compiled = torch.compile(accelerated.eval(), fullgraph=True, backend="aot_eager")
    original.eval()
    images = images.clone()
    for dim, sizes in enumerate(zip(images.shape, other.shape, strict=True)):
        if len(set(sizes)) > 1:
            torch._dynamo.mark_dynamic(images, dim)  # that alone: with every size a symbol the compiler takes ten times as long
    with torch.no_grad():
        compiled(images)
        with torch._dynamo.config.patch(error_on_recompile=True):
            exact = logits(copy.deepcopy(original).double()(other.double()))
            assert compare_tensors("compiled", logits(compiled(other)), logits(original(other)), exact).holds


class Copies(TorchDispatchMode):
    """Elements of every copy that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default):
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.untyped_storage().nbytes() // t.element_size() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))])
        return out


def largest_tensor(model: nn.Module, batch: Batch) -> int:
    """Elements of the largest tensor in a forward and backward pass."""
    with Largest() as found:
        logits(forward(model, batch)).sum().backward()
    return found.numel


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, parameters not counted."""
    kept: dict[int, torch.UntypedStorage] = {}  # held until all are counted: what is freed could be handed out, and missed, again
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = logits(forward(model, batch))
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
