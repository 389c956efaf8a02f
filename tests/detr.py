"""Small DETRs, the authors' layers, matcher and criterion in plain PyTorch, and targets: what DETR's replacements are compared with."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from . import conftest  # noqa: F401  a process that a test starts needs conftest's torchvision too

Targets = list[dict[str, Tensor]]

_FAMILIES = {
    "Detr": {"auxiliary_loss": True},
    "TableTransformer": {"auxiliary_loss": True},
    "ConditionalDetr": {"auxiliary_loss": True},
    "DeformableDetr": {"auxiliary_loss": True, "num_feature_levels": 1, "encoder_n_points": 2, "decoder_n_points": 2},
}
NARROW = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 9,
    "num_labels": 5,
    "dropout": 0.0,
}


def transformers_model(family: str = "Detr", **options: Any) -> Any:
    """A small ``<family>ForObjectDetection`` of transformers, for images of 64 px; 2 x 4 tokens of its 2 images are seen by the encoder."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"])
    config = getattr(transformers, f"{family}Config")
    settings = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone, **NARROW, **_FAMILIES[family], **options}
    return getattr(transformers, f"{family}ForObjectDetection")(config(**settings))


def yolos(**options: Any) -> Any:
    """A small ``YolosForObjectDetection``, for images of 64 px."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64, "image_size": [64, 64], "patch_size": 16}
    return transformers.YolosForObjectDetection(transformers.YolosConfig(**{**small, "num_detection_tokens": 9, "num_labels": 5, **options}))


def targets(counts: tuple[int, ...] = (3, 1), classes: int = 5, *, labels: str = "labels", seed: int = 0) -> Targets:
    """``counts[i]`` boxes (cx, cy, w, h) in image i, and their classes under the key ``labels``."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        centre, size = torch.rand(count, 2, generator=generator) * 0.6 + 0.2, torch.rand(count, 2, generator=generator) * 0.3 + 0.05
        found.append({labels: torch.randint(classes, (count,), generator=generator), "boxes": torch.cat((centre, size), 1)})
    return found


def outputs(
    layers: int = 3, images: int = 2, queries: int = 9, classes: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What the authors' DETR returns: logits [B, Q, classes] and boxes of the last decoder layer, and of those before it; all want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def layer() -> dict[str, Tensor]:
        logits = torch.randn(images, queries, classes, generator=generator, dtype=torch.float64)
        boxes = torch.rand(images, queries, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.1
        return {"pred_logits": logits.to(dtype).requires_grad_(), "pred_boxes": boxes.to(dtype).requires_grad_()}

    return {**layer(), "aux_outputs": [layer() for _ in range(layers - 1)]}


# --- the authors' code, in plain PyTorch --------------------------------------------------------------------------------------------------


class Placed(nn.Module):
    """What the authors' two layers share."""

    def with_pos_embed(self, tensor: Tensor, pos: Tensor | None) -> Tensor:
        return tensor if pos is None else tensor + pos

    def add_feed_forward(self, dim: int, hidden: int, dropout: float, before: bool, blocks: int) -> None:
        self.linear1, self.dropout, self.linear2 = nn.Linear(dim, hidden), nn.Dropout(dropout), nn.Linear(hidden, dim)
        for i in range(1, blocks + 1):
            self.add_module(f"norm{i}", nn.LayerNorm(dim))
            self.add_module(f"dropout{i}", nn.Dropout(dropout))
        self.activation, self.normalize_before = F.relu, before

    def fed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(Placed):
    """Stands in for the authors' class of this name."""

    def __init__(self, dim: int, heads: int, hidden: int = 64, dropout: float = 0.0, normalize_before: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.add_feed_forward(dim, hidden, dropout, normalize_before, 2)

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        x = self.norm1(src) if self.normalize_before else src
        q = k = self.with_pos_embed(x, pos)
        src = src + self.dropout1(self.self_attn(q, k, value=x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)[0])
        if self.normalize_before:
            return src + self.dropout2(self.fed_forward(self.norm2(src)))
        src = self.norm1(src)
        return self.norm2(src + self.dropout2(self.fed_forward(src)))


class TransformerDecoderLayer(Placed):
    """Stands in for the authors' class of this name."""

    def __init__(self, dim: int, heads: int, hidden: int = 64, dropout: float = 0.0, normalize_before: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.add_feed_forward(dim, hidden, dropout, normalize_before, 3)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        before = self.normalize_before
        x = self.norm1(tgt) if before else tgt
        q = k = self.with_pos_embed(x, query_pos)
        tgt = tgt + self.dropout1(self.self_attn(q, k, value=x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask)[0])
        x = self.norm2(tgt) if before else self.norm1(tgt)
        tgt = tgt if before else x
        q, k = self.with_pos_embed(x, query_pos), self.with_pos_embed(memory, pos)
        tgt = tgt + self.dropout2(
            self.multihead_attn(query=q, key=k, value=memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask)[0]
        )
        x = self.norm3(tgt) if before else self.norm2(tgt)
        tgt = tgt if before else x
        tgt = tgt + self.dropout3(self.fed_forward(x))
        return tgt if before else self.norm3(tgt)


class AuthorsDetr(nn.Module):
    """The authors' transformer on patches of images [B, 3, 64, 64], of which all but the first have a right half of padding; logits [B, Q, 6]."""

    def __init__(self, dim: int = 32, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, stride=16)
        self.position, self.queries = nn.Parameter(torch.randn(16, 1, dim)), nn.Parameter(torch.randn(9, 1, dim))
        self.encoder = nn.ModuleList(TransformerEncoderLayer(dim, heads, **options) for _ in range(2))
        self.decoder = nn.ModuleList(TransformerDecoderLayer(dim, heads, **options) for _ in range(2))
        self.head = nn.Linear(dim, 6)

    def forward(self, images: Tensor) -> Tensor:
        batch = len(images)
        memory = self.patches(images).flatten(2).permute(2, 0, 1)  # [N, B, C]
        padding = (torch.arange(16) % 4 > 1) & (torch.arange(batch)[:, None] > 0)
        pos, query_pos = self.position.expand(-1, batch, -1), self.queries.expand(-1, batch, -1)
        for layer in self.encoder:
            memory = layer(memory, src_key_padding_mask=padding, pos=pos)
        found = torch.zeros_like(query_pos)
        for layer in self.decoder:
            found = layer(found, memory, memory_key_padding_mask=padding, pos=pos, query_pos=query_pos)
        return self.head(found).transpose(0, 1)


def authors_detr(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return AuthorsDetr(**options)


def corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) as (x0, y0, x1, y1)."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of every box of ``a`` [n, 4] with every box of ``b`` [m, 4], in corners: [n, m]."""
    assert (a[:, 2:] >= a[:, :2]).all() and (b[:, 2:] >= b[:, :2]).all()

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(-1)

    a, b = a[:, None], b[None]
    inter = area(torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inter
    hull = area(torch.min(a[..., :2], b[..., :2]), torch.max(a[..., 2:], b[..., 2:]))
    return inter / union - (hull - union) / hull


class HungarianMatcher(nn.Module):
    """Stands in for the authors' class of this name: its attributes and its maths. With ``focal`` (alpha, gamma), Deformable DETR's cost."""

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1, focal: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        if focal is not None:
            self.focal = focal

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        found = []
        for image, target in enumerate(targets):
            if (focal := getattr(self, "focal", None)) is not None:
                (alpha, gamma), p = focal, logits[image].sigmoid()
                positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
                negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
                classes = (positive - negative)[:, target["labels"]]
            else:
                classes = -logits[image].softmax(-1)[:, target["labels"]]
            apart = (boxes[image][:, None] - target["boxes"][None]).abs().sum(-1)
            cost = self.cost_bbox * apart + self.cost_class * classes - self.cost_giou * giou(corners(boxes[image]), corners(target["boxes"]))
            found.append(tuple(torch.as_tensor(index, dtype=torch.int64) for index in linear_sum_assignment(cost.cpu())))
        return found


class SetCriterion(nn.Module):
    """Stands in for the authors' class of this name: its attributes and its maths."""

    def __init__(self, num_classes: int, matcher: nn.Module, weight_dict: dict[str, float], eos_coef: float, losses: list[str]) -> None:
        super().__init__()
        self.num_classes, self.matcher, self.weight_dict, self.eos_coef, self.losses = num_classes, matcher, weight_dict, eos_coef, losses
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def classification(self, logits: Tensor, where: tuple[Tensor, Tensor], labels: Tensor, boxes: float) -> Tensor:
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[where] = labels
        return F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight)

    def present(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1) != logits.shape[-1] - 1

    def of_layer(self, outputs: dict[str, Any], targets: Targets, boxes: float, last: bool) -> dict[str, Tensor]:
        indices = self.matcher(outputs, targets)
        where = (torch.cat([torch.full_like(i, image) for image, (i, _) in enumerate(indices)]), torch.cat([i for i, _ in indices]))
        labels = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)])
        wanted = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, indices, strict=True)])
        logits, found = outputs["pred_logits"], outputs["pred_boxes"][where]
        losses = {}
        if "labels" in self.losses:
            losses["loss_ce"] = self.classification(logits, where, labels, boxes)
            if last:
                hits = (logits[where].argmax(-1) == labels).float().sum()
                losses["class_error"] = 100 - hits * (100 / max(len(labels), 1))
        if "cardinality" in self.losses:
            with torch.no_grad():
                counts = torch.as_tensor([len(t["labels"]) for t in targets], device=logits.device)
                losses["cardinality_error"] = F.l1_loss(self.present(logits).sum(1).float(), counts.float())
        if "boxes" in self.losses:
            losses["loss_bbox"] = (found - wanted).abs().sum() / boxes
            losses["loss_giou"] = (1 - giou(corners(found), corners(wanted)).diag()).sum() / boxes
        return losses

    def forward(self, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        boxes = max(1.0, float(sum(len(t["labels"]) for t in targets)))
        losses = self.of_layer(outputs, targets, boxes, True)
        for i, layer in enumerate(outputs.get("aux_outputs", [])):
            losses |= {f"{name}_{i}": loss for name, loss in self.of_layer(layer, targets, boxes, False).items()}
        return losses


class FocalCriterion(SetCriterion):
    """Deformable DETR's: a sigmoid for each class and no class for nothing."""

    def __init__(self, num_classes: int, matcher: nn.Module, weight_dict: dict[str, float], losses: list[str], focal_alpha: float = 0.25) -> None:
        super().__init__(num_classes, matcher, weight_dict, 1.0, losses)
        self.focal_alpha = focal_alpha

    def classification(self, logits: Tensor, where: tuple[Tensor, Tensor], labels: Tensor, boxes: float) -> Tensor:
        hot = torch.zeros_like(logits)
        hot[(*where, labels)] = 1
        p = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, hot, reduction="none")
        focal = entropy * (1 - (p * hot + (1 - p) * (1 - hot))) ** 2 * (self.focal_alpha * hot + (1 - self.focal_alpha) * (1 - hot))
        return focal.sum() / boxes

    def present(self, logits: Tensor) -> Tensor:
        return logits.sigmoid().amax(-1) > 0.5
