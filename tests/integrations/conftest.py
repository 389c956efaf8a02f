"""What the tests of models share."""

from __future__ import annotations

import pytest

from vitkernels.integrations import _accelerate, folded


@pytest.fixture
def attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose convolutions and MLPs are left alone, for tests of what is done to their attention; the others are test_folded.py's."""
    for name in folded.TABLE:
        monkeypatch.delitem(_accelerate._TABLE, name)
