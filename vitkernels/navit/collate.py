"""From samples of a data set to packed batches, inside the workers of a DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from vitkernels.navit.dropping import TokenDrop
from vitkernels.navit.packing import Method, pack
from vitkernels.navit.patchify import Edge, PackedBatch, assemble, cut
from vitkernels.navit.resolution import ResolutionSampler


class PackedCollate:
    """A ``collate_fn``: resizes, drops tokens, patchifies and packs. It can be pickled, so it works in DataLoader workers.

    A sample is an image [C, H, W], or a tuple or list whose first item is the image; what follows it becomes the batch's ``targets``, collated by
    PyTorch's ``default_collate`` in the order of the images in the batch.

    Args:
        patch_size: side of a patch in pixels.
        max_tokens: if given, a call returns a list of batches of exactly ``max_tokens`` token rows each, padding at the end, the images distributed
            by :func:`pack`. Else one batch of all images, in order, without padding.
        max_images: the most images in such a batch; with it all its tensors have the same shapes each time.
        method: of :func:`pack`. All images of a call are known here, so the default is the one that leaves less padding.
        resolution: draws the size that each image is resized to, anew each time.
        token_drop: drops patches; leave it out for evaluation.
        edge: of :func:`patchify`; ``resolution`` makes whole patches already.

    Random numbers come from PyTorch's own generator, which DataLoader seeds differently in each worker and from its ``generator`` argument.
    """

    def __init__(
        self,
        patch_size: int,
        max_tokens: int | None = None,
        *,
        max_images: int | None = None,
        method: Method = "best_fit_decreasing",
        resolution: ResolutionSampler | None = None,
        token_drop: TokenDrop | None = None,
        edge: Edge = "error",
    ) -> None:
        if max_images is not None and max_tokens is None:
            raise ValueError("PackedCollate: max_images is given without max_tokens; it is the bound of batches of max_tokens each")
        self.patch_size, self.max_tokens, self.max_images, self.method = patch_size, max_tokens, max_images, method
        self.resolution, self.token_drop, self.edge = resolution, token_drop, edge

    def __call__(self, samples: Sequence[Any]) -> PackedBatch | list[PackedBatch]:
        """One batch, or with ``max_tokens`` a list; ``batch.indices`` are positions in ``samples``. Errors: see :func:`patchify`, :func:`pack`."""
        images = [sample if isinstance(sample, Tensor) else sample[0] for sample in samples]
        if self.resolution is not None:
            images = [self.resolution(image) for image in images]
        patches = [cut(image, self.patch_size, self.edge, i, self.token_drop) for i, image in enumerate(images)]
        bins = [list(range(len(patches)))]
        if self.max_tokens is not None:
            bins = pack([len(each.tokens) for each in patches], self.max_tokens, method=self.method, max_images=self.max_images)
        batches = [
            assemble([patches[i] for i in chosen], self.max_tokens, self.max_images, _targets([samples[i] for i in chosen])) for chosen in bins
        ]
        return batches[0] if self.max_tokens is None else batches


def _targets(samples: Sequence[Any]) -> Any:
    """What the samples hold besides their images: a value if it is one, a list if there are more, ``None`` if nothing."""
    if isinstance(samples[0], Tensor) or len(samples[0]) == 1:
        return None
    rest = default_collate([tuple(sample[1:]) for sample in samples])
    return rest[0] if len(rest) == 1 else rest
