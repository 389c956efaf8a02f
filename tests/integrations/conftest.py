"""What the tests of models share."""

from __future__ import annotations

import pytest

from vitkernels.integrations import (
    _accelerate,
    blocks,
    classifiers,
    convolutions,
    folded,
    mobilevit,
    patch_embedding,
    timm,
    transformers,
    vit_pytorch,
)


@pytest.fixture
def attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose convolutions, MLPs and transformer blocks are left alone, for tests of what is done to their attention."""
    for name in (*folded.TABLE, *convolutions.TABLE, *blocks.TABLE):
        monkeypatch.delitem(_accelerate._TABLE, name)
    for family in (blocks, classifiers, patch_embedding):
        monkeypatch.setattr(family, "match", lambda module: None)
    for name in mobilevit.TABLE:
        monkeypatch.setitem(_accelerate._TABLE, name, {**timm.TABLE, **transformers.TABLE, **vit_pytorch.TABLE}[name])
