"""What the tests of models share."""

from __future__ import annotations

import pytest

from vitkernels.integrations import _accelerate, blocks, folded


@pytest.fixture
def attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose convolutions, MLPs and transformer blocks are left alone, for tests of what is done to their attention."""
    for name in (*folded.TABLE, *blocks.TABLE):
        monkeypatch.delitem(_accelerate._TABLE, name)
