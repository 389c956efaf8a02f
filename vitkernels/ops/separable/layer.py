"""The attention of a MobileViTv2 layer with what is around it, in one op, for inference: ``y = x + separable_self_attention(group_norm(x))``.

On a channels_last map nothing is unfolded, transposed or written between the norm and the sum. Like the inverted bottleneck, whose packed weights it
reads, it has no gradient and is not part of :mod:`vitkernels.ops`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _define
from vitkernels.ops.bottleneck import op as bottleneck
from vitkernels.ops.bottleneck.reference import Affine, Norm

NAME = "separable_layer"

backends.declare(NAME, backends.Support(triton=()))


def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


_define.define_for_inference(
    NAME,
    schema="(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor query_weight, Tensor query_bias, Tensor key_weight, Tensor key_bias, "
    "Tensor value_weight, Tensor value_bias, Tensor out_weight, Tensor out_bias, float eps, int patch_h, int patch_w) -> Tensor",
    fake=_fake,
    instead="separable_self_attention",
)
_op = torch.ops.vitkernels.separable_layer.default


class Packed(NamedTuple):
    """The weights as the kernel reads them; made by :func:`pack`."""

    tensors: tuple[Tensor | None, ...]  # norm, query, keys, values, output: weight and bias of each
    eps: float


def pack(qkv: Affine, out: Affine, norm: Norm, activations: torch.dtype | None = None) -> Packed:
    """Weights for :func:`run`, in float32 (float64 for float64), or of values and output in pairs of bfloat16 as the inverted bottleneck's are.

    Args:
        qkv: [1 + 2 d, d], the rows of the query, then of the keys, then of the values.
        out: [d, d].
        norm: of the input, over all of a sample.
        activations: the dtype of what :func:`run` will be given, if it is known.
    """
    dim = out.weight.shape[0]
    query, keys, values = qkv.weight.split([1, dim, dim])
    biases = qkv.weight.new_zeros(1 + 2 * dim) if qkv.bias is None else qkv.bias
    query_bias, key_bias, value_bias = biases.split([1, dim, dim])
    *_, key_panels, key_biases = bottleneck.pack(Affine(keys, key_bias)).tensors
    rest = bottleneck.pack(out, norm=norm, expand=Affine(values, value_bias), activation="relu", activations=activations).tensors
    *of_norm, value_panels, value_biases, _, _, out_panels, out_biases = rest
    # The kernel normalises the tokens for the query without the norm's weight and bias; the bias, like the query's own, is one number for all.
    query, query_bias = query[0].double(), query_bias.double()
    if norm.bias is not None:
        query_bias = query_bias + query @ norm.bias.double()
    if norm.weight is not None:
        query = query * norm.weight.double()
    query = F.pad(query, [0, -dim % bottleneck.PANEL])
    of_query = [t.to(_define.accumulation_dtype(qkv.weight.dtype)) for t in (query, query_bias)]
    return Packed((*of_norm, *of_query, key_panels, key_biases, value_panels, value_biases, out_panels, out_biases), norm.eps)


def run(x: Tensor, packed: Packed, patch: tuple[int, int]) -> Tensor:
    """The layer of ``x``.

    Args:
        x: [B, d, H, W]; float32, bfloat16, float16 or float64, on the CPU. Channels_last is read as it lies.
        packed: the weights, of ``x``'s accumulation dtype, or packed for activations of its dtype.
        patch: (ph, pw), which divide H and W: pixels at one position in their patches are a group.

    Returns:
        [B, d, H, W] in channels_last memory, of the dtype of ``x``. What lies between the norm and the sum is in float32.

    Raises:
        RuntimeError: shapes or dtypes that do not go together.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    return _define.call(_op, torch.is_grad_enabled() and x.requires_grad, x, *packed.tensors, packed.eps, *patch)
