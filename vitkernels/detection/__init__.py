"""Detection transformers (DETR, arXiv 2005.12872): the matcher and the loss, for all decoder layers in one pass.

:class:`HungarianMatcher` and :class:`SetCriterion` have the signatures, the results and the names of the official code, and as an option the focal
cost and loss of its successors (Deformable, Conditional, RT- and RF-DETR). Both are built on :mod:`vitkernels.ops` alone.
"""

from vitkernels.detection.criterion import SetCriterion
from vitkernels.detection.matcher import HungarianMatcher
from vitkernels.detection.targets import PackedTargets

__all__ = ["HungarianMatcher", "PackedTargets", "SetCriterion"]
