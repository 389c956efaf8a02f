"""The functional API: drop-in ops in PyTorch's layouts and names. Nothing else lives here.

Each op's definition is ``vitkernels/ops/<family>/reference.py``, its derivation the README.md beside it.
"""

from vitkernels.ops.batch_norm.op import batch_norm_act
from vitkernels.ops.cascaded_group.op import cascaded_group_attention, cascaded_group_attention_batch_norm
from vitkernels.ops.dense.op import attention
from vitkernels.ops.head_mixing.op import re_attention
from vitkernels.ops.matching.assignment import linear_sum_assignment
from vitkernels.ops.matching.layout import TargetLayout
from vitkernels.ops.matching.op import detection_set_loss, generalized_box_iou_loss, pairwise_box_cost
from vitkernels.ops.memory.op import memory_attention
from vitkernels.ops.packed.layout import PackedLayout
from vitkernels.ops.packed.op import packed_attention, varlen_attention
from vitkernels.ops.patch.op import patch_attention
from vitkernels.ops.separable.op import separable_attention, separable_self_attention
from vitkernels.ops.similarity.op import attention_similarity
from vitkernels.ops.tokens.op import factorized_position_embedding, masked_pool

__all__ = [
    "PackedLayout",
    "TargetLayout",
    "attention",
    "attention_similarity",
    "batch_norm_act",
    "cascaded_group_attention",
    "cascaded_group_attention_batch_norm",
    "detection_set_loss",
    "factorized_position_embedding",
    "generalized_box_iou_loss",
    "linear_sum_assignment",
    "masked_pool",
    "memory_attention",
    "packed_attention",
    "pairwise_box_cost",
    "patch_attention",
    "re_attention",
    "separable_attention",
    "separable_self_attention",
    "varlen_attention",
]
