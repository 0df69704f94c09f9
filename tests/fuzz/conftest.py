"""How many streams the fuzz runs."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--streams``."""
    parser.addoption(
        "--streams", type=int, default=160, help="random streams of the differential fuzz (160)"
    )
