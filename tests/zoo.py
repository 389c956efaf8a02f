"""The models the integrations are tested on: small, without downloads, from the zoos' own classes; and the rule they are judged by."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.accuracy import Comparison

from . import conftest  # noqa: F401  a process that a test starts needs conftest's torchvision too


def photos(size: int | tuple[int, int], count: int = 2) -> Tensor:
    """Real photographs, [count, 3, H, W], scaled to [-1, 1]."""
    from skimage import data

    images = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() for name in ("astronaut", "chelsea", "coffee")[:count]]
    resized = [F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False) for image in images]
    return torch.cat(resized) / 127.5 - 1


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


def settle(model: nn.Module, images: Tensor) -> nn.Module:
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
        model.train()(images)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    return model


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def results(model: nn.Module, images: Tensor, *, training: bool, seed: int = 0) -> dict[str, Tensor]:
    """The output of ``model`` and the gradient of every parameter, by name."""
    model.train(training).zero_grad()
    torch.manual_seed(seed)
    output = logits(model(images))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output.dtype)
    (output * weights).sum().backward()
    gradients = {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), **{name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}}


def jitter(model: nn.Module, seed: int, eps: float | None = None) -> nn.Module:
    """A copy of ``model`` with every parameter moved by one rounding step of its dtype (or relatively by ``eps``), up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + signs * (eps or torch.finfo(parameter.dtype).eps))
    return model


def judge(original: nn.Module, accelerated: nn.Module, images: Tensor, *, training: bool, jitters: int = 4) -> Iterator[Comparison]:
    """Compare the accelerated model with the original, both against the original in float64: output and every parameter's gradient.

    Through tens of layers the error of one element in one eager run is one draw of the rounding noise, and among hundreds of tensors some are luckily
    small. So errors are root mean squares over a tensor, and eager is run a few times more with weights moved by a rounding step; the largest counts.
    """

    def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        # A copy: in training, batch norm changes its statistics.
        return results(copy.deepcopy(model), images, training=training)

    exact = run(copy.deepcopy(original).double(), images.double())
    eager = [run(model, images) for model in (original, *(jitter(original, seed) for seed in range(jitters)))]
    fast = run(accelerated, images)
    assert exact.keys() == fast.keys()
    for name, truth in exact.items():
        error, *eager_errors = (rms(result[name].double() - truth) for result in (fast, *eager))
        yield Comparison(name, error, max(eager_errors), rms(truth), 2 * torch.finfo(eager[0][name].dtype).eps * rms(truth))


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.square().mean().sqrt())


def assert_same(original: nn.Module, accelerated: nn.Module, images: Tensor, *, training: bool) -> None:
    """Every comparison of :func:`judge` holds."""
    broken = [c for c in judge(original, accelerated, images, training=training) if not c.holds]
    assert not broken, "\n".join(map(str, broken))
