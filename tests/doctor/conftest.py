"""Fixtures of the doctor's tests."""

from __future__ import annotations

import pytest

from avmp_vllm.doctor import installation
from avmp_vllm.engine.entry.config import SELECTED


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Leave this process's environment as it was: AVMP in charge is told to child processes."""
    monkeypatch.setenv(SELECTED, "")
    monkeypatch.delenv(SELECTED)
    for variable in installation.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
