"""What the tests of models share."""

from __future__ import annotations

import pytest

from vitkernels.integrations import _accelerate, folded


@pytest.fixture
def attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose convolutions are left alone, for tests of what is done to their attention; the convolutions are those of test_folded.py."""
    for name in folded.TABLE:
        monkeypatch.delitem(_accelerate._TABLE, name)
